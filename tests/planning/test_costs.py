"""Counts of work agree with what the code does."""

from pathlib import Path
from typing import Any

import pytest

from msquant.checkpoint.float_rows import FloatRows
from msquant.hub.published import published_config
from msquant.models.config_json import parse_config
from msquant.pipeline import MEMORY_BUDGET, quantize
from msquant.planning.blocks import LayerBlocks, Tokens
from msquant.planning.costs import carried_work, feed_forward_rounds, layer_work
from msquant.planning.search_costs import HELD_OUT_TOKENS, PER_TOKEN_PARTS, SEARCH_TOKENS, STATIC_PARTS
from msquant.planning.work import Rates, Work
from msquant.quantization import feed_forward, held_out, osl, quantizer
from msquant.quantization.clip import SEARCH_TOKENS as CLIP_TOKENS
from msquant.recipes import find_recipe
from msquant.source import BATCH_TOKENS, open_source
from tests.fixtures.tiny_families import write_tiny

SAMPLES, LENGTH = 12, 128


class Counts:
    """What a real run did, by wrapping the functions that do it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read = self.quantized = self.losses = 0
        read, quantize_weight, loss = FloatRows._read, quantizer.quantize_weight, osl._GroupLoss.__call__

        def counted_read(rows: FloatRows, ranges: Any) -> Any:
            values = read(rows, ranges)
            if rows._name.startswith("model.layers."):
                self.read += values.size * rows._dtype.itemsize
            return values

        def counted_quantize(weight: Any, dtype: str = "float32") -> Any:
            self.quantized += weight.size
            return quantize_weight(weight, dtype)

        def counted_loss(group: Any, alpha: float, index: int) -> float:
            self.losses += 1
            return loss(group, alpha, index)

        monkeypatch.setattr(FloatRows, "_read", counted_read)
        for module in (quantizer, feed_forward):
            monkeypatch.setattr(module, "quantize_weight", counted_quantize)
        monkeypatch.setattr(osl._GroupLoss, "__call__", counted_loss)


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
def test_reading_and_rounding_are_counted_as_they_happen(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny(tmp_path / "model", model_type, dtype="bfloat16")
    grid = [0.3, 0.5, 0.7, 0.9]
    recipe = find_recipe(str(folder)).replace("quantization", algorithm="osl", smooth_alpha=grid)
    recipe = recipe.replace("calibration", samples=SAMPLES, sequence_length=LENGTH)
    # The evaluation at the end reads the model once more: that is counted apart.
    recipe = recipe.replace("evaluation", sequences=0)
    tokens = Tokens(SAMPLES, LENGTH, BATCH_TOKENS // LENGTH)
    source = open_source(str(folder))
    config, total = source.config, Work()
    groups = 0
    for index in range(config.num_hidden_layers):
        blocks = LayerBlocks(config, recipe.quantization, index)
        groups += sum(group[0].scheme == "static" for group in blocks.groups)
        stored = {name: source.checkpoint.nbytes(name) for name in config.layer_shapes(index)}
        total += layer_work(blocks, tokens, stored, 0, MEMORY_BUDGET)
    counts = Counts(monkeypatch)
    quantize(recipe, tmp_path / "out")
    # The norm and the router of a feed-forward block are small.
    assert counts.read == pytest.approx(total.read, rel=0.02)
    assert counts.quantized == total.quantized
    assert 4 * groups < counts.losses <= 4 * groups * tokens.batches


def test_a_dense_layer_by_hand() -> None:
    config = parse_config(published_config("llama-3.1-8b") or {})
    recipe = find_recipe("llama-3.1-8b").replace("quantization", algorithm="osl")
    tokens = Tokens(4, 128, 4)
    names = config.layer_shapes(0)
    work = layer_work(LayerBlocks(config, recipe.quantization, 0), tokens, dict.fromkeys(names, 10), 7, 1)
    weights = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert work.read == 10 * len(names)
    assert work.written == 7
    assert work.quantized == weights
    # 20 candidates of every group in one batch, and 10 ratios of every linear.
    assert work.rounded == (20 + 10) * weights
    down = 4096 * 14336
    steps = weights + (weights - 4096**2 - 2 * 4096 * 1024) + 3 * down + down
    clip = 10 * 2 * weights * 512
    assert work.products == 4 * 2 * 512 * weights + 20 * 2 * 512 * steps + clip + 2 * 512 * weights


def test_experts_are_read_twice_and_again_for_every_round() -> None:
    config = parse_config(published_config("deepseek-r1") or {})
    policy = find_recipe("deepseek-r1").quantization
    dense, experts = LayerBlocks(config, policy, 0), LayerBlocks(config, policy, 3)
    assert list(dense.inner) == ["mlp"]
    assert len(experts.inner) == 257
    tokens = Tokens(32, 512, 1)
    assert feed_forward_rounds(config, tokens, 1 << 40) == 1
    batch = 3 * 4 * 512 * 7168
    assert feed_forward_rounds(config, tokens, 8 * batch) == 4
    assert feed_forward_rounds(config, tokens, 1) == 32
    stored = dict.fromkeys(config.layer_shapes(3), 1)
    inner = sum(".mlp." in name for name in stored)
    once = layer_work(experts, tokens, stored, 0, 1 << 40)
    assert once.read == len(stored) + inner
    four = layer_work(experts, tokens, stored, 0, 8 * batch)
    assert four.read == len(stored) + 4 * inner
    assert four.products == once.products


def test_work_adds_up_and_rates_divide() -> None:
    assert Work(read=1, seconds=2) + Work(read=3, written=4) == Work(read=4, seconds=2, written=4)
    rates = Rates(*(2.0,) * 9)
    assert rates.seconds(Work(read=4, products=6, seconds=1)) == 6
    assert rates.parts(Work(written=3))["written"] == 1.5
    assert carried_work(10, [(2, 3), (4,)], 20) == Work(read=10, converted=20, written=20)


def test_the_searches_keep_as_many_inputs() -> None:
    assert SEARCH_TOKENS == CLIP_TOKENS
    assert HELD_OUT_TOKENS == held_out.SEARCH_TOKENS
    assert (STATIC_PARTS, PER_TOKEN_PARTS) == (held_out.STATIC_PARTS, held_out.PER_TOKEN_PARTS)


@pytest.mark.parametrize(("dynamic", "parts"), [((), 2), (("proj",), 4)])
def test_the_held_out_search_by_hand(dynamic: tuple[str, ...], parts: int) -> None:
    config = parse_config(published_config("llama-3.1-8b") or {})
    recipe = find_recipe("llama-3.1-8b").replace("quantization", algorithm="osl-robust", dynamic=dynamic)
    tokens = Tokens(16, 128, 1)
    names = config.layer_shapes(0)
    work = layer_work(LayerBlocks(config, recipe.quantization, 0), tokens, dict.fromkeys(names, 0), 0, 1)
    weights = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    # 20 alphas and 4 more floors, twice, each with the ranges of every part.
    assert work.rounded == 28 * parts * weights
    assert work.products == (4 * 2 * 2048 + 29 * 2 * 1024 + 2 * 128) * weights


@pytest.mark.parametrize("algorithm", ["smoothquant", "rtn"])
def test_what_is_not_searched_costs_no_search(algorithm: str) -> None:
    config = parse_config(published_config("llama-3.1-8b") or {})
    recipe = find_recipe("llama-3.1-8b").replace("quantization", algorithm=algorithm)
    names = config.layer_shapes(0)
    blocks = LayerBlocks(config, recipe.quantization, 0)
    work = layer_work(blocks, Tokens(16, 128, 1), dict.fromkeys(names, 0), 0, 1)
    assert work.rounded == work.inputs == 0
    assert Tokens(5, 128, 4).batches == 2
    assert Tokens(5, 128, 4).first == 512
