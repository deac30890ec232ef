"""On how many NPUs a model fits, against sums done by hand."""

from pathlib import Path

import pytest

from msquant.cli.console import as_serving
from msquant.hub.published import published_config
from msquant.inference.serving_need import LEAST_TOKENS, NPU_BYTES, RESERVED_BYTES, serving_need
from msquant.models.config import ModelConfig
from msquant.models.config_json import parse_config
from msquant.planning.quantization_plan import make_plan
from msquant.recipe.recipe import find_recipe
from msquant.schemes import C8

USABLE = int(0.9 * 64 * 2**30) - 2_000_000_000


def config_of(name: str) -> ModelConfig:
    raw = published_config(name)
    assert raw is not None
    return parse_config(raw, name)


def test_latent_attention_is_cached_whole_on_each() -> None:
    need = serving_need(config_of("deepseek-r1"), 365_440_000_000)
    assert need is not None
    assert (need.npus, need.npu_bytes) == (8, 64 * 2**30)
    assert need.weight_bytes == 45_680_000_000
    assert need.cache_bytes == USABLE - need.weight_bytes
    # 512 + 64 numbers of two bytes in each of 61 layers.
    assert need.cache_tokens == need.cache_bytes // (2 * 576 * 61)


def test_heads_are_shared_out() -> None:
    """Qwen3-235B: 94 layers of 4 heads of keys and as many of values, of 128 channels."""
    need = serving_need(config_of("qwen3-235b-a22b"), 236_000_000_000)
    assert need is not None
    assert need.npus == 8
    assert need.cache_tokens == need.cache_bytes // (2 * 94 * 2 * 1 * 128)
    two = serving_need(config_of("qwen3-235b-a22b"), 110_000_000_000)
    assert two is not None
    assert two.npus == 2
    assert two.cache_tokens == two.cache_bytes // (2 * 94 * 2 * 2 * 128)


def test_an_int8_cache_holds_twice_the_tokens() -> None:
    config = config_of("qwen3-8b")
    whole, half = serving_need(config, 8 * 10**9), serving_need(config, 8 * 10**9, C8)
    assert whole is not None
    assert half is not None
    assert whole.token_bytes == whole.float_token_bytes == half.float_token_bytes == 2 * 36 * 2 * 8 * 128
    assert half.token_bytes == whole.token_bytes // 2
    assert half.cache_tokens in (2 * whole.cache_tokens, 2 * whole.cache_tokens + 1)
    assert "73.7 kB a token instead of 147.5" in as_serving(half)
    assert "147.5 kB a token" in as_serving(whole)
    assert "instead" not in as_serving(whole)


def test_an_int8_latent_cache_keeps_rotated_channels_in_16_bits() -> None:
    """512 numbers of one byte and 64 of two, in each of 61 layers."""
    need = serving_need(config_of("deepseek-r1"), 365_440_000_000, C8)
    assert need is not None
    assert (need.token_bytes, need.float_token_bytes) == (61 * (512 + 2 * 64), 61 * 2 * 576)


def test_there_is_room_for_the_cache() -> None:
    """A byte more than leaves room for 32,768 tokens takes twice as many."""
    config = config_of("qwen3-8b")
    each = 2 * 36 * 2 * 8 * 128
    most = int(0.9 * NPU_BYTES) - RESERVED_BYTES - LEAST_TOKENS * each
    one, two = serving_need(config, most), serving_need(config, most + 1)
    assert one is not None
    assert two is not None
    assert (one.npus, one.cache_tokens) == (1, LEAST_TOKENS)
    assert two.npus == 2


def test_nothing_is_enough() -> None:
    assert serving_need(config_of("deepseek-r1"), 5 * 10**12) is None
    # 28 heads are shared out by four at most.
    assert serving_need(config_of("qwen2.5-7b-instruct"), 300 * 10**9) is None


def test_no_layer_that_keeps_keys_and_values() -> None:
    raw = published_config("qwen3-next-80b-a3b-instruct")
    assert raw is not None
    linear = raw | {"num_hidden_layers": 3, "layer_types": ["linear_attention"] * 3}
    assert serving_need(parse_config(linear, "linear"), 10**9) is None


@pytest.mark.parametrize(
    ("recipe", "npus"),
    [("deepseek-r1", 16), ("deepseek-r1-w4a8", 8), ("qwen3-235b-a22b-w4a8", 4), ("qwen3-32b-w4a16", 1)],
)
def test_the_plan_says_it(recipe: str, npus: int, tmp_path: Path) -> None:
    plan = make_plan(find_recipe(recipe), tmp_path / "out")
    assert plan.serving is not None
    assert plan.serving.npus == npus
    assert plan.serving.weight_bytes == pytest.approx(plan.output_bytes / npus, rel=1e-3)
