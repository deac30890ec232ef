"""The functions of vLLM, vLLM-MindSpore and vllm-ascend that decide how a layer runs, on our folders.

Each runs from its own source; stand-ins replace what it imports of engines that need an accelerator. They
need, beside msquant, one of

    pip install --no-deps vllm==0.11.0
    pip install --no-deps vllm-mindspore==0.5.1
    pip download --no-deps --no-binary :all: vllm-ascend   and its unpacked folder in PYTHONPATH
"""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from msquant.checkpoint.weights import QuantizedLinear, as_computed
from msquant.families import expected_shapes, extra_shapes
from msquant.formats.ascend.form import AscendFormat
from msquant.formats.ascend.layout import DESCRIPTION_NAME, WORDS, decode_linear
from msquant.formats.compressed_tensors.section import make_section
from msquant.formats.fused_layers import experts_parent, fused_layers
from msquant.kernels.cpu_linear import linear_layer
from msquant.schemes import FLOAT, W8A8, W8A8_DYNAMIC, W8A16, Scheme
from tests.formats.expert_folders import DEEPSEEK, QWEN, random_linear, schemes_of, write_experts
from tests.formats.folders import CONFIG
from tests.formats.stand_ins import find_file, load_file

FORM = AscendFormat()

VLLM = find_file("vllm", "model_executor/layers/quantization/compressed_tensors/utils.py")
MINDSPORE = find_file("vllm_mindspore", "model_executor/layers/quantization/golden_stick/golden_stick.py")
ASCEND = find_file("vllm_ascend", "quantization/modelslim_config.py")

FUSED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"],
}


def mixed() -> dict[str, Scheme]:
    """Llama with per-token down_proj, one of them not quantized, and one layer's q, k and v per token too."""
    schemes = schemes_of(CONFIG)
    schemes.update({module: W8A8_DYNAMIC for module in schemes if module.endswith("down_proj")})
    schemes.update({f"model.layers.1.self_attn.{name}_proj": W8A8_DYNAMIC for name in "qkv"})
    schemes["model.layers.1.mlp.down_proj"] = FLOAT
    return schemes


