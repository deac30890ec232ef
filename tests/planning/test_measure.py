"""The time that is planned, against real runs, and the samples that it comes from."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from msquant.algorithms import make_algorithm
from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.errors import OutputError
from msquant.flows.pipeline import quantize
from msquant.flows.source import open_source, shapes_plans
from msquant.hub.published import HUB_IDS, published_config
from msquant.models.config import ModelConfig
from msquant.models.config_json import parse_config
from msquant.planning import measure, sample
from msquant.planning.blocks import LayerBlocks, weights_of
from msquant.planning.measure import Measured, Span
from msquant.planning.quantization_plan import make_plan
from msquant.planning.sample import sample_config, write_sample
from msquant.planning.work import Work
from msquant.progress import Part, Phase, Progress
from msquant.recipe.recipe import Recipe, find_recipe
from tests.fixtures.fp8 import to_fp8
from tests.fixtures.tiny_families import write_tiny

STAGE_OF: dict[Part, Phase] = {
    "attention": "layers",
    "layer": "layers",
    "evaluated layer": "evaluation",
    "head": "evaluation",
}


def timed_run(recipe: Recipe, output: Path) -> dict[Phase, Span]:
    """What the layers and their evaluation take in a real run: seconds of computing, and of time."""
    taken: dict[Phase, Span] = {"layers": Span(0, 0), "evaluation": Span(0, 0)}
    last = time.process_time(), time.perf_counter()

    def lap(part: Part) -> None:
        nonlocal last
        before, last = last, (time.process_time(), time.perf_counter())
        if part in STAGE_OF:
            taken[STAGE_OF[part]] += Span(last[0] - before[0], last[1] - before[1])

    quantize(recipe, output, progress=Progress(lap=lap))
    return taken


# The run must find the machine as busy as the measuring did, which other tests beside it do not leave it.
@pytest.mark.slow
@pytest.mark.parametrize("cut", [False, True])
def test_the_range_holds_a_real_run(cut: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Large enough for what depends on no size to be little.
    model = write_tiny(
        tmp_path / "model",
        "deepseek_v3",
        layers=3,
        dtype="bfloat16",
        hidden_size=256,
        intermediate_size=1024,
        moe_intermediate_size=128,
        num_attention_heads=16,
        num_key_value_heads=16,
    )
    recipe = find_recipe(str(model)).replace("calibration", samples=8, sequence_length=64)
    recipe = recipe.replace("evaluation", sequence_length=64)
    if cut:
        monkeypatch.setattr(sample, "MOST_WEIGHTS", 500_000)
        monkeypatch.setattr(sample, "MOST_EXPERT_WEIGHTS", 4 * 3 * 256 * 128)
        monkeypatch.setattr(measure, "MOST_TOKENS", 256)
    taken: list[Measured] = []

    def probe(config: ModelConfig, checkpoint: Checkpoint | None) -> Measured:
        found = measure.measure(recipe, config, tmp_path / "out", checkpoint)
        taken.append(found)
        return found

    plan = make_plan(recipe, tmp_path / "out", probe=probe)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert len(taken[0]._samples) == (3 if cut else 2)
    assert plan.seconds_by_stage is not None
    assert plan.seconds is not None
    assert plan.seconds == sum(plan.seconds_by_stage.values(), Span(0, 0))
    real = timed_run(recipe, tmp_path / "out")
    for stage, planned in plan.seconds_by_stage.items():
        if stage in real:
            assert planned.low <= real[stage].high
            assert real[stage].low <= planned.high
    assert plan.machine is not None
    assert plan.machine.share > 0


def test_what_the_samples_took_is_taken_apart() -> None:
    def seconds(work: Work) -> float:
        return 2 * work.pieces + 3e-3 * work.weights + 5e-6 * work.products

    works = [Work(4, 0, 0), Work(3, 500, 500 * 100), Work(3, 500, 500 * 200)]
    asked = Work(257, 90_000, 90_000 * 77)
    found = measure._scaled([Span(seconds(w), 2 * seconds(w)) for w in works], works, asked)
    assert found.low == pytest.approx(seconds(asked))
    assert found.high == pytest.approx(2 * seconds(asked))
    # Without a sample with fewer tokens, by weights; and never less than nothing.
    whole = [replace(works[0], pieces=1), works[2]]
    by_weights = measure._scaled([Span(2, 2), Span(12, 12)], whole, asked)
    assert by_weights.low == pytest.approx(257 * 2 + 6 / 500 * 90_000)
    slower = [Span(2, 2), Span(1, 1), Span(0.5, 0.5)]
    assert measure._scaled(slower, [replace(works[0], pieces=1), *works[1:]], asked).low == 257 * 2
    assert measure._scaled(slower, works, Work(0, 0, 0)) == Span(0, 0)


@pytest.mark.parametrize(
    "name", ["deepseek-r1", "qwen3-235b-a22b", "qwen2.5-7b-instruct", "deepseek-v2-lite"]
)
def test_a_sample_has_every_kind_of_layer_and_is_bounded(name: str) -> None:
    assert name in HUB_IDS
    config = parse_config(published_config(name) or {})
    policy = find_recipe(name).quantization
    cut, small = sample_config(config, policy), sample_config(config, policy, small=True)
    kinds = [config.has_experts(index) for index in sample.layer_kinds(config)]
    assert [cut.has_experts(index) for index in range(cut.num_hidden_layers)] == kinds
    assert cut.hidden_size == config.hidden_size
    assert cut.moe_intermediate_size == config.moe_intermediate_size
    for index in range(len(kinds)):
        blocks, least = (LayerBlocks(shape, policy, index) for shape in (cut, small))
        attention = sum(linear.size for group in blocks.groups for linear in group)
        assert attention < 4 * sample.MOST_WEIGHTS
        assert weights_of(blocks.streamed) <= 2 * sample.MOST_EXPERT_WEIGHTS
        assert weights_of([*least.searched, *least.streamed]) < 3_000_000


@pytest.mark.parametrize("name", ["deepseek-r1", "kimi-k2-instruct"])
def test_the_samples_of_a_model_that_many_npus_serve_can_be_planned(name: str) -> None:
    """They share the model's heads, of which a sample has fewer."""
    recipe = find_recipe(name)
    assert recipe.serving.tensor_parallel_size >= 8
    for each in measure._samples(recipe, parse_config(published_config(name) or {})):
        assert shapes_plans(each.recipe, each.config, ())


