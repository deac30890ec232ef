"""Tiny models of every family, quantized by round to nearest in all the schemes that their format has."""

from pathlib import Path
from unittest.mock import patch

from msquant.flows.pipeline import quantize
from msquant.recipe.recipe import validate_recipe
from tests.fixtures.policies import rules
from tests.fixtures.tiny_families import write_tiny

POLICIES: dict[str, dict[str, object]] = {
    # Static, with one matrix left in floating point.
    "llama": {"schemes": rules(skip=["lm_head", "model.layers.1.mlp.down_proj"])},
    "qwen2": {"schemes": rules()},
    # Static attention, experts by token.
    "qwen3_moe": {"schemes": rules(dynamic=["mlp."])},
    "deepseek_v3": {"schemes": rules(skip=["lm_head", "kv_b_proj"], dynamic=["mlp."])},
}
DEINTERLEAVED = {"deepseek_v3"}


def write_both(folder: Path, family: str) -> tuple[Path, Path]:
    """The float and the quantized folder of a family."""
    source = write_tiny(folder / "float", family, dtype="bfloat16")
    recipe = validate_recipe(
        {
            "model": str(source),
            "quantization": {"algorithm": "rtn", **POLICIES[family]},
            "calibration": {"samples": 2, "sequence_length": 32},
        },
        "test",
    )
    # No server runs a Qwen3-MoE of this format, and the simulation reads no other.
    with patch("msquant.flows.source.require_target"):
        return source, quantize(recipe, folder / "quantized").folder
