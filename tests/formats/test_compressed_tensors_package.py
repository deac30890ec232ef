"""The compressed-tensors package takes our folder: its models validate it, its layers compute it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from msquant.checkpoint.weights import QuantizedLinear
from msquant.formats.compressed_tensors import CompressedTensorsCheckpoint
from msquant.schemes import FLOAT, W8A8_DYNAMIC
from tests.formats.expert_folders import schemes_of, write_experts
from tests.formats.folders import CONFIG

SMALL = {**CONFIG, "attention_bias": True, "rms_norm_eps": 1e-5, "max_position_embeddings": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Static attention, per-token down_proj but for one that is not quantized, one layer's q, k and v too."""
    schemes = schemes_of(SMALL)
    schemes.update({module: W8A8_DYNAMIC for module in schemes if module.endswith("down_proj")})
    schemes.update({f"model.layers.1.self_attn.{name}_proj": W8A8_DYNAMIC for name in "qkv"})
    schemes["model.layers.1.mlp.down_proj"] = FLOAT
    folder = tmp_path_factory.mktemp("package") / "m"
    write_experts(folder, SMALL, schemes=schemes, format_name="compressed-tensors")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    """Transformers' Llama, loaded as transformers loads it: prepared by the package, filled, decompressed."""
    config = json.loads((folder / "config.json").read_text())
    section = QuantizationConfig.model_validate(config.pop("quantization_config"))
    model = LlamaForCausalLM(LlamaConfig(**config)).to(torch.float32)
    apply_quantization_config(model, section)
    compressor = ModelCompressor(quantization_config=section)
    compressor.compress_model(model)
    tensors = {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    compressor.decompress_model(model)
    return model


def test_every_layer_has_the_scheme_that_was_planned(folder: Path, model: Any) -> None:
    source = CompressedTensorsCheckpoint.open(folder)
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) == 15
    for name in linears:
        scheme = getattr(model.get_submodule(name), "quantization_scheme", None)
        if name == "lm_head":
            assert scheme is None
            continue
        linear = source.linear(name)
        assert (scheme is not None) == isinstance(linear, QuantizedLinear), name
        if isinstance(linear, QuantizedLinear):
            assert scheme.input_activations.dynamic == (not linear.is_static), name
            assert scheme.input_activations.symmetric == (not linear.is_static), name


def test_its_layers_compute_ours(folder: Path, model: Any) -> None:
    source, checked = CompressedTensorsCheckpoint.open(folder), 0
    rng = np.random.default_rng(0)
    for name, module in model.named_modules():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        linear = source.linear(name)
        assert isinstance(linear, QuantizedLinear)
        x = rng.normal(size=(1, 5, linear.weight.shape[1])).astype(np.float32)
        with torch.no_grad():
            found = module(torch.from_numpy(x)).numpy()
        # The package divides the range of a token by 255, vLLM's kernels by 254.
        scale: Any = 2 * np.abs(x.astype(np.float64)).max(axis=-1, keepdims=True) / 255
        offset = 0
        if linear.input_scale is not None and linear.input_offset is not None:
            scale, offset = np.float64(linear.input_scale[0]), int(linear.input_offset[0])
        x_q = np.clip(np.round(x / scale) + offset, -128, 127) - offset
        y = scale * (x_q @ linear.weight.astype(np.float64).T) * linear.weight_scale
        y = y if linear.bias is None else y + linear.bias
        np.testing.assert_allclose(found, y, rtol=2e-5, atol=2e-5, err_msg=name)
        checked += 1
    assert checked == 13


def test_its_compressor_makes_our_weights(folder: Path, model: Any) -> None:
    source, name = CompressedTensorsCheckpoint.open(folder), "model.layers.0.mlp.up_proj"
    linear = source.linear(name)
    assert isinstance(linear, QuantizedLinear)
    parts = {
        part: torch.from_numpy(source.checkpoint.raw(f"{name}.{part}")) for part in ("weight", "weight_scale")
    }
    compressor = BaseCompressor.load_from_registry("int-quantized")
    weight = compressor.decompress(parts, model.get_submodule(name).quantization_scheme)["weight"]
    np.testing.assert_array_equal(weight, linear.weight * linear.weight_scale[:, None])
