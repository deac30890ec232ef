"""Decoder layers: their steps, and weights that do not fit `config.json`."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mindspore import Tensor
from safetensors.numpy import load_file, save_file

from msquant.checkpoint.reader import Checkpoint
from msquant.errors import CheckpointError
from msquant.models.config import ModelConfig
from msquant.models.layers import DecoderLayer, positions
from msquant.models.network import CausalLM
from tests.fixtures.tiny_model import write_tiny_llama
from tests.models.folders import with_config


def decoder_layer(folder: Path, dtype: Any) -> DecoderLayer:
    config = ModelConfig.from_folder(folder)
    return DecoderLayer(config, Checkpoint.open(folder), "model.layers.0", dtype)


@pytest.mark.parametrize("split", [1, 2, 3, 4])
def test_running_in_two_parts_equals_running_at_once(split: int, tiny_llama: Path, dtype: Any) -> None:
    layer = decoder_layer(tiny_llama, dtype)
    hidden = np.random.default_rng(0).standard_normal((2, 7, 64)).astype(np.float32)
    places = positions(ModelConfig.from_folder(tiny_llama), 7, dtype)
    at_once = layer(Tensor(hidden), places).asnumpy()
    state = layer.run((Tensor(hidden.reshape(14, 64)),), 2, places, stop=split)
    (resumed,) = layer.run(state, 2, places, start=split)
    assert np.abs(at_once - hidden).max() > 0.1
    np.testing.assert_array_equal(resumed.asnumpy().reshape(2, 7, 64), at_once)


@pytest.mark.parametrize("group", range(4))
def test_each_step_starts_with_the_linears_of_its_smooth_group(
    group: int, tiny_llama: Path, dtype: Any
) -> None:
    config = ModelConfig.from_folder(tiny_llama)
    layer = decoder_layer(tiny_llama, dtype)
    places = positions(config, 7, dtype)
    hidden = Tensor(np.random.default_rng(0).standard_normal((7, 64)).astype(np.float32))
    before = [state.asnumpy() for state in layer.run((hidden,), 1, places, stop=group + 1)]
    for name in config.family.groups[group].linears:
        block, linear = name.split(".")
        weight = getattr(getattr(layer, block), linear).weight
        weight.set_data(weight * 2)
    after = [state.asnumpy() for state in layer.run((hidden,), 1, places, stop=group + 1)]
    for unchanged, state in zip(before, after, strict=True):
        np.testing.assert_array_equal(state, unchanged)
    rest = layer.run(tuple(Tensor(state) for state in before), 1, places, start=group + 1, stop=group + 2)
    changed = decoder_layer(tiny_llama, dtype)
    plain = changed.run(tuple(Tensor(state) for state in before), 1, places, start=group + 1, stop=group + 2)
    assert np.abs(rest[-1].asnumpy() - plain[-1].asnumpy()).max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 96}, r"mlp\.gate_proj\.weight has shape \[128, 64\].* \[96, 64\]"),
        ({"num_key_value_heads": 1}, r"self_attn\.k_proj\.weight has shape \[32, 64\].* \[16, 64\]"),
        ({"head_dim": 32}, r"self_attn\.q_proj\.weight has shape \[64, 64\].* \[128, 64\]"),
        ({"attention_bias": True}, r"self_attn\.q_proj has no bias, config\.json asks for one"),
        ({"mlp_bias": True}, r"mlp\.gate_proj has no bias, config\.json asks for one"),
        ({"vocab_size": 500}, r"model\.embed_tokens\.weight has shape \[512, 64\].* \[500, 64\]"),
        ({"num_hidden_layers": 3}, r"model\.layers\.2\."),
        ({"tie_word_embeddings": False}, r"lm_head\.weight"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_named(
    changes: dict[str, Any], message: str, tiny_llama: Path, tmp_path: Path, dtype: Any
) -> None:
    folder = with_config(tiny_llama, tmp_path / "model", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        CausalLM(ModelConfig.from_folder(folder), Checkpoint.open(folder), dtype)
    assert caught.value.remedy


def test_a_bias_that_the_config_does_not_know_is_named(tmp_path: Path, dtype: Any) -> None:
    source = write_tiny_llama(tmp_path / "source", layers=1, attention_bias=True)
    folder = with_config(source, tmp_path / "model", attention_bias=False)
    with pytest.raises(CheckpointError, match=r"q_proj has a bias, config\.json asks for none"):
        decoder_layer(folder, dtype)


def test_a_norm_of_the_wrong_size_is_named(tiny_llama: Path, tmp_path: Path, dtype: Any) -> None:
    folder = with_config(tiny_llama, tmp_path / "model", hidden_size=48)
    with pytest.raises(CheckpointError, match=r"input_layernorm\.weight has shape \[64\].* \[48\]"):
        decoder_layer(folder, dtype)


def test_a_final_norm_of_the_wrong_size_is_named(tiny_llama: Path, tmp_path: Path, dtype: Any) -> None:
    folder = with_config(tiny_llama, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:48]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[48\].* \[64\]"):
        CausalLM(ModelConfig.from_folder(folder), Checkpoint.open(folder), dtype)