def weights_alone() -> dict[str, Scheme]:
    """Llama with int8 weights alone in o_proj and in one layer's q, k and v."""
    names = [f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"]
    return {**schemes_of(CONFIG), **dict.fromkeys(["model.layers.0.self_attn.o_proj", *names], W8A16)}


CASES = [
    pytest.param(CONFIG, schemes_of(CONFIG), id="llama"),
    pytest.param(CONFIG, mixed(), id="mixed"),
    pytest.param(DEEPSEEK, schemes_of(DEEPSEEK), id="deepseek"),
    pytest.param(QWEN, schemes_of(QWEN), id="qwen3-moe"),
]


def layers_of(config: dict[str, Any], schemes: dict[str, Scheme]) -> dict[str, Scheme]:
    """The linear layers that the engines build, fused ones instead of their parts, with what they must be."""
    shapes = {**(expected_shapes(dict(config)) or {}), **extra_shapes(dict(config))}
    names = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
    modules = [
        name
        for name in names
        if not name.endswith(("embed_tokens", "lm_head", "mlp.gate", "shared_head.head"))
    ]
    fused = fused_layers(module for module in modules if not experts_parent(module))
    parts = {part for members in fused.values() for part in members}
    of = {module: schemes.get(module, FLOAT) for module in modules if module not in parts}
    return {**of, **{layer: schemes.get(members[0], FLOAT) for layer, members in fused.items()}}


@pytest.mark.slow
@pytest.mark.skipif(VLLM is None, reason="vllm is not installed")
@pytest.mark.parametrize(("config", "schemes"), CASES)
def test_vllm_matches_every_layer_to_its_group(config: dict[str, Any], schemes: dict[str, Scheme]) -> None:
    assert VLLM is not None
    vllm = load_file(VLLM, "vllm_compressed_tensors_utils")
    section = make_section(schemes, expected_shapes(dict(config)) or {})
    targets = {t: group for group in section["config_groups"].values() for t in group["targets"]}

    class RowParallelLinear(torch.nn.Module):
        """vLLM takes the class `Linear` for any whose name holds that."""

    for layer, scheme in layers_of(config, schemes).items():
        if vllm.should_ignore_layer(layer, section["ignore"], FUSED):
            assert scheme == FLOAT, layer
            continue
        target = vllm.find_matched_target(layer, RowParallelLinear(), targets, FUSED)
        found = targets[target]["input_activations"]
        assert scheme == (W8A8_DYNAMIC if found["dynamic"] else W8A8), layer


def load_mindspore() -> Any:
    assert MINDSPORE is not None
    package = "vllm_mindspore.model_executor.layers"
    return load_file(
        MINDSPORE,
        "vllm_mindspore_golden_stick",
        (
            "vllm.model_executor.layers.quantization.base_config",
            f"{package}.linear",
            f"{package}.quantization.golden_stick.a8w8",
            f"{package}.vocab_parallel_embedding",
        ),
    )


@pytest.mark.slow
@pytest.mark.skipif(MINDSPORE is None, reason="vllm_mindspore is not installed")
@pytest.mark.parametrize(("config", "schemes"), CASES)
@pytest.mark.parametrize("format_name", ["golden-stick", "ascend"])
def test_vllm_mindspore_finds_the_description_consistent(
    tmp_path: Path, config: dict[str, Any], schemes: dict[str, Scheme], format_name: Any
) -> None:
    if format_name == "golden-stick" and schemes == mixed():
        pytest.skip("the native backend has no per-token activations")
    plan = write_experts(tmp_path / "m", config, schemes=schemes, format_name=format_name)
    (name,) = plan.documents
    load_mindspore().GoldenStickConfig.from_config(json.loads((tmp_path / "m" / name).read_text()))


@pytest.mark.slow
@pytest.mark.skipif(MINDSPORE is None, reason="vllm_mindspore is not installed")
def test_vllm_mindspore_refuses_the_ascend_folder_of_a_model_with_biases(tmp_path: Path) -> None:
    config = {**CONFIG, "attention_bias": True}
    write_experts(tmp_path / "m", config, schemes=schemes_of(config), format_name="ascend")
    description = json.loads((tmp_path / "m" / DESCRIPTION_NAME).read_text())
    with pytest.raises(ValueError, match="conflict"):
        load_mindspore().GoldenStickConfig.from_config(description)


@pytest.mark.slow
@pytest.mark.skipif(ASCEND is None, reason="vllm_ascend is not installed")
@pytest.mark.parametrize(
    ("config", "schemes"), [*CASES, pytest.param(CONFIG, weights_alone(), id="weights alone")]
)
def test_vllm_ascend_finds_every_layers_scheme(
    tmp_path: Path, config: dict[str, Any], schemes: dict[str, Scheme]
) -> None:
    assert ASCEND is not None
    ascend = load_file(
        ASCEND,
        "vllm_ascend.quantization.modelslim_config",
        (
            "vllm.config",
            "vllm.logger",
            "vllm.model_executor.layers.attention_layer_base",
            "vllm.model_executor.layers.fused_moe",
            "vllm.model_executor.layers.linear",
            "vllm.model_executor.layers.quantization.base_config",
            "vllm.model_executor.layers.vocab_parallel_embedding",
            "vllm.model_executor.models.utils",
            "vllm_ascend.utils",
            "vllm_ascend.quantization.methods",
        ),
    )
    write_experts(tmp_path / "m", config, schemes=schemes, format_name="ascend")
    found = ascend.AscendModelSlimConfig(json.loads((tmp_path / "m" / DESCRIPTION_NAME).read_text()))
    fused = ascend.get_packed_modules_mapping(config["model_type"]) or FUSED
    layers = layers_of(config, schemes)
    experts = {experts_parent(layer): scheme for layer, scheme in layers.items() if experts_parent(layer)}
    for layer, scheme in {**layers, **experts, "lm_head": FLOAT, "model.embed_tokens": FLOAT}.items():
        if layer is None or experts_parent(layer):
            continue
        word = ascend.get_quant_type_for_layer(found.quant_description, layer, "linear", fused)
        assert word == WORDS[scheme], layer
        assert found.is_layer_skipped_ascend(layer, fused) == (scheme == FLOAT), layer
    assert not found.enable_fa_quant
    assert not found.enable_c8_quant


@pytest.mark.slow
@pytest.mark.skipif(ASCEND is None, reason="vllm_ascend is not installed")
def test_vllm_ascends_own_method_computes_int8_weights_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its class makes the parameters, takes our tensors and calls the operator, which is stood in for."""
    assert ASCEND is not None
    names = (
        "torch_npu",
        "vllm_ascend.utils",
        *(f"vllm_ascend.quantization.methods.{n}" for n in ("base", "registry")),
    )
    w8a16 = load_file(ASCEND.parent / "methods" / "w8a16.py", "vllm_ascend.quantization.methods.w8a16", names)
    linear = random_linear("o_proj", (24, 16), W8A16, bias=True)
    tensors = FORM.encode_linear("o_proj", linear, "bfloat16")
    method = w8a16.AscendW8A16LinearMethod()
    made = method.get_weight(16, 24) | method.get_perchannel_param(24, torch.bfloat16)
    layer = torch.nn.Module()
    for name, parameter in made.items():
        loaded = torch.from_numpy(tensors[f"o_proj.{name}"])
        assert loaded.shape == parameter.shape
        layer.register_parameter(name, torch.nn.Parameter(parameter.copy_(loaded), requires_grad=False))
    monkeypatch.setattr(w8a16, "maybe_trans_nz", lambda weight: weight)
    monkeypatch.setattr(w8a16.torch_npu, "npu_weight_quant_batchmatmul", batchmatmul, raising=False)
    method.process_weights_after_loading(layer)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    y = method.apply(layer, x, torch.from_numpy(tensors["o_proj.bias"]))
    floats = as_computed(linear)
    expected = x.numpy() @ floats.weight.T + floats.bias
    # The scales are rounded to bfloat16 as they are loaded.
    np.testing.assert_allclose(y.numpy(), expected, rtol=0.01, atol=0.01 * np.abs(expected).max())


def batchmatmul(x: Any, weight: Any, antiquant_scale: Any, antiquant_offset: Any, bias: Any) -> Any:
    """`x @ ((weight + offset) * scale) + bias`, as Ascend documents aclnnWeightQuantBatchMatmul."""
    return x @ ((weight.float() + antiquant_offset.float()) * antiquant_scale.float()) + bias


@pytest.mark.skipif(ASCEND is None, reason="vllm_ascend is not installed")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_vllm_ascends_own_method_computes_a_static_layer_as_our_engine_does(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its class rounds the reciprocals of 40 input scales and computes; the operators are stood in for."""
    assert ASCEND is not None
    names = (
        "torch_npu",
        "vllm_ascend.utils",
        *(f"vllm_ascend.quantization.methods.{n}" for n in ("base", "registry")),
    )
    w8a8 = load_file(
        ASCEND.parent / "methods" / "w8a8_static.py", "vllm_ascend.quantization.methods.w8a8_static", names
    )
    monkeypatch.setattr(w8a8, "maybe_trans_nz", lambda weight: weight)
    monkeypatch.setattr(w8a8, "get_weight_prefetch_method", MagicMock(), raising=False)
    monkeypatch.setattr(w8a8.torch_npu, "npu_quant_matmul", quant_matmul, raising=False)
    monkeypatch.setattr(torch.ops, "vllm", SimpleNamespace(quantize=quantize), raising=False)
    generator = np.random.default_rng(0)
    for scale in generator.uniform(0.01, 0.1, 40):
        linear = random_linear("o_proj", (24, 64), W8A8)
        assert isinstance(linear, QuantizedLinear)
        linear = replace(linear, input_scale=np.float32([scale]), input_offset=np.int32([-37]))
        tensors = FORM.encode_linear("o_proj", linear, dtype)
        method, layer = w8a8.AscendW8A8LinearMethod(), torch.nn.Module()
        kind = layer.params_dtype = getattr(torch, dtype)
        made = method.get_weight(64, 24, kind) | method.get_pertensor_param(kind)
        for name, parameter in (made | method.get_perchannel_param(24, kind)).items():
            loaded = tensors.get(f"o_proj.{name}", np.zeros(parameter.shape))
            parameter.copy_(torch.from_numpy(loaded))
            layer.register_parameter(name, torch.nn.Parameter(parameter, requires_grad=False))
        method.process_weights_after_loading(layer)
        x = (generator.standard_normal((50, 64)) * 40 * scale).astype(np.float32)
        y = method.apply(layer, torch.from_numpy(x)).numpy()
        ours = linear_layer(decode_linear("o_proj", tensors, dtype))(x)
        assert np.linalg.norm(y - ours) < 1e-6 * np.linalg.norm(ours)
        # The scale itself, with which the engine used to be compared, is not what the server divides by.
        exact = linear_layer(decode_linear("o_proj", tensors))(x)
        assert np.linalg.norm(y - exact) < 2e-2 * np.linalg.norm(exact)


def quantize(x: Any, scale: Any, reciprocal: Any, offset: Any) -> Any:
    """npu_quantize without div_mode: `clamp(round(x * reciprocal + offset))`."""
    assert scale.dtype == reciprocal.dtype == offset.dtype != torch.float32
    return torch.clamp(torch.round(x * reciprocal.float() + offset.float()), -128, 127).to(torch.int8)


def quant_matmul(x: Any, weight: Any, scale: Any, bias: Any, output_dtype: Any) -> Any:
    """aclnnQuantMatmul: int32 sums and their bias, times a float32 scale, whose bits int64 may hold."""
    if scale.dtype == torch.int64:
        scale = scale.to(torch.int32).view(torch.float32)
    return ((x.double() @ weight.double() + bias) * scale.double()).float()
