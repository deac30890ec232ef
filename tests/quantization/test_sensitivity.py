"""Errors of groups beside the same computed with transformers on torch, and beside the quantized layer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msquant.algorithms import make_algorithm
from msquant.algorithms.base import Algorithm
from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.hidden_states import HiddenStateStore
from msquant.checkpoint.weights import Linear
from msquant.kernels import golden_stick
from msquant.kernels.layer_report import GroupError
from msquant.models.config_json import read_config
from msquant.models.device import use_device
from msquant.models.layers import DecoderLayer, positions
from msquant.quantization.decoder_pass import DecoderPass
from msquant.quantization.group_errors import SensitivityPass, held_out_parameters, token_errors
from msquant.schemes import W8A8, W8A8_DYNAMIC, W8A16
from tests.fixtures.policies import policy_of, rules
from tests.fixtures.tiny_families import write_tiny

LENGTH = 16
GROUPS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def measure(
    folder: Path, scratch: Path, policy: Algorithm, hidden: list[np.ndarray], index: int = 0
) -> tuple[dict[str, GroupError], list[np.ndarray]]:
    """The groups of one layer by name, and the layer's outputs."""
    dtype = use_device()
    golden_stick.set_log_level(verbose=False)
    config = read_config(folder)
    store = HiddenStateStore(scratch, 1 << 30)
    measuring = SensitivityPass(config, Checkpoint.open(folder), policy, LENGTH, dtype, store)
    outputs: list[np.ndarray] = []
    errors = measuring.errors(index, hidden, outputs.append, dynamic=True)
    return {error.group: error for error in errors}, outputs


def samples(count: int, batches: int = 1) -> list[np.ndarray]:
    values = np.random.default_rng(0).normal(size=(count, LENGTH, 64)).astype(np.float32)
    return np.split(values, batches)


