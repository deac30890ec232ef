"""Gated delta rule attention (Gated DeltaNet, arXiv 2412.06464) in NumPy, in float32.

What lies between its linears: a short causal convolution, and a state `[key channels, value channels]` of
each head, which every token decays, corrects and reads:

    S_t = a_t S_{t-1} + k_t (b_t (v_t - (a_t S_{t-1})^T k_t))^T,    y_t = S_t^T q_t

with a_t = exp(g_t). Tokens are taken in chunks, within which the corrections are solved for together (the WY
representation of arXiv 2406.06484): a few matrix products instead of a loop over tokens. The MindSpore cells
and the embedded engine both compute it here, because an operator of PyNative MindSpore takes a millisecond
on a CPU, and servers keep the state in float32 as well.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msquant.families.base import DeltaSizes

Floats = NDArray[np.float32]

CHUNK = 64
"""Tokens that are solved for together."""

# As transformers 4.57.1 and flash-linear-attention normalize queries and keys.
_L2_EPS = np.float32(1e-6)


@dataclass(frozen=True)
class DeltaWeights:
    """What the block has beside its linears and its norm.

    Attributes:
        convolution: `[C, kernel]`, of all channels of queries, keys and values; the last is the token's own.
        decay: the logarithm of each head's decay, `[value heads]`.
        step: added to what each head's decay is made of, `[value heads]`.
    """

    convolution: Floats
    decay: Floats
    step: Floats


class DeltaState:
    """What tokens leave behind in a layer: the convolution's last inputs, and the state of every head.

    Attributes:
        inputs: `[..., kernel - 1, C]`, for any leading axes.
        memory: `[..., value heads, key channels, value channels]`.
    """

    def __init__(self, sizes: DeltaSizes, *leading: int) -> None:
        channels = 2 * sizes.keys + sizes.values
        self.inputs: Floats = np.zeros((*leading, sizes.kernel - 1, channels), np.float32)
        shape = (*leading, sizes.value_heads, sizes.key_dim, sizes.value_dim)
        self.memory: Floats = np.zeros(shape, np.float32)


# A gate far below 0 overflows exp, and its inverse is then the right 0; what is not finite is found later.
@np.errstate(over="ignore", invalid="ignore")
def mix_tokens(
    sizes: DeltaSizes, weights: DeltaWeights, inputs: Floats, gates: Floats, state: DeltaState
) -> tuple[Floats, Floats]:
    """Mix tokens, as transformers 4.57.1 does in `models/qwen3_next/modeling_qwen3_next.py`.

    Args:
        sizes: of the block.
        weights: of the block.
        inputs: what `in_proj_qkvz` returns, `[..., T, C + values]`: for each head of keys its queries, keys,
            and the values and output gates of the heads that share them.
        gates: what `in_proj_ba` returns, `[..., T, 2 * value heads]`, likewise step sizes and decays.
        state: of the tokens before; replaced by that behind the last one.

    Returns:
        What is to be normalized, and the gates of it: `[..., T, value heads, value channels]` both.
    """
    *leading, tokens, _ = inputs.shape
    by_key = inputs.reshape(*leading, tokens, sizes.key_heads, -1)
    shared = sizes.repeat * sizes.value_dim
    starts = np.cumsum([sizes.key_dim, sizes.key_dim, shared])
    parts = [part.reshape(*leading, tokens, -1) for part in np.split(by_key, starts, axis=-1)]
    mixed = _convolved(np.concatenate(parts[:3], axis=-1), weights.convolution, state)
    queries, keys, values = np.split(mixed, [sizes.keys, 2 * sizes.keys], axis=-1)
    per_key = gates.reshape(*leading, tokens, sizes.key_heads, 2, sizes.repeat)
    step, decay = (
        per_key[..., i, :].reshape(*leading, tokens, sizes.value_heads).swapaxes(-1, -2) for i in (0, 1)
    )
    step = 1 / (1 + np.exp(-step))
    decay = -np.exp(weights.decay)[:, None] * np.logaddexp(0, decay + weights.step[:, None])
    queries, keys = (_by_head(x, sizes.key_heads, sizes.repeat) for x in (queries, keys))
    queries = _normalized(queries) * np.float32(sizes.key_dim**-0.5)
    values = _by_head(values, sizes.value_heads, 1)
    out = _delta_rule(queries, _normalized(keys), values, decay, step, state)
    return np.moveaxis(out, -3, -2), parts[3].reshape(*leading, tokens, sizes.value_heads, sizes.value_dim)


def _convolved(x: Floats, kernel: Floats, state: DeltaState) -> Floats:
    """`silu` of the causal convolution of each channel of `[..., T, C]`."""
    tokens, taps = x.shape[-2], kernel.shape[1]
    x = np.concatenate([state.inputs, x], axis=-2)
    state.inputs = x[..., tokens:, :].copy()
    out = x[..., :tokens, :] * kernel[:, 0]
    for tap in range(1, taps):
        out += x[..., tap : tap + tokens, :] * kernel[:, tap]
    out /= 1 + np.exp(-out)
    return out


def _by_head(x: Floats, heads: int, repeat: int) -> Floats:
    """`[..., T, heads * D]` to `[..., heads * repeat, T, D]`."""
    x = np.moveaxis(x.reshape(*x.shape[:-1], heads, -1), -2, -3)
    return np.repeat(x, repeat, axis=-3) if repeat > 1 else x


def _normalized(x: Floats) -> Floats:
    return x / np.sqrt(np.square(x).sum(axis=-1, keepdims=True) + _L2_EPS)


def _delta_rule(
    queries: Floats, keys: Floats, values: Floats, decay: Floats, step: Floats, state: DeltaState
) -> Floats:
    """The recurrence over `[..., heads, T, D]`, with `decay` (its logarithm) and `step` `[..., heads, T]`."""
    out = np.empty(values.shape, np.float32)
    for start in range(0, values.shape[-2], CHUNK):
        part = slice(start, start + CHUNK)
        q, k, v = queries[..., part, :], keys[..., part, :], values[..., part, :]
        b = step[..., part, None]
        # What is left at each token of the state before the chunk, and of what each earlier one wrote.
        total = np.cumsum(decay[..., part], axis=-1)
        left = np.exp(total)[..., None]
        between = np.tril(np.exp(np.minimum(total[..., :, None] - total[..., None, :], 0)))
        scores = k @ k.swapaxes(-1, -2)
        system = np.tril(scores * between * b, -1) + np.eye(k.shape[-2], dtype=np.float32)
        written = np.linalg.solve(system, b * (v - left * (k @ state.memory)))
        out[..., part, :] = left * (q @ state.memory) + ((q @ k.swapaxes(-1, -2)) * between) @ written
        rest = np.exp(total[..., -1:] - total)[..., None]
        state.memory = left[..., -1:, :] * state.memory + (k * rest).swapaxes(-1, -2) @ written
    return out
