"""A plan says what `quantize` then does: the same bytes, and no file of either where it does not fit."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from math import prod
from pathlib import Path

import pytest

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.disk import shown_sizes
from msquant.errors import CheckpointError, EngineError, ModelError, OutputError, RecipeError
from msquant.flows.pipeline import quantize
from msquant.hub.published import published_bytes, published_config
from msquant.models.config import ModelConfig
from msquant.models.config_json import parse_config
from msquant.planning.measure import SPREAD, Machine, Measured, Sample, Span
from msquant.planning.quantization_plan import Plan, make_plan
from msquant.planning.sample import sample_config
from msquant.progress import Part
from msquant.recipe.recipe import Recipe, find_recipe
from tests.fixtures.fp8 import to_fp8
from tests.fixtures.policies import rules
from tests.fixtures.tiny_families import SETTINGS, write_tiny


def short_recipe(model: Path | str, **calibration: object) -> Recipe:
    """The recipe of a model with a coarse grid and few tokens."""
    recipe = find_recipe(str(model)).replace("quantization", smooth_alpha=[0.5])
    return recipe.replace("calibration", **({"samples": 2, "sequence_length": 16} | calibration))


def shard_sizes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def check_against_the_result(folder: Path, tmp_path: Path) -> Plan:
    recipe = short_recipe(folder)
    plan = make_plan(recipe, tmp_path / "out")
    assert list(tmp_path.glob("out*")) == []
    result = quantize(recipe, tmp_path / "out")
    assert plan.output_bytes == shard_sizes(tmp_path / "out")
    assert plan.output_bytes == sum(part.output_bytes for part in plan.parts)
    assert plan.source_bytes == result.source_bytes
    layers = [part for part in plan.parts if part.kind in ("dense", "experts")]
    assert [layer.index for layer in layers] == [record["index"] for record in result.layers]
    assert [layer.kind == "experts" for layer in layers] == ["experts" in r for r in result.layers]
    return plan


@pytest.mark.parametrize("model_type", sorted(SETTINGS))
def test_the_planned_size_is_that_of_the_written_shards(model_type: str, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", model_type, dtype="bfloat16", max_shard_size="100KB")
    plan = check_against_the_result(folder, tmp_path)
    assert plan.architecture == model_type
    assert plan.stored == "bfloat16"
    assert plan.problems == ()


def test_int8_weights_alone_are_planned(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", "llama", dtype="bfloat16")
    recipe = short_recipe(folder).replace("quantization", schemes=rules(weight_only=["down_proj"]))
    recipe = recipe.model_copy(update={"format": "ascend"})
    plan = make_plan(recipe, tmp_path / "out")
    quantize(recipe, tmp_path / "out")
    assert plan.output_bytes == shard_sizes(tmp_path / "out")
    assert plan.parts[0].linears == {"W8A8": 6, "W8A16": 1}


def test_an_fp8_source_with_a_prediction_layer(tmp_path: Path) -> None:
    plain = write_tiny(tmp_path / "plain", "deepseek_v3", dtype="bfloat16", prediction_layers=1)
    folder = to_fp8(plain, tmp_path / "fp8", (32, 32))
    plan = check_against_the_result(folder, tmp_path)
    assert [part.kind for part in plan.parts] == ["dense", "experts", "prediction", "ends"]
    assert plan.stored == "FP8 in blocks of 32 x 32"
    assert plan.parts[1].linears == {"W8A8": 4, "FLOAT": 1, "W8A8_DYNAMIC": 3 * (8 + 1)}
    assert plan.parts[2].linears == {}


def test_rounding_by_inputs_takes_memory_for_them(tiny_llama: Path, tmp_path: Path) -> None:
    """Inputs of all linears, of which none has a static scale to be recorded for, and their moments."""
    recipe = short_recipe(tiny_llama).adjusted(scheme="W4A16_G32", formats="compressed-tensors")
    peaks = [make_plan(recipe.adjusted(algo=algo), tmp_path / "out").peak_memory for algo in ("rtn", "gptq")]
    config = json.loads((tiny_llama / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    tokens = recipe.calibration.total * recipe.calibration.sequence_length
    least = 4 * (tokens * (6 * hidden + inner) + 5 * max(hidden, inner) ** 2)
    assert least <= peaks[1] - peaks[0] < 2 * least


def test_a_model_that_writes_its_own_calibration_text_has_to_fit_whole(tmp_path: Path) -> None:
    config = published_config("deepseek-r1")
    assert config is not None
    shapes = parse_config(config, "config.json").shapes
    recipe = find_recipe("deepseek-r1").adjusted(calibration=["builtin", "self=4"])
    plan = make_plan(recipe, tmp_path / "out")
    # Its embedding, which is not the output head, is read by rows.
    whole = 4 * (sum(map(prod, shapes.values())) - prod(shapes["model.embed_tokens.weight"]))
    assert whole < plan.peak_memory < 1.01 * whole
    assert re.search(r"TB are needed for the model to write .*; use other sources", plan.problems[-1])
    assert "is not in the estimate" in plan.notes[-1]


def test_deepseek_r1_is_planned_from_its_published_config(tmp_path: Path) -> None:
    plan = make_plan(find_recipe("deepseek-r1"), tmp_path / "out")
    # The first one imported transformers; the fastest of the others waited least for a busy machine's memory.
    seconds = []
    for _ in range(3):
        started = time.process_time()
        make_plan(find_recipe("deepseek-r1"), tmp_path / "out")
        seconds.append(time.process_time() - started)
    assert min(seconds) < 5
    kinds = [part.kind for part in plan.parts]
    assert kinds == ["dense"] * 3 + ["experts"] * 58 + ["prediction", "ends"]
    assert plan.parts[3].linears == {"W8A8": 4, "FLOAT": 1, "W8A8_DYNAMIC": 3 * 257}
    assert plan.parts[0].linears == {"W8A8": 4, "FLOAT": 1, "W8A8_DYNAMIC": 3}
    # 671 billion, as its makers publish them, and 14 in the prediction layer with copies of the two ends.
    prediction = plan.parts[61].parameters
    assert plan.parameters - prediction == pytest.approx(671e9, rel=1e-3)
    # Published: 688.6 GB; the prediction layer and kv_b_proj grow from FP8 to bfloat16.
    assert plan.source_bytes == pytest.approx(688.6e9, rel=1e-3)
    assert 690e9 < plan.output_bytes < 705e9
    assert plan.source is None
    assert "published config.json alone" in plan.notes[0]
    assert plan.seconds is None


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "llama-3.1-8b", "deepseek-v2-lite", "qwen2.5-7b-instruct"])
def test_published_models_are_planned_without_weights(name: str, tmp_path: Path) -> None:
    plan = make_plan(find_recipe(name), tmp_path / "out")
    assert plan.source_bytes == published_bytes(name)
    assert 0.45 < plan.output_bytes / plan.source_bytes < 0.65


def test_r1_with_int4_experts_fits_eight_npus(tmp_path: Path) -> None:
    recipe = find_recipe("deepseek-r1-w4a8")
    plan = make_plan(recipe, tmp_path / "out")
    assert plan.output_bytes < 380e9
    assert plan.variant == "ascendV1"
    experts = next(part for part in plan.parts if part.kind == "experts")
    assert experts.linears == {"FLOAT": 1, "W8A8_DYNAMIC": 7, "W4A8_DYNAMIC": 768}
    (prediction,) = (part for part in plan.parts if part.kind == "prediction")
    assert prediction.linears == experts.linears
    # Embedding, head and what joins the two inputs in bfloat16.
    around = 2 * (2 * 129_280 * 7168 + 2 * 7168 * 7168)
    assert prediction.output_bytes - experts.output_bytes == pytest.approx(around, rel=1e-3)
    others = {
        word: make_plan(recipe.model_copy(update={"prediction_layers": word}), tmp_path / "out").output_bytes
        for word in ("float", "none")
    }
    assert plan.output_bytes - others["none"] == prediction.output_bytes
    assert others["float"] - others["none"] == pytest.approx(26.9e9, rel=1e-2)


def test_r1s_prediction_layer_is_quantized_for_vllm_ascend(tmp_path: Path) -> None:
    recipe = find_recipe("deepseek-r1")
    kept = make_plan(recipe, tmp_path / "out")
    assert "model.layers.61, which predicts a further token, stays in floating point" in kept.notes[1]
    plan = make_plan(recipe.adjusted(formats="ascend"), tmp_path / "out")
    experts, prediction = (next(p for p in plan.parts if p.kind == k) for k in ("experts", "prediction"))
    assert prediction.linears == experts.linears
    assert kept.output_bytes - plan.output_bytes == pytest.approx(11.5e9, rel=1e-2)
    assert plan.output_bytes < 691e9


def test_qwen3_with_int4_experts(tmp_path: Path) -> None:
    eight, four = (make_plan(find_recipe(f"qwen3-30b-a3b{end}"), tmp_path / "out") for end in ("", "-w4a8"))
    # 48 layers of 128 experts with three matrices of 768 x 2048, half a byte each, less the added scale_bias.
    saved = 48 * 128 * (3 * 768 * 2048 // 2 - 4 * (2 * 768 + 16 * 2048))
    assert eight.output_bytes - four.output_bytes == pytest.approx(saved, rel=1e-3)


@pytest.mark.parametrize(
    ("scheme", "group_size", "problem", "remedy"),
    [
        ("W4A16", 96, "groups of 96 do not divide its 4096 inputs", "256, 128, 64 or 32 fit: W4A16_G256"),
        ("W4A8_DYNAMIC", 100, "groups of 100 do not divide its 4096 inputs", "W4A8_DYNAMIC_G256"),
    ],
)
def test_groups_that_do_not_divide_are_refused_with_those_that_fit(
    scheme: str, group_size: int, problem: str, remedy: str, tmp_path: Path
) -> None:
    recipe = find_recipe("qwen3-8b").adjusted(
        scheme=scheme, group_size=group_size, formats="compressed-tensors"
    )
    with pytest.raises(RecipeError) as caught:
        make_plan(recipe, tmp_path / "out")
    assert problem in str(caught.value)
    assert remedy in str(caught.value.remedy)


def test_planning_does_not_load_mindspore(tiny_llama: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from msquant.planning.quantization_plan import make_plan; "
        "from msquant.recipe.recipe import find_recipe; "
        "make_plan(find_recipe(sys.argv[1]), Path(sys.argv[2])); print('mindspore' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tiny_llama), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "False\n", done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_told_with_both_numbers(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = short_recipe(tiny_llama)
    fitting = make_plan(recipe, tmp_path / "out")
    assert fitting.problems == ()
    monkeypatch.setattr("msquant.planning.quantization_plan.free_bytes", lambda path: fitting.disk_bytes - 1)
    monkeypatch.setattr("msquant.planning.quantization_plan.available_memory", lambda: 1_000)
    disk, memory = make_plan(recipe, tmp_path / "out").problems
    for word in ("disk", *shown_sizes(fitting.disk_bytes, fitting.disk_bytes - 1), "--output"):
        assert word in disk
    for word in ("memory", *shown_sizes(fitting.peak_memory, 1000), "--samples"):
        assert word in memory
    monkeypatch.setattr("msquant.planning.quantization_plan.free_bytes", lambda path: fitting.disk_bytes)
    monkeypatch.setattr("msquant.planning.quantization_plan.available_memory", lambda: None)
    assert make_plan(recipe, tmp_path / "out").problems == ()


def test_quantize_refuses_before_it_starts(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = short_recipe(tiny_llama)
    needed = make_plan(recipe, tmp_path / "out").disk_bytes
    monkeypatch.setattr("msquant.checkpoint.disk.free_bytes", lambda path: needed - 1)
    left, wanted = map(re.escape, shown_sizes(needed - 1, needed))
    assert left != wanted
    with pytest.raises(OutputError, match=f"{left} are free on its disk, {wanted} are needed"):
        quantize(recipe, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("msquant.checkpoint.disk.free_bytes", lambda path: needed)
    assert quantize(recipe, tmp_path / "out").folder.is_dir()


def measured(recipe: Recipe, config: ModelConfig) -> Measured:
    """A machine that takes 2 seconds for a sample's layer, half of them to wait, and reads 1 GB/s."""
    once: dict[Part, Span] = {
        "start": Span(5, 10),
        "ends": Span(1, 2),
        "head": Span(1, 2),
        "export": Span(1, 2),
    }
    samples = [
        Sample(
            sample_config(config, recipe.quantization, small=small),
            recipe,
            [Span(seconds, 2 * seconds)] * 2,
            [Span(seconds, 2 * seconds)] * 2,
            [Span(seconds, 2 * seconds)] * 2,
            once,
        )
        for small, seconds in ((True, 0.0), (False, 1.0))
    ]
    return Measured(recipe, config, samples, Machine(2, 1.0, 0.5), 1e9)