def torch_errors(folder: Path, hidden: np.ndarray, alpha: float | None, per_token: bool) -> dict[str, float]:
    """Each group's error in the first decoder layer, with SmoothQuant's scale or, without alpha, none."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().model
    layer, heads, key_values = model.layers[0], 4, 2
    x = torch.tensor(hidden)
    places = torch.arange(LENGTH)[None]
    causal = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)[None, None]

    def run() -> Any:
        rotary = model.rotary_emb(x, places)
        output = layer(x, attention_mask=causal, position_ids=places, position_embeddings=rotary)
        return output[0] if isinstance(output, tuple) else output

    def rounded(values: Any, step: Any, zero: Any = 0) -> Any:
        step = torch.where(step == 0, 1, step)
        return (torch.clamp(torch.round(values / step) + zero, -128, 127) - zero) * step

    def quantized(values: Any) -> Any:
        if per_token:
            return rounded(values, values.abs().amax(-1, keepdim=True) / 127)
        result = values.clone()
        for half in (0, 1):
            other = values[1 - half :: 2]
            low, high = min(0, other.min()), max(0, other.max())
            step = (high - low) / 255
            result[half::2] = rounded(values[half::2], step, torch.round(-128 - low / step))
        return result

    errors = {}
    with torch.no_grad():
        seen: dict[str, Any] = {}
        hooks = [
            layer.get_submodule(name).register_forward_pre_hook(
                lambda module, given, name=name: seen.update({name: given[0].reshape(*x.shape[:2], -1)})
            )
            for names in GROUPS.values()
            for name in names
        ]
        exact = run()
        for hook in hooks:
            hook.remove()
        for group, names in GROUPS.items():
            linears = [layer.get_submodule(name) for name in names]
            a = seen[names[0]].abs().amax((0, 1))
            w = torch.cat([linear.weight for linear in linears]).abs().amax(0)
            if group == "o":
                a, w = (
                    v.reshape(key_values, heads // key_values, -1).amax(1, keepdim=True)
                    .expand(-1, heads // key_values, -1).reshape(-1)
                    for v in (a, w)
                )  # fmt: skip
            scale = torch.ones_like(a) if alpha is None else a**alpha / w ** (1 - alpha)
            given = quantized(seen[names[0]] / scale)
            hooks = [linear.register_forward_pre_hook(lambda *_, given=given: (given,)) for linear in linears]
            weights = [linear.weight.clone() for linear in linears]
            for linear in linears:
                smoothed = linear.weight * scale
                linear.weight.copy_(rounded(smoothed, 2 * smoothed.abs().amax(1, keepdim=True) / 255))
            wrong = run() - exact
            errors[group] = float((wrong.square().sum(-1) / exact.square().sum(-1)).mean())
            for hook, linear, weight in zip(hooks, linears, weights, strict=True):
                hook.remove()
                linear.weight.copy_(weight)
    return errors


@pytest.mark.parametrize(("algorithm", "alpha"), [("smoothquant", 0.7), ("rtn", None)])
def test_every_groups_error_is_that_of_an_independent_computation(
    tiny_llama: Path, tmp_path: Path, algorithm: Any, alpha: float | None
) -> None:
    policy = policy_of(algorithm, smoothquant_alpha=alpha or 0.5)
    hidden = samples(6, batches=2)
    measured, outputs = measure(tiny_llama, tmp_path, policy, hidden)
    static = torch_errors(tiny_llama, np.concatenate(hidden), alpha, per_token=False)
    per_token = torch_errors(tiny_llama, np.concatenate(hidden), alpha, per_token=True)

    assert list(measured) == list(GROUPS)
    assert [output.shape for output in outputs] == [batch.shape for batch in hidden]
    for group, names in GROUPS.items():
        error = measured[group]
        assert error.linears == tuple(f"model.layers.0.{name}" for name in names)
        assert (error.layer, error.scheme) == (0, W8A8)
        # A rounding on the edge of a step may fall either way.
        assert error.error == pytest.approx(static[group], rel=0.01)
        assert error.dynamic_error == pytest.approx(per_token[group], rel=0.01)


def test_int8_weights_alone_cost_less_than_activations_too(tiny_llama: Path, tmp_path: Path) -> None:
    hidden = samples(2)
    alone, _ = measure(
        tiny_llama,
        tmp_path / "a",
        make_algorithm(algorithm="rtn", schemes=rules(weight_only=["proj"])),
        hidden,
    )
    both, _ = measure(tiny_llama, tmp_path / "b", make_algorithm(algorithm="rtn"), hidden)
    assert list(alone) == list(GROUPS)
    for group, error in alone.items():
        assert (error.scheme, error.dynamic_error) == (W8A16, None)
        assert 0 < error.error < both[group].dynamic_error


def test_osl_leaves_linears_with_a_scale_per_token_as_they_are(tiny_llama: Path, tmp_path: Path) -> None:
    policy = make_algorithm(algorithm="osl-golden-stick", smooth_alpha=(0.6,), weight_clip_ratio=(0.9,))
    hidden = samples(2)
    measured, _ = measure(tiny_llama, tmp_path, policy, hidden)
    plain = torch_errors(tiny_llama, hidden[0], None, per_token=True)
    unclipped = torch_errors(tiny_llama, hidden[0], 0.6, per_token=False)
    for group, error in measured.items():
        assert error.dynamic_error == pytest.approx(plain[group], rel=0.01)
        # Rows clipped at nine tenths of their range.
        assert error.error > 1.1 * unclipped[group]


def test_what_stays_in_floating_point_is_not_measured(tiny_llama: Path, tmp_path: Path) -> None:
    policy = make_algorithm(algorithm="rtn", schemes=rules(skip=["layers.0.mlp.down_proj", "o_proj"]))
    measured, _ = measure(tiny_llama, tmp_path, policy, samples(2))
    assert list(measured) == ["qkv", "gate_up"]


class Quantized:
    """A sink that is also the source of the layer it took."""

    def __init__(self, source: Checkpoint) -> None:
        self.source = source
        self.tensors: dict[str, Any] = {}
        self.linears: dict[str, Linear] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.source

    def tensor(self, name: str, values: Any = None) -> Any:
        if values is not None:
            self.tensors[name] = values
        return self.tensors[name]

    def linear(self, module: str, linear: Linear | None = None) -> Any:
        if linear is not None:
            self.linears[module] = linear
        return self.linears[module]

    def rows(self, name: str, indices: Any) -> Any:
        return self.tensors[name][indices]


def test_experts_are_one_group_with_the_error_of_the_layer_when_only_they_are_quantized(
    tmp_path: Path,
) -> None:
    import mindspore as ms

    folder = write_tiny(tmp_path / "model", "deepseek_v3")
    options: Mapping[str, Any] = {"algorithm": "smoothquant", "feed_forward_alpha": 0.5}
    hidden = samples(4, batches=2)
    measured, outputs = measure(
        folder,
        tmp_path / "a",
        make_algorithm(**options, schemes=rules(skip=["kv_b_proj"], dynamic=["mlp."])),
        hidden,
        index=1,
    )
    assert list(measured) == ["q_kv_a", "q_b", "o", "feed_forward"]
    experts = measured["feed_forward"]
    assert (experts.scheme, experts.dynamic_error) == (W8A8_DYNAMIC, None)
    assert len(experts.linears) == 3 * (8 + 1)
    assert not any("mlp.gate." in name or name.endswith("mlp.gate") for name in experts.linears)

    config, source, dtype = read_config(folder), Checkpoint.open(folder), use_device()
    sink = Quantized(source)
    policy = make_algorithm(**options, schemes=rules(skip=["self_attn"], dynamic=["mlp."]))
    store = HiddenStateStore(tmp_path / "b", 1 << 30)
    DecoderPass(config, source, policy, LENGTH, dtype, store).run(1, hidden, lambda output: None, sink)
    layer = DecoderLayer(config, sink, 1, dtype)
    quantized = [layer(ms.Tensor(batch), positions(config, LENGTH, dtype)).asnumpy() for batch in hidden]
    expected = token_errors(*(np.concatenate(batches).reshape(-1, 64) for batches in (outputs, quantized)))
    assert experts.error == pytest.approx(float(expected.mean()), rel=0.01)


def test_ranges_are_those_of_the_other_half() -> None:
    low, high = np.float32([-1, -2, -3, 1]), np.float32([1, 2, 3, 4])
    scale, offset = (values[:, 0] for values in held_out_parameters(low[:, None], high[:, None]))
    np.testing.assert_allclose(scale, [6 / 255, 6 / 255, 6 / 255, 6 / 255], rtol=1e-6)
    np.testing.assert_array_equal(offset, np.rint(-128 - np.float64([-2, -3, -2, -3]) / (6 / 255)))
    scale, _ = held_out_parameters(np.float32([[1]]), np.float32([[5.1]]))
    assert scale[0, 0] == pytest.approx(0.02)


def test_zero_points_of_columns_come_from_the_other_samples() -> None:
    low, high = np.float32([[0, -3], [-1, 1]]), np.float32([[5.1, -1], [1, 3]])
    scale, offset = held_out_parameters(low, high, shifted=True)
    np.testing.assert_allclose(scale, [[3 / 255], [5.1 / 255]], rtol=1e-6)
    # Of the first sample by the second one, whose columns are at -1 to 1 and 1 to 3, and the other way round.
    np.testing.assert_array_equal(offset, [[0, -128], [-128, 100]])


def test_a_token_counts_by_its_own_size() -> None:
    output = np.float32([[3, 4], [30, 40], [0, 0]])
    errors = token_errors(output, output + np.float32([[0.5, 0], [5, 0], [1, 0]]))
    np.testing.assert_allclose(errors, [0.01, 0.01, 0])
