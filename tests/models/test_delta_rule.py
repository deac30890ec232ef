"""The gated delta rule against transformers on torch, and against its own formula in float64."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from msquant.families.base import DeltaSizes
from msquant.models.delta_rule import CHUNK, DeltaState, DeltaWeights, mix_tokens

SIZES = DeltaSizes(key_heads=2, value_heads=4, key_dim=16, value_dim=24, kernel=4)
TOKENS = 2 * CHUNK + 22

Floats = NDArray[np.float32]


def random_weights() -> DeltaWeights:
    generator = np.random.default_rng(1)
    channels = 2 * SIZES.keys + SIZES.values
    return DeltaWeights(
        convolution=generator.standard_normal((channels, SIZES.kernel)).astype(np.float32) / 2,
        # From hardly a decay to one that forgets at once.
        decay=np.array([-6, -2, 0, 3], np.float32),
        step=generator.standard_normal(SIZES.value_heads).astype(np.float32),
    )


def random_inputs(batch: int = 2, tokens: int = TOKENS) -> tuple[Floats, Floats]:
    generator = np.random.default_rng(0)
    widths = 2 * SIZES.keys + 2 * SIZES.values, 2 * SIZES.value_heads
    inputs, gates = (generator.standard_normal((batch, tokens, n)).astype(np.float32) for n in widths)
    return inputs, gates


def formula(weights: DeltaWeights, inputs: Floats, gates: Floats) -> tuple[NDArray[np.float64], Floats]:
    """One sequence token by token, head by head, in float64, from the layout of transformers."""
    outputs = np.zeros((len(inputs), SIZES.value_heads, SIZES.value_dim))
    z = np.zeros(outputs.shape, np.float32)
    by_key = inputs.astype(np.float64).reshape(len(inputs), SIZES.key_heads, -1)
    ba = gates.astype(np.float64).reshape(len(inputs), SIZES.key_heads, -1)
    d, v = SIZES.key_dim, SIZES.value_dim
    for head in range(SIZES.value_heads):
        key_head, place = divmod(head, SIZES.repeat)
        first = 2 * d + place * v
        own = by_key[:, key_head]
        kernels = weights.convolution.astype(np.float64)
        rows = [
            (own[:, :d], key_head * d),
            (own[:, d : 2 * d], SIZES.keys + key_head * d),
            (own[:, first : first + v], 2 * SIZES.keys + head * v),
        ]
        q, k, values = (silu(convolved(x, kernels[start : start + x.shape[1]])) for x, start in rows)
        second = first + SIZES.repeat * v
        z[:, head] = own[:, second : second + v]
        q, k = (x / np.sqrt((x**2).sum(axis=1, keepdims=True) + 1e-6) for x in (q, k))
        beta = 1 / (1 + np.exp(-ba[:, key_head, place]))
        softplus = np.log1p(np.exp(ba[:, key_head, SIZES.repeat + place] + weights.step[head]))
        decay = np.exp(-np.exp(np.float64(weights.decay[head])) * softplus)
        state = np.zeros((d, v))
        for t in range(len(inputs)):
            state *= decay[t]
            state += np.outer(k[t], beta[t] * (values[t] - state.T @ k[t]))
            outputs[t, head] = state.T @ q[t] / np.sqrt(d)
    return outputs, z


def convolved(x: NDArray[np.float64], kernels: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.stack([np.convolve(x[:, i], kernels[i, ::-1])[: len(x)] for i in range(x.shape[1])], axis=1)


def silu(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x / (1 + np.exp(-x))


def mixed(inputs: Floats, gates: Floats, steps: list[int]) -> tuple[Floats, Floats]:
    """Both results for tokens that come in pieces."""
    state, start = DeltaState(SIZES, len(inputs)), 0
    found = []
    for step in steps:
        part = slice(start, start + step)
        found.append(mix_tokens(SIZES, random_weights(), inputs[:, part], gates[:, part], state))
        start += step
    assert start == inputs.shape[1]
    first, second = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
    return first, second


@pytest.mark.parametrize(
    "steps", [[TOKENS], [CHUNK, TOKENS - CHUNK], [1, 2, CHUNK + 5, TOKENS - CHUNK - 8], [1] * TOKENS]
)
def test_however_tokens_are_cut_it_is_the_formula_in_float64(steps: list[int]) -> None:
    inputs, gates = random_inputs()
    outputs, z = mixed(inputs, gates, steps)
    assert outputs.dtype == z.dtype == np.float32
    for i in range(len(inputs)):
        expected, expected_z = formula(random_weights(), inputs[i], gates[i])
        assert np.abs(expected).max() > 0.2
        np.testing.assert_allclose(outputs[i], expected, rtol=0, atol=2e-6)
        np.testing.assert_array_equal(z[i], expected_z)


def test_a_batch_is_its_sequences() -> None:
    inputs, gates = random_inputs(batch=3)
    together, _ = mixed(inputs, gates, [TOKENS])
    for i in range(3):
        alone = mix_tokens(SIZES, random_weights(), inputs[i], gates[i], DeltaState(SIZES))[0]
        np.testing.assert_allclose(together[i], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
def test_the_block_is_that_of_transformers(rule: str) -> None:
    import torch
    from transformers.models.qwen3_next import modeling_qwen3_next as theirs

    sizes = {
        "linear_num_key_heads": SIZES.key_heads,
        "linear_num_value_heads": SIZES.value_heads,
        "linear_key_head_dim": SIZES.key_dim,
        "linear_value_head_dim": SIZES.value_dim,
        "linear_conv_kernel_dim": SIZES.kernel,
    }
    block: Any = theirs.Qwen3NextGatedDeltaNet(theirs.Qwen3NextConfig(hidden_size=8, **sizes), 0)
    function, seen = getattr(theirs, rule), []

    def record(*args: Any, **options: Any) -> Any:
        if rule == "torch_recurrent_gated_delta_rule":
            options.pop("chunk_size", None)
        found = function(*args, **options)
        seen.append(found[0].detach().numpy())
        return found

    block.chunk_gated_delta_rule = record
    weights, (inputs, gates) = random_weights(), random_inputs()
    with torch.no_grad():
        block.conv1d.weight.copy_(torch.from_numpy(weights.convolution)[:, None])
        block.A_log.copy_(torch.from_numpy(weights.decay))
        block.dt_bias.copy_(torch.from_numpy(weights.step))
        # What comes out of its two linears is given.
        block.in_proj_qkvz.forward = lambda _: torch.from_numpy(inputs)
        block.in_proj_ba.forward = lambda _: torch.from_numpy(gates)
        block(torch.zeros(len(inputs), TOKENS, 8))
    outputs, _ = mixed(inputs, gates, [TOKENS])
    np.testing.assert_allclose(outputs, seen[0], rtol=0, atol=2e-6)
