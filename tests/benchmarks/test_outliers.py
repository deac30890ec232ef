"""Outlier channels: the same logits from other weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.dynamic_int8 import round_to_nearest, smooth_quant
from benchmarks.outliers import Outliers, add_outliers
from tests.fixtures.tiny_families import write_tiny
from tests.fixtures.torch_simulation import relative_mse

TOKENS = torch.arange(48).view(2, 24)


def tiny(tmp_path: Path, model_type: str = "deepseek_v3") -> Any:
    folder = write_tiny(tmp_path / "model", model_type)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any) -> Any:
    with torch.inference_mode():
        return model(TOKENS).logits


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe", "qwen3", "qwen3_moe", "qwen3_next"])
def test_the_logits_stay_and_every_place_has_outliers(tmp_path: Path, model_type: str) -> None:
    model = tiny(tmp_path, model_type)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    expected = logits(model)
    add_outliers(model, Outliers(share=0.05, least=4.0, attention=30.0, feed_forward=30.0, inner=20.0))
    assert float((logits(model) - expected).abs().max() / expected.abs().max()) < 1e-5
    changed = {
        name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])
    }
    kept = ("embed_tokens.weight", "lm_head.weight", "model.norm.weight", "q_norm.weight", "k_norm.weight")
    kept += ("q_proj.bias", "k_proj.bias")
    # Of the delta rule, what no outlier passes through.
    kept += ("A_log", "conv1d.weight", "dt_bias")
    assert changed == {name for name in before if not name.endswith(kept)}
    norm = "model.layers.1.input_layernorm.weight"
    # Qwen3-Next's norms add 1 to what they store.
    added = float(model_type == "qwen3_next")
    factors = (model.get_parameter(norm).detach() + added) / (before[norm] + added)
    assert int((factors > 3.99).sum()) == 3
    assert float(factors.max()) <= 30.0


def test_outliers_make_rounding_worse_and_smoothing_repairs_some_of_it(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    plain = relative_mse(round_to_nearest(model), model, TOKENS)
    add_outliers(model, Outliers(least=4.0, attention=64.0, feed_forward=64.0, inner=4.0))
    rounded = relative_mse(round_to_nearest(model), model, TOKENS)
    smooth = smooth_quant(model, TOKENS, feed_forward=True)
    torch.testing.assert_close(logits(smooth), logits(model), rtol=1e-4, atol=1e-4)
    assert 0 < plain < rounded
    assert relative_mse(round_to_nearest(smooth), model, TOKENS) < rounded
