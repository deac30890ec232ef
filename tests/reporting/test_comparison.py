"""Several runs on one page."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from msquant.errors import CheckpointError, MsquantError, OutputError, RecipeError
from msquant.reporting.comparison import MOST_RUNS, compare_runs, layers, texts
from msquant.reporting.data import as_plain
from msquant.reporting.write import comparison_page, write_comparison
from tests.formats.folders import change_json, write_folder
from tests.reporting.folders import HOSTILE


def scored(folder: Path, kl: float, worst: int, *, algorithm: str = "osl", length: int = 64) -> Path:
    """A small folder with an evaluation of its two layers."""
    write_folder(folder)
    text = {"tokens": length, "perplexity": 11.0, "baseline_perplexity": 10.0, "kl": kl, "top1": 0.9}
    evaluation = {
        "texts": [{"text": "prose"} | text, {"text": "code"} | text],
        "overall": {"text": "all"} | text,
        "layers": [{"index": i, "snr": 30.0 - i, "own_snr": 25.5 if i == worst else 45.0} for i in (0, 1)],
        "beyond": [],
    }
    recipe = {
        "model": "smollm2-135m",
        "quantization": {"algorithm": algorithm},
        "evaluation": {"max_kl": 0.1, "max_perplexity_increase": 0.2},
    }
    source = {"sha256": "a" * 64}
    change_json(
        folder / "msquant.json", lambda m: m.update(evaluation=evaluation, recipe=recipe, source=source)
    )
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [
        scored(tmp_path / "x" / "model", 0.0435, 1),
        scored(tmp_path / "y" / "model", 0.0871, 0, algorithm="rtn"),
        scored(tmp_path / "third", 0.05, 1),
    ]


def test_scores_limits_and_the_worst_layers_stand_side_by_side(runs: list[Path]) -> None:
    found = compare_runs(runs, check=False)
    assert found.labels == ("x/model", "y/model", "third")
    assert found.remarks == ("Nearest to the model in floating point: x/model, with a KL of 0.0435.",)
    assert texts(found) == {"prose": [0.0435, 0.0871, 0.05], "code": [0.0435, 0.0871, 0.05]} | {
        "all": [0.0435, 0.0871, 0.05]
    }
    assert layers(found) == {0: [45.0, 25.5, 45.0], 1: [25.5, 45.0, 25.5]}
    page = comparison_page(found, "markdown")
    size = found.runs[0].size
    assert size.tensors == sum(row.nbytes for row in found.runs[0].kinds)
    assert "| x/model | check | 0.0435 | 0.1 | 11 | 10 | 12 | 90.0% |" in page
    assert "| y/model | rtn | W8A8 \\(14\\) | golden-stick | 0 (25.5 dB), 1 (45.0 dB) |" in page
    html = comparison_page(found, "html")
    for text in ("0.0871", "rtn", "W8A8 (14)", "0 (25.5 dB), 1 (45.0 dB)"):
        assert text in html
    # Both charts for a screen and a phone, with every run's value where the pointer is.
    assert html.count("<svg") == 4
    assert "layer 1: x/model 25.5 dB, y/model 45.0 dB, third 25.5 dB" in html
    assert "<script" not in html


def test_runs_that_cannot_be_compared_say_so(runs: list[Path], tmp_path: Path) -> None:
    other = scored(tmp_path / "other", 0.01, 0, length=32)
    change_json(other / "msquant.json", lambda m: m.update(source={"sha256": "b" * 64}))
    bare = write_folder(tmp_path / "bare")
    remarks = compare_runs([runs[0], other, bare], check=False).remarks
    assert any("not made from the same model" in remark for remark in remarks)
    assert any("not evaluated on the same texts" in remark for remark in remarks)
    assert "bare was not evaluated." in remarks
    assert not any("Nearest" in remark for remark in remarks)
    page = comparison_page(compare_runs([runs[0], bare], check=False), "markdown")
    assert "| bare | check | not measured |" in page
    assert page.count("\n| bare |") == 2


def test_as_many_as_there_are_colours(tmp_path: Path) -> None:
    first = scored(tmp_path / "run-0", 0.03, 0)
    folders = [first]
    for number in range(1, MOST_RUNS + 1):
        folders.append(tmp_path / f"run-{number}")
        shutil.copytree(first, folders[-1])
    page = comparison_page(compare_runs(folders[:MOST_RUNS], check=False), "html")
    names = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "alarm")
    assert all(f"var(--{name})" in page for name in names)
    with pytest.raises(RecipeError, match=f"{MOST_RUNS + 1} runs cannot be compared"):
        compare_runs(folders, check=False)
    with pytest.raises(RecipeError, match="1 runs cannot be compared"):
        compare_runs(folders[:1], check=False)


def broken(kind: str, tmp_path: Path) -> Path:
    folder = tmp_path / "broken"
    if kind == "missing":
        return folder
    if kind == "empty":
        folder.mkdir()
        return folder
    write_folder(folder)
    if kind == "theirs":
        (folder / "msquant.json").unlink()
    return folder if kind != "twice" else tmp_path / "x" / ".." / "x" / "model"


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("missing", CheckpointError, "there is no such folder"),
        ("empty", CheckpointError, r"was not made by msquant: it has no msquant\.json"),
        ("theirs", CheckpointError, r"was not made by msquant: it has no msquant\.json"),
        ("twice", RecipeError, "is named twice"),
    ],
)
def test_a_folder_that_is_none_of_ours_is_named(
    runs: list[Path], tmp_path: Path, kind: str, error: type[MsquantError], message: str
) -> None:
    folder = broken(kind, tmp_path)
    with pytest.raises(error, match=message) as caught:
        write_comparison([runs[0], folder], tmp_path / "c.html")
    assert caught.value.where == str(folder)
    assert caught.value.remedy
    assert not (tmp_path / "c.html").exists()


def test_the_page_lies_beside_the_first_and_is_not_replaced_unasked(runs: list[Path]) -> None:
    target, _ = write_comparison(runs[:2], check=False)
    assert target == runs[0].with_name("model-comparison.html")
    with pytest.raises(OutputError, match="exists already"):
        write_comparison(runs[:2], check=False)
    assert write_comparison(runs[:2], format="markdown", check=False)[0].suffix == ".md"


def test_json_has_every_run(runs: list[Path]) -> None:
    document: Any = json.loads(json.dumps(as_plain(compare_runs(runs, check=False))))
    assert document["labels"] == ["x/model", "y/model", "third"]
    assert [run["evaluation"]["overall"]["kl"] for run in document["runs"]] == [0.0435, 0.0871, 0.05]
    assert document["runs"][1]["ranking"]["rows"][0]["name"] == "layer 0"


def test_names_stay_text(runs: list[Path], tmp_path: Path) -> None:
    hostile = tmp_path / "<img src=x onerror=alert(5)>"
    scored(hostile, 0.2, 0)

    def poison(manifest: dict[str, Any]) -> None:
        manifest["recipe"]["quantization"]["algorithm"] = HOSTILE[0]
        manifest["evaluation"]["texts"][0]["text"] = HOSTILE[1]

    change_json(hostile / "msquant.json", poison)
    found = compare_runs([runs[0], hostile], check=False)
    page = comparison_page(found, "html")
    assert "<img" not in page
    assert "<script" not in page
    lines = comparison_page(found, "markdown").splitlines()
    assert not any("<img" in line or "<script" in line for line in lines)
