"""What a report finds out about a folder, and what it says where there is less to find out."""

import html
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msquant.checkpoint.writer import write_json
from msquant.errors import CheckpointError, OutputError
from msquant.flows.conversion import export
from msquant.reporting.charts import charts
from msquant.reporting.collect import collect
from msquant.reporting.data import ReportVerdict, as_plain
from msquant.reporting.verdict import beyond_limit
from msquant.reporting.write import default_output, html_page, markdown_page, write_report
from tests.formats.folders import change_json, change_tensors, write_folder
from tests.reporting.folders import DENSE, EXPERTS, HOSTILE, LAYERS, evaluation, poison, write_large


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read it, never change it."""
    return write_folder(tmp_path_factory.mktemp("report") / "model")


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model")


def analysis(*linears: str) -> dict[str, Any]:
    """As `msquant analyze --json` prints it."""
    groups = [
        {
            "layer": int(linear.split(".")[2]),
            "group": linear.split(".")[-1],
            "linears": [linear],
            "scheme": "static",
            "error": 1e-3 * place,
            "dynamic_error": None,
            "share": 0.1 * place,
            "float_bytes": 1000,
        }
        for place, linear in enumerate(linears, 1)
    ]
    return {"error": 1.0, "output_bytes": 1, "groups": groups, "kept": []}


def test_a_folder_is_summed_up(folder: Path) -> None:
    report = collect(folder)
    assert (report.name, report.architecture, report.format) == ("model", "LlamaForCausalLM", "golden-stick")
    assert report.consumer == "the native backend of vLLM-MindSpore"
    assert report.checked
    assert report.findings == ()
    assert report.groups == ["qkv"]
    assert [layer.error for layer in report.layers] == [1e-3, 1e-3]
    assert report.verdict.level == "check"
    assert "not measured" in report.verdict.reason
    kinds = {row.kind: row for row in report.kinds}
    low, high = kinds["self_attn.q_proj"].static_range or (0, 0)
    assert 255 * 0.01 <= low <= high <= 255 * 0.1
    assert kinds["model.norm"].static_range is None
    assert json.loads(json.dumps(as_plain(report)))["size"]["parameters"] == report.size.parameters


def test_bytes_a_token_leave_out_what_it_does_not_use(folder: Path, large_folder: Path) -> None:
    dense = collect(folder)
    # The embedding is the output head too, so all of it is read.
    assert dense.reads is not None
    assert dense.reads.stored == dense.size.tensors
    experts = collect(large_folder)
    assert experts.reads is not None
    rows = {(row.kind, row.scheme): row for row in experts.kinds}
    table = rows["model.embed_tokens", "FLOAT"]
    routed = [row for row in experts.kinds if "experts.*" in row.kind and row.scheme != "FLOAT"]
    predicted = sum(
        row.nbytes for row in experts.kinds if row.kind in ("eh_proj", "enorm", "hnorm", "embed_tokens")
    )
    most = experts.size.tensors - predicted - table.nbytes * 19 / 20 - sum(row.nbytes for row in routed) / 3
    assert 0.4 * most < experts.reads.stored <= most


def test_experts_without_their_count_are_not_guessed(tmp_path: Path) -> None:
    large = write_large(tmp_path / "large")
    change_json(large / "config.json", lambda config: config.pop("num_experts_per_tok"))
    report = collect(large, check=False)
    assert report.reads is None
    assert "a token" not in markdown_page(report)


def test_a_large_manifest_is_shown_whole(large_folder: Path) -> None:
    report = collect(large_folder, check=False)
    assert len(report.layers) == LAYERS
    assert len(report.experts) == LAYERS - DENSE
    assert {len(row.tokens) for row in report.experts} == {EXPERTS}
    assert report.groups == ["q_kv_a", "q_b", "o", "gate_up", "down"]
    few = sum(row.few for row in report.experts)
    assert few > 0
    assert any(f"{few} experts" in remark for remark in report.verdict.remarks)
    assert report.ranking is not None
    noise = [row.noise for row in report.ranking.rows]
    assert noise == sorted(noise, reverse=True)
    assert len(noise) == LAYERS
    assert sum(row.share for row in report.ranking.rows) == pytest.approx(1)
    page = markdown_page(report)
    assert page.count("\n| q\\_b | ") == LAYERS
    worst = report.ranking.rows[0]
    assert f"| {worst.name} | {worst.snr:.1f} | {worst.noise:.2e} | {worst.share:.1%} |" in page


def test_the_page_and_the_tables_have_the_same_numbers(large_folder: Path, large: Path) -> None:
    report = collect(large_folder)
    numbers = re.compile(r"(?<![\w.#-])\d[\d,]*\.\d+(?:e-?\d+)?")
    page = re.sub(r"(?s)<style>.*?</style>|<svg.*?</svg>", "", large.read_text(encoding="utf-8"))
    cells = re.sub(r"<[^>]+>", " ", page)
    # The page says how many times less is read; the tables give both sizes.
    ratio = {f"{(report.reads.half / report.reads.stored):.2f}"} if report.reads else set()
    assert set(numbers.findall(cells)) - ratio <= set(numbers.findall(markdown_page(report)))


def test_an_older_manifest_is_enough(folder: Path) -> None:
    # It has no ranges, recipe, versions, evaluation, experts or clip ratios.
    report = collect(folder, check=False)
    for page in (html_page(report), markdown_page(report)):
        assert "Not recorded: nothing was smoothed, or an older version" in page
        assert "it holds no recipe" in page
    assert "Its weights were not checked against the format" in " ".join(report.verdict.remarks)


def test_no_manifest_is_enough(own: Path) -> None:
    (own / "msquant.json").unlink()
    report = collect(own)
    assert report.layers == ()
    assert report.ranking is None
    assert report.histograms
    page = html_page(report)
    assert "the folder has no msquant.json" in page
    assert "msquant analyze MODEL --json" in page


def test_equal_folders_give_equal_bytes(folder: Path) -> None:
    assert html_page(collect(folder, check=False)) == html_page(collect(folder, check=False))


def test_the_recipe_the_hashes_and_the_commands_are_there(own: Path) -> None:
    change_json(
        own / "msquant.json",
        lambda manifest: manifest.update(
            recipe={"model": "smollm2-135m", "quantization": {"algorithm": "osl"}},
            versions={"mindspore-gs": "1.4.1"},
            source={"sha256": "5" * 64, "shards": {"model.safetensors": 10**6}},
            calibration={"shape": [16, 128], "sha256": "6" * 64},
        ),
    )
    report = collect(own)
    assert report.size.source == 10**6
    for page in (html_page(report), markdown_page(report)):
        for text in ("osl", "1.4.1", "5" * 64, "6" * 64, "16 x 128", "1.0 MB"):
            assert text in page
        for file in report.files.values():
            assert file.sha256 in page
        assert "vllm-mindspore serve" in page
        assert "--quantization golden-stick" in page
        assert "msquant run --model" in page
        assert f"msquant serve --model {own}" in page


def test_an_analysis_ranks_the_matrices(folder: Path, tmp_path: Path) -> None:
    names = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
    write_json(tmp_path / "ranking.json", analysis(*names))
    report = collect(folder, sensitivity=tmp_path / "ranking.json", check=False)
    assert report.ranking is not None
    assert [row.name for row in report.ranking.rows] == ["layer 1 down_proj", "layer 0 q_proj"]
    assert report.ranking.origin == "ranking.json"
    assert "layer 1 down_proj" in html_page(report)
    row = "| layer 1 down\\_proj | 27.0 | 2.00e-03 | 66.7% | static | +1.0 kB |"
    assert row in markdown_page(report)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            analysis("model.layers.7.mlp.down_proj"),
            r"another model: there is no model\.layers\.7\.mlp\.down_proj",
        ),
        ({"groups": []}, "names no groups"),
        ({"groups": [{"layer": 0}]}, r"groups\.0\.group: Field required"),
        ({}, "groups: Field required"),
    ],
)
def test_an_analysis_that_does_not_fit_is_refused(
    folder: Path, tmp_path: Path, content: Any, message: str
) -> None:
    write_json(tmp_path / "ranking.json", content)
    with pytest.raises(CheckpointError, match=message) as caught:
        collect(folder, sensitivity=tmp_path / "ranking.json", check=False)
    assert "ranking.json" in str(caught.value.where)
    assert "msquant analyze MODEL --json" in str(caught.value.remedy)


def frontier(*linears: str) -> dict[str, Any]:
    return {
        "points": [
            {"bytes": 3_000_000, "kl": 0.0, "linears": {"FLOAT": 2}},
            {"bytes": 1_500_000, "kl": 0.0021, "linears": {"W8A16": 1, "W4A16_G64": 1}},
            {"bytes": 1_000_000, "kl": 0.03, "linears": {"W4A16_G64": 2}},
        ],
        "units": [{"linears": list(linears)}],
    }


def test_a_frontier_is_drawn_beside_the_folder(folder: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "frontier.json", frontier("model.layers.0.self_attn.q_proj"))
    report = collect(folder, frontier=tmp_path / "frontier.json", check=False)
    assert report.frontier is not None
    assert [row.nbytes for row in report.frontier.rows] == [1_000_000, 1_500_000, 3_000_000]
    page = html_page(report)
    for text in ('id="frontier"', "1.5 MB: KL 0.0021, 1 W8A16, 1 W4A16_G64", "From frontier.json"):
        assert text in page
    assert "| 1.0 MB | 3.00e-02 | 2 W4A16\\_G64 |" in markdown_page(report)
    assert 'id="frontier"' not in html_page(collect(folder, check=False))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (frontier("model.layers.7.mlp.up_proj"), r"another model: there is no model\.layers\.7\.mlp"),
        (frontier() | {"points": []}, "points"),
        (analysis("model.layers.0.self_attn.q_proj"), "points: Field required"),
        (frontier() | {"points": [{"bytes": 1, "kl": -1, "linears": {}}]}, r"points\.0\.kl"),
    ],
)
def test_a_frontier_that_does_not_fit_is_refused(
    folder: Path, tmp_path: Path, content: Any, message: str
) -> None:
    write_json(tmp_path / "frontier.json", content)
    with pytest.raises(CheckpointError, match=message) as caught:
        collect(folder, frontier=tmp_path / "frontier.json", check=False)
    assert "msquant analyze MODEL --frontier --json" in str(caught.value.remedy)


def test_what_was_measured_is_shown(own: Path) -> None:
    change_json(own / "msquant.json", lambda manifest: manifest.update(evaluation=evaluation()))
    page = markdown_page(collect(own, check=False))
    for text in ("0.0312", "15.08", "14.09", "91.3%", "88.7%", "2.30e-03", "prose"):
        assert text in page
    assert "limit" not in page


def test_next_tokens_stand_side_by_side(own: Path) -> None:
    change_json(own / "msquant.json", lambda manifest: manifest.update(evaluation=evaluation()))
    report = collect(own, check=False)
    page = html_page(report)
    assert page.count("16 of 24 the same") == 3
    assert page.count('<td class="other"> jumped</td>') == page.count('<td class="other"> jumps</td>') == 24
    assert "no model's choice is fed back" in html.unescape(page)
    assert "| \N{DOWNWARDS ARROW WITH CORNER LEFTWARDS} |  over |  over |" in markdown_page(report)


def test_limits_stand_beside_the_scores(own: Path) -> None:
    recipe = {"evaluation": {"max_kl": 0.15, "max_perplexity_increase": 0.2}}
    change_json(
        own / "msquant.json", lambda manifest: manifest.update(evaluation=evaluation(), recipe=recipe)
    )
    report = collect(own, check=False)
    # 14.09 in floating point, and a fifth of it.
    assert "| limit of the recipe, for all | | 16.91 | | 0.15 | | | |" in markdown_page(report)
    page = html_page(report)
    assert "<strong>KL 0.0312</strong>\n<span>limit 0.15</span>" in page
    assert "in floating point 14.09, limit 16.91" in page


def test_the_date_is_that_of_the_manifest(own: Path) -> None:
    os.utime(own / "msquant.json", (1.7e9, 1.7e9))
    report = collect(own, check=False)
    assert report.date == "2023-11-14"
    assert "Made on 2023-11-14, by the date of its msquant.json." in markdown_page(report)
    assert '<time datetime="2023-11-14">' in html_page(report)


def measured(own: Path, **changes: Any) -> ReportVerdict:
    change_json(
        own / "msquant.json", lambda manifest: manifest.update(evaluation={**evaluation(), **changes})
    )
    return collect(own).verdict


def test_a_result_within_its_limits_is_good(own: Path) -> None:
    verdict = measured(own)
    assert (verdict.level, verdict.remarks) == ("good", ())
    assert verdict.reason.startswith(
        "Its KL divergence from the float model is 0.0312, its perplexity +7.0%: within the recipe's limits."
    )


def test_a_result_beyond_a_limit_is_bad(own: Path) -> None:
    broken = [
        {"measure": "kl", "value": 0.12, "limit": 0.1},
        {"measure": "perplexity_increase", "value": 0.3, "limit": 0.1},
    ]
    layers = [{"index": index, "snr": 20.0, "own_snr": 50.0 - index} for index in range(6)]
    verdict = measured(own, beyond=broken, layers=layers)
    assert verdict.level == "bad"
    assert verdict.reason == "Its KL divergence from the float model is 0.12, the limit 0.1."
    assert verdict.remarks[0] == "Its perplexity is 30% above the float model's, the limit 10%."
    assert "Layers 5 (45.0 dB), 4 (46.0 dB), 3 (47.0 dB) add" in verdict.remarks[1]


def test_a_result_without_limits_is_to_be_looked_at(own: Path) -> None:
    verdict = measured(own, beyond=None)
    assert verdict.level == "check"
    assert verdict.reason.endswith("+7.0%, and no limit for that is recorded.")


def test_a_broken_contract_is_bad_whatever_was_measured(own: Path) -> None:
    change_tensors(own, {"model.layers.0.self_attn.q_proj.deq_scale": np.ones(16, np.int64)})
    verdict = collect(own).verdict
    assert verdict.level == "bad"
    assert "deq_scale" in verdict.reason
    assert "not measured" in verdict.remarks[0]


def test_a_layer_that_stands_out_is_named(own: Path) -> None:
    layers = [{"index": i, "snr": 20.0, "own_snr": 25.0 if i == 3 else 45.0} for i in range(6)]
    remarks = measured(own, layers=layers).remarks
    assert any(remark.startswith("Layer 3 (25.0 dB) adds more than 10 times") for remark in remarks)


def test_a_model_in_floating_point_is_said_to_be_one(tiny_llama: Path) -> None:
    report = collect(tiny_llama)
    assert report.format is None
    assert report.verdict.reason == "It is in floating point: nothing was quantized."
    assert "There are no integer weights" in html_page(report)


def test_hostile_names_are_no_markdown(own: Path) -> None:
    poison(own)
    page = markdown_page(collect(own, check=False))
    lines = [line for line in page.splitlines() if not line.startswith("    ")]
    assert not any("<script" in line or "<svg" in line or "](" in line for line in lines)
    tables = [line for line in lines if line.startswith("| ")]
    assert not any(re.search(r"(?<!\\)`", line) for line in tables)
    assert not any(character in page for character in "\x00\x1b")
    assert sum(line.startswith("# ") for line in lines) == 1
    assert len(HOSTILE) == 6


BROKEN: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "cannot be read as JSON"),
    "a list": ("[]", "an object is expected"),
    "layers that are none": ('{"layers": 3}', "layers: Input should be a valid list"),
    "an error that is a word": ('{"layers": [{"index": 0, "error": "x"}]}', r"layers\.0\.error"),
    "files that are none": ('{"files": FILES}', r"files\.model"),
    "a recipe that is none": ('{"recipe": []}', "recipe: Input should be a valid dictionary"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_manifest_is_refused(own: Path, case: str) -> None:
    content, message = BROKEN[case]
    # All of them, because a file that is not listed is refused before.
    files = json.dumps({path.name: 1 for path in own.iterdir()})
    (own / "msquant.json").write_text(content.replace("FILES", files))
    with pytest.raises(CheckpointError, match=message) as caught:
        collect(own, check=False)
    assert str(own / "msquant.json") in str(caught.value)


@pytest.mark.parametrize("section", ["quantization", "evaluation", "serving"])
@pytest.mark.parametrize("content", [3, [], {"min_expert_tokens": "x", "max_kl": []}])
def test_a_recipe_of_any_shape_is_shown(own: Path, section: str, content: Any) -> None:
    change_json(own / "msquant.json", lambda manifest: manifest.update(recipe={section: content}))
    report = collect(own, check=False)
    assert report.min_expert_tokens is None
    assert section in markdown_page(report)


@pytest.mark.parametrize("value", [1e300, -1e300, 10**99, 0, -1, 1e-300])
def test_numbers_of_any_size_can_be_drawn(own: Path, value: Any) -> None:
    ranges = {"median": value, "p99": value, "largest": value}
    group = {"name": "o", "alpha": value, "before": ranges, "after": ranges}
    layers = [{"index": 0, "error": value, "groups": [group]}, {"index": 1, "error": 1e-3}]
    change_json(own / "msquant.json", lambda manifest: manifest.update(layers=layers))
    report = collect(own, check=False)
    assert charts(replace(report, histograms=())).errors


def test_numbers_that_are_none_count_as_not_recorded(own: Path) -> None:
    text = '{"layers": [{"index": 0, "error": NaN, "groups": [{"name": "o", "alpha": Infinity}]}]}'
    (own / "msquant.json").write_text(text)
    report = collect(own, check=False)
    assert report.layers[0].error is None
    assert report.layers[0].groups[0].alpha is None
    assert "nan" not in re.sub(r"(?s)<svg.*?</svg>", "", html_page(report)).lower()


@pytest.mark.parametrize("check", [True, False])
def test_a_missing_shard_is_refused(own: Path, check: bool) -> None:
    next(own.glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match="missing") as caught:
        collect(own, check=check)
    assert "model-00002" in str(caught.value)


def test_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder"):
        collect(tmp_path / "nothing")


def test_files_are_not_replaced_unasked(own: Path, tmp_path: Path) -> None:
    target, _ = write_report(own, check=False)
    assert target == default_output(own) == tmp_path / "model-report.html"
    with pytest.raises(OutputError, match="exists already"):
        write_report(own, check=False)
    write_report(own, overwrite=True, check=False)
    assert write_report(own, format="markdown", check=False)[0].name == "model-report.md"
    with pytest.raises(OutputError, match="is a folder"):
        write_report(own, tmp_path, overwrite=True)
    with pytest.raises(OutputError, match="no such folder"):
        write_report(own, tmp_path / "nowhere" / "report.html")


def test_the_folder_keeps_its_contract(own: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in own.iterdir()}
    write_report(own)
    assert before == {path: path.stat().st_mtime_ns for path in own.iterdir()}


@pytest.mark.parametrize(
    ("name", "consumer", "options"),
    [("compressed-tensors", "vLLM", ""), ("ascend", "vllm-ascend", " --quantization ascend")],
)
def test_other_formats_are_reported_on_too(
    folder: Path, tmp_path: Path, name: Any, consumer: str, options: str
) -> None:
    other = export(folder, [name], output=tmp_path / "a b")[0].folder
    ours, theirs = collect(folder), collect(other)
    assert (theirs.format, theirs.consumer, theirs.findings) == (name, consumer, ())
    assert theirs.histograms == ours.histograms
    assert theirs.ranking == ours.ranking
    assert theirs.size.quantized == ours.size.quantized
    ranges = {row.kind: row.static_range for row in theirs.kinds}
    for row in ours.kinds:
        assert ranges[row.kind] == (row.static_range and pytest.approx(row.static_range, rel=1e-2))
    assert theirs.serving[0].lines == (f"vllm serve '{other}'{options}",)
    assert consumer in markdown_page(theirs)


def test_a_folder_of_another_tool_has_no_manifest(folder: Path, tmp_path: Path) -> None:
    other = export(folder, ["compressed-tensors"], output=tmp_path / "other")[0].folder
    (other / "msquant.json").unlink()
    report = collect(other)
    assert (report.format, report.layers) == ("compressed-tensors", ())
    assert len(report.histograms) == 7


def test_several_nodes_have_a_command_each(own: Path) -> None:
    serving = {"tensor_parallel_size": 16, "nodes": 2, "launcher": "ray"}
    change_json(own / "msquant.json", lambda manifest: manifest.update(recipe={"serving": serving}))
    lines = collect(own, check=False).serving[0].lines
    assert "# node 0, the head" in lines
    assert any(line.startswith("ray start --address=") for line in lines)
    assert any("--tensor-parallel-size 16" in line for line in lines)


def test_a_serving_section_that_is_not_valid_is_left_out(own: Path) -> None:
    change_json(own / "msquant.json", lambda manifest: manifest.update(recipe={"serving": {"x": 1}}))
    assert [command.what for command in collect(own, check=False).serving] == [
        "Serve it here, without an NPU",
        "Continue a prompt here",
    ]


@pytest.mark.parametrize(
    ("measure", "value", "limit", "text"),
    [
        ("kl", 0.1004, 0.1, "is 0.1004, the limit 0.1"),
        ("kl", 0.25, 0.1, "is 0.25, the limit 0.1"),
        ("perplexity_increase", 0.10004, 0.1, "is 10.004% above the float model's, the limit 10%"),
        ("other", 1.0000001, 1.0, "is 1.0000001, the limit 1"),
    ],
)
def test_a_value_and_its_limit_never_look_alike(measure: str, value: float, limit: float, text: str) -> None:
    assert text in beyond_limit(measure, value, limit)