def test_workers_share_what_is_played_through(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", "deepseek_v3", layers=4, dtype="bfloat16")
    recipe = short_recipe(folder)

    def planned(workers: int, node_cores: int | None = None, *, probed: bool = True) -> Plan:
        probe = (lambda config, _: measured(recipe, config)) if probed else None
        return make_plan(recipe, tmp_path / "out", probe=probe, workers=workers, node_cores=node_cores)

    alone, two, many = planned(1), planned(2), planned(8, 4)
    assert alone.timelines is None
    assert alone.shared_bytes is None
    assert two.timelines is not None
    assert many.timelines is not None
    assert two.seconds_by_stage is not None
    assert two.seconds_by_stage["layers"] == Span(*(line.seconds for line in two.timelines))
    # Busy workers of this machine are slower than those of others.
    assert many.timelines[1].seconds < two.timelines[1].seconds
    for line in two.timelines:
        assert line.seconds >= max(line.chain_seconds, line.computing)
        assert {"experts", "combine"} <= line.chain.keys()
    # Every weight is read twice, and every shard written once; the rest is hidden states.
    weights = sum(2 * part.source_bytes + part.output_bytes for part in two.parts if part.kind != "ends")
    assert two.shared_bytes is not None
    assert weights / 2 < two.shared_bytes < 3 * weights
    unmeasured = planned(2, probed=False)
    assert (unmeasured.shared_bytes, unmeasured.timelines) == (two.shared_bytes, None)
    assert two.scratch_bytes > alone.scratch_bytes
    with pytest.raises(EngineError, match="--node-cores"):
        planned(1, 4)


def test_time_covers_everything_to_the_end(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = short_recipe(tiny_llama).adjusted(formats="golden-stick,compressed-tensors")
    asked: list[Checkpoint | None] = []

    def probe(config: ModelConfig, checkpoint: Checkpoint | None) -> Measured:
        asked.append(checkpoint)
        return measured(recipe, config)

    plan = make_plan(recipe, tmp_path / "out", probe=probe)
    assert plan.seconds_by_stage is not None
    highs = {stage: time.high / SPREAD for stage, time in plan.seconds_by_stage.items()}
    lows = {stage: time.low * SPREAD for stage, time in plan.seconds_by_stage.items()}
    # Two layers like the sample's, its head and its ends, and what reading takes beside them.
    expected = {"start": 10, "layers": 2 * 2, "ends": 2, "evaluation": 2 * 2 + 2}
    # The sample has one of the two layers.
    assert 2 < highs.pop("formats") < 4
    assert 1 < lows.pop("formats") < 2
    assert highs == pytest.approx(expected, rel=1e-2)
    assert lows == pytest.approx({stage: time / 2 for stage, time in expected.items()}, rel=1e-2)
    assert plan.seconds == sum(plan.seconds_by_stage.values(), Span(0, 0))
    assert plan.parts[0].seconds is not None
    assert plan.parts[0].seconds + plan.parts[1].seconds == plan.seconds_by_stage["layers"]
    assert plan.machine == Machine(2, 1.0, 0.5)
    assert isinstance(asked[0], Checkpoint)
    without = recipe.replace("evaluation", sequences=0)
    plan = make_plan(without, tmp_path / "out", probe=lambda config, _: measured(without, config))
    assert plan.seconds_by_stage is not None
    assert plan.seconds_by_stage["evaluation"] == Span(0, 0)


def test_a_large_model_takes_longer_by_its_work(tmp_path: Path) -> None:
    recipe = find_recipe("llama-3.1-8b")
    plan = make_plan(recipe, tmp_path / "out", probe=lambda config, _: measured(recipe, config))
    layer = plan.parts[0].seconds
    assert layer is not None
    cut = sample_config(parse_config(published_config("llama-3.1-8b") or {}), recipe.quantization)
    weights, kept = (
        sum(prod(shape) for shape in shapes.values() if len(shape) == 2)
        for shapes in (
            parse_config(published_config("llama-3.1-8b") or {}).layer_shapes(0),
            cut.layer_shapes(0),
        )
    )
    assert weights > 10 * kept
    disk = plan.parts[0].source_bytes / 1e9
    assert layer.low == pytest.approx(weights / kept / SPREAD + disk)
    assert layer.high == pytest.approx(2 * weights / kept * SPREAD + 3 * disk)


def test_where_no_time_can_be_estimated_the_plan_says_why(tiny_llama: Path, tmp_path: Path) -> None:
    def full(*of: object) -> Measured:
        raise OutputError("the disk is full")

    plan = make_plan(short_recipe(tiny_llama), tmp_path / "out", probe=full)
    assert plan.seconds is None
    assert "the disk is full" in plan.notes[0]


def test_a_bad_model_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    shard = model / "model.safetensors"
    recipe = short_recipe(tiny_llama)
    os.truncate(shard, 100)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*bytes"):
        make_plan(recipe, tmp_path / "out", source=str(model))
    shard.write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="header"):
        make_plan(recipe, tmp_path / "out", source=str(model))
    # A folder that was named is never replaced by the published config.
    with pytest.raises(ModelError, match=r"config\.json"):
        make_plan(find_recipe("deepseek-r1"), tmp_path / "out", source=str(tmp_path))
    with pytest.raises(ModelError, match="not on this machine"):
        make_plan(recipe.model_copy(update={"model": "nobody/no-such-model"}), tmp_path / "out")
    with pytest.raises(RecipeError, match="cannot serve this"):
        make_plan(
            find_recipe("deepseek-r1").replace("quantization", schemes=rules(dynamic=["self_attn."])),
            tmp_path / "out",
        )