@pytest.mark.parametrize("name", ["deepseek-r1", "qwen2.5-7b-instruct"])
@pytest.mark.parametrize("size", [48, 128, 512])
def test_the_groups_of_a_policy_divide_what_is_cut(name: str, size: int) -> None:
    config = parse_config(published_config(name) or {})
    policy = make_algorithm(algorithm="rtn", schemes=[{"kv_b_proj": "FLOAT"}, {"*": f"W4A16_G{size}"}])
    for small in (False, True):
        cut = sample_config(config, policy, small=small)
        for index in range(cut.num_hidden_layers):
            for tensor, shape in cut.layer_shapes(index).items():
                # What groups do not divide in the model itself, they need not divide in a part of it.
                if len(shape) == 2 and config.shapes.get(tensor, shape)[1] % size == 0:
                    assert shape[1] % size == 0, (small, tensor, shape)


def test_a_small_model_is_its_own_sample(tiny_llama: Path) -> None:
    config = open_source(str(tiny_llama)).config
    cut = sample_config(config, make_algorithm())
    assert cut.layer_shapes(0) == config.layer_shapes(0)
    assert cut.num_hidden_layers == 1


def test_a_sample_holds_the_models_own_weights_as_they_are_stored(tmp_path: Path) -> None:
    plain = write_tiny(tmp_path / "plain", "deepseek_v3", layers=3, dtype="bfloat16")
    model = open_source(str(to_fp8(plain, tmp_path / "fp8", (32, 32))))
    cut = sample_config(model.config, make_algorithm(), small=True)
    (tmp_path / "sample").mkdir()
    write_sample(tmp_path / "sample", cut, model.config, model.checkpoint)
    written = open_source(str(tmp_path / "sample")).checkpoint
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    assert written.dtype(name) == "F8_E4M3"
    rows, columns = written.shape(name)
    expected = model.checkpoint.tensor(name)[:rows, :columns]
    assert np.abs(written.tensor(name) - expected).max() < 0.07 * np.abs(expected).max()
    assert written.dtype("model.layers.1.mlp.gate.e_score_correction_bias") == "F32"


def test_a_disk_that_cannot_be_written_is_named(tiny_llama: Path) -> None:
    source = open_source(str(tiny_llama))
    with pytest.raises(OutputError, match="/proc"):
        measure.measure(find_recipe(str(tiny_llama)), source.config, Path("/proc/out"), source.checkpoint)
    assert measure._read_rate(Checkpoint.open(tiny_llama)) > 1e3
