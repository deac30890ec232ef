"""`msquant evaluate` and `msquant compare` as their user runs them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.inference.quantized_folder import write_quantized
from tests.tasks.questions import sums, write_records

pytestmark = pytest.mark.e2e


def msquant(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "msquant", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folders(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    parent = tmp_path_factory.mktemp("evaluate")
    ranges = {"good": list(range(3, 120)), "poor": list(range(200, 210))}
    return [write_quantized(tiny_llama, parent / name, tokens) for name, tokens in ranges.items()]


def test_a_person_sees_every_text_and_the_worst_layers(
    folders: list[Path], tiny_llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.jsonl").write_text(json.dumps({"words": "One two three four five. " * 20}))
    options = ("--sequence-length", 48, "--text", tmp_path / "mine.jsonl", "--template", "{words}")
    done = msquant("evaluate", folders[0], "--baseline", tiny_llama, "--sequences", 1, *options)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 decoder layers" in done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    for word in (
        "docs",
        "code",
        "chinese",
        "dialogue",
        "fiction",
        "math",
        "mine",
        "all",
        "KL",
        "top 5",
        "noise of their own: 0 (",
    ):
        assert word in done.stdout


def test_json_is_one_document(folders: list[Path], tmp_path: Path) -> None:
    """Without a float model, which people are told on stderr."""
    (tmp_path / "mine.txt").write_text("One two three four five. " * 20)
    options = ("--text", tmp_path / "mine.txt", "--no-builtin", "--sequence-length", 48, "--json")
    done = msquant("evaluate", folders[0], *options)
    document = json.loads(done.stdout)
    assert document["baseline"] is None
    assert "no msquant.json says" in document["notes"][0]
    (model,) = document["models"]
    assert [text["text"] for text in model["texts"]] == ["mine.txt"]
    assert model["overall"]["perplexity"] > 1
    assert model["overall"]["kl"] is None
    assert document["texts"]["mine.txt"][1] == 48


def test_folders_side_by_side(folders: list[Path], tiny_llama: Path) -> None:
    options = ("--baseline", tiny_llama, "--sequences", 1, "--sequence-length", 48)
    done = msquant("compare", *folders, *options, "--markdown")
    assert done.returncode == 0, done.stderr
    header, rule, *rows = [line.split("|")[1:-1] for line in done.stdout.splitlines()]
    assert len(header) == len(rule) == 18
    cells = [dict(zip([name.strip() for name in header], row, strict=True)) for row in rows]
    assert [row["folder"].strip() for row in cells] == [str(f) for f in (tiny_llama, *folders)]
    assert cells[0]["KL all"].strip() == ""
    assert 0 < float(cells[1]["KL all"]) < float(cells[2]["KL all"])


def test_tasks(folders: list[Path], tiny_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="tasks need the extra eval")
    write_records(tmp_path / "gsm8k.jsonl", sums(30))
    options = ("--task-data", tmp_path, "--num-fewshot", 0, "--baseline", tiny_llama, "--limit", 24)
    done = msquant("evaluate", folders[0], "--tasks", "gsm8k", *options)
    assert done.returncode == 0, done.stderr
    for word in ("gsm8k v3.0", "flexible-extract", " 24 ", "float", "lm_eval 0.4.13"):
        assert word in done.stdout
    assert done.stderr.splitlines()[-1] == "24 of 24 answers  ETA 0 s"
    assert "it/s" not in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--limit", 3), "--limit: the option has no effect here"),
        (("--tasks", "gsm8k", "--text", "mine.txt"), "--text: the option has no effect here"),
    ],
)
def test_options_of_the_other_kind(folders: list[Path], options: tuple[object, ...], message: str) -> None:
    done = msquant("evaluate", folders[0], *options)
    assert done.returncode == 1
    assert message in done.stderr


def test_one_folder_is_nothing_to_compare(folders: list[Path]) -> None:
    done = msquant("compare", folders[0])
    assert done.returncode == 1
    assert "msquant evaluate" in done.stderr
