"""Rotary tables against the functions of transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from msquant.errors import ModelError
from msquant.models.config import ModelConfig
from msquant.models.config_json import read_config
from msquant.models.rope import rotary_tables
from tests.models.folders import with_config

SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 16,
}
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 512}
CASES: dict[str, dict[str, Any]] = {
    "default": {"max_position_embeddings": 8192},
    "theta": {"max_position_embeddings": 8192, "rope_theta": 500000.0},
    "linear": {"max_position_embeddings": 8192, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "dynamic": {"max_position_embeddings": 2048, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "yarn": {"max_position_embeddings": 8192, "rope_scaling": YARN},
    "yarn-betas": {
        "max_position_embeddings": 8192,
        "rope_scaling": YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    },
    "yarn-mscale": {
        "max_position_embeddings": 8192,
        "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
    },
    "yarn-attention-factor": {
        "max_position_embeddings": 8192,
        "rope_scaling": YARN | {"attention_factor": 0.8},
    },
    "llama3": {
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024,
        },
    },
}


def our_config(folder: Path, **settings: Any) -> ModelConfig:
    raw = {"model_type": "llama"} | SHAPE | settings
    (folder / "config.json").write_text(json.dumps(raw))
    return read_config(folder)


def reference(case: str, length: int) -> tuple[NDArray[np.float32], float]:
    """Inverse frequencies and attention factor for a sequence of `length` tokens."""
    config = LlamaConfig(**SHAPE, **CASES[case])
    kind = (config.rope_scaling or {}).get("rope_type", "default")
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
    return frequencies.numpy(), factor


@pytest.mark.parametrize("length", [2, 1000, 4096, 8192])
@pytest.mark.parametrize("case", CASES)
def test_tables_equal_transformers(case: str, length: int, tmp_path: Path) -> None:
    cos, sin = rotary_tables(our_config(tmp_path, **CASES[case]), 0, length)
    frequencies, factor = reference(case, length)
    assert cos.shape == sin.shape == (length, 128)
    assert cos.dtype == sin.dtype == np.float32
    np.testing.assert_array_equal(cos[:, :64], cos[:, 64:])
    np.testing.assert_array_equal(sin[:, :64], sin[:, 64:])
    # The angles at position 1 are the frequencies themselves.
    np.testing.assert_allclose(np.arctan2(sin[1, :64], cos[1, :64]), frequencies, rtol=1e-6)
    np.testing.assert_allclose(np.hypot(sin, cos), factor, rtol=1e-6)
    angles = np.outer(np.arange(length), frequencies.astype(np.float64))
    # A frequency's last bit times the position, and the rounding of the angle itself.
    atol = 3 * length * 2.0**-24 * factor + 1e-6
    np.testing.assert_allclose(cos[:, :64], np.cos(angles) * factor, rtol=0, atol=atol)
    np.testing.assert_allclose(sin[:, :64], np.sin(angles) * factor, rtol=0, atol=atol)


@pytest.mark.parametrize("case", [case for case in CASES if case != "dynamic"])
def test_tables_that_start_later_are_rows_of_the_whole(case: str, tmp_path: Path) -> None:
    config = our_config(tmp_path, **CASES[case])
    for whole, part in zip(rotary_tables(config, 0, 600), rotary_tables(config, 590, 10), strict=True):
        np.testing.assert_array_equal(part, whole[590:])


def test_dynamic_tables_depend_on_the_tokens_so_far(tmp_path: Path) -> None:
    config = our_config(tmp_path, **CASES["dynamic"])
    cos, _ = rotary_tables(config, 4095, 1)
    whole, _ = rotary_tables(config, 0, 4096)
    np.testing.assert_array_equal(cos[0], whole[4095])
    within, _ = rotary_tables(config, 0, 2048)
    plain, _ = rotary_tables(our_config(tmp_path, **CASES["default"]), 0, 2048)
    np.testing.assert_array_equal(within, plain)


def test_an_unknown_type_is_an_error_that_lists_the_known_ones(tiny_llama: Path, tmp_path: Path) -> None:
    scaling = {"rope_type": "spiral", "factor": 2.0}
    folder = with_config(tiny_llama, tmp_path / "model", rope_scaling=scaling)
    with pytest.raises(ModelError, match="'spiral' is not supported") as caught:
        rotary_tables(read_config(folder), 0, 4)
    assert caught.value.remedy == "supported types: default, linear, dynamic, yarn, llama3"
