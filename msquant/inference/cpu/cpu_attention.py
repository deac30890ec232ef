"""Causal self-attention in NumPy over a batch of sequences, each with a key-value cache of its own."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.weights import WeightSource, float_weight, token_scales
from msquant.families.base import LatentSizes
from msquant.inference.cpu.norm import CpuRMSNorm
from msquant.kernels.cpu_linear import Array, linear_layer
from msquant.models.config import INNER_NORM_EPS, ModelConfig
from msquant.models.reading import read_linear
from msquant.models.rope import rotary_tables, softmax_scale

# A cache grows by at least so many tokens, so that it is seldom copied.
_STEP = 64


class LayerCache:
    """Keys and values of one sequence in one layer, `[key-value heads, tokens, channels]`."""

    def __init__(self) -> None:
        self._keys = self._values = np.empty((0, 0, 0), np.float32)
        self._length = 0

    def extend(self, keys: Array, values: Array) -> tuple[Array, Array]:
        """Append those of new tokens, `[tokens, key-value heads, channels]`, and return all of them."""
        stop = self._length + len(keys)
        if stop > self._keys.shape[1]:
            capacity = max(stop + _STEP, stop * 5 // 4)
            self._keys = self._grown(self._keys, keys, capacity)
            self._values = self._grown(self._values, values, capacity)
        self._keys[:, self._length : stop] = keys.swapaxes(0, 1)
        self._values[:, self._length : stop] = values.swapaxes(0, 1)
        self._length = stop
        return self._keys[:, :stop], self._values[:, :stop]

    def _grown(self, old: Array, new: Array, capacity: int) -> Array:
        grown = np.empty((new.shape[1], capacity, new.shape[2]), np.float32)
        if self._length:
            grown[:, : self._length] = old[:, : self._length]
        return grown


class Places:
    """Where the tokens of a batch stand: the rows of each sequence, and what rotates and masks them.

    Args:
        config: the model's shape.
        spans: of each sequence, how many tokens its caches hold and how many follow now.
    """

    def __init__(self, config: ModelConfig, spans: Sequence[tuple[int, int]]) -> None:
        ends = np.cumsum([new for _, new in spans]).tolist()
        self.rows = [slice(end - new, end) for end, (_, new) in zip(ends, spans, strict=True)]
        tables = [rotary_tables(config, past, new) for past, new in spans]
        half = tables[0][0].shape[1] // 2
        self._cos = np.concatenate([cos[:, None, :half] for cos, _ in tables])
        self._sin = np.concatenate([sin[:, None, :half] for _, sin in tables])
        self._interleave = config.interleaved_pairs
        self._masks = [_hidden_future(past, new) for past, new in spans]

    def rotate(self, x: Array) -> Array:
        """Rotate the first R channels of queries or keys, `[T, heads, R or more]`.

        Interleaved pairs come out apart, in queries and keys alike.
        """
        half = self._cos.shape[2]
        rotated = 2 * half
        pairs = (
            (slice(0, rotated, 2), slice(1, rotated, 2))
            if self._interleave
            else (slice(half), slice(half, rotated))
        )
        a, b = (x[:, :, each] for each in pairs)
        out = np.empty(x.shape, np.float32)
        np.subtract(a * self._cos, b * self._sin, out=out[:, :, :half])
        np.add(b * self._cos, a * self._sin, out=out[:, :, half:rotated])
        out[:, :, rotated:] = x[:, :, rotated:]
        return out

    def attend(
        self, queries: Array, keys: Array, values: Array, caches: Sequence[LayerCache], scale: np.float32
    ) -> Array:
        """`softmax(queries keys^T * scale + causal mask) values`, each sequence over its own tokens.

        Args:
            queries: `[T, heads, D]`.
            keys: of the same tokens, `[T, key-value heads, D]`.
            values: likewise, `[T, key-value heads, V]`.
            caches: of each sequence; extended in place.
            scale: of the scores.

        Returns:
            `[T, heads * V]`.
        """
        heads, width = queries.shape[1], values.shape[2]
        out = np.empty((len(queries), heads * width), np.float32)
        for rows, cache, mask in zip(self.rows, caches, self._masks, strict=True):
            all_keys, all_values = cache.extend(keys[rows], values[rows])
            groups, length = len(all_keys), rows.stop - rows.start
            # The query heads of one key-value head are stacked along the tokens.
            stacked = queries[rows].swapaxes(0, 1).reshape(groups, heads // groups * length, -1)
            scores = stacked @ all_keys.swapaxes(1, 2)
            scores *= scale
            if mask is not None:
                per_head = scores.reshape(heads, length, -1)
                per_head += mask
            scores -= scores.max(axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=-1, keepdims=True)
            mixed = (scores @ all_values).reshape(heads, length, width)
            out[rows] = mixed.swapaxes(0, 1).reshape(length, -1)
        return out


def _hidden_future(past: int, new: int) -> NDArray[np.float32] | None:
    """`[new, past + new]`, 0 where a token may look; None for a single token, which may look everywhere."""
    if new == 1:
        return None
    visible = np.arange(past + new)[None, :] <= np.arange(past, past + new)[:, None]
    return np.where(visible, 0, np.finfo(np.float32).min).astype(np.float32)


class GroupedQueryAttention:
    """Attention with grouped queries and rotary positions; see `msquant.models.attention.Attention`."""

    def __init__(self, config: ModelConfig, source: WeightSource, name: str) -> None:
        self._heads, self._groups = config.num_attention_heads, config.num_key_value_heads
        self._head_dim = config.head_dim
        self._scale = np.float32(config.head_dim**-0.5)
        names = config.family.names
        inputs = (names.queries, names.keys, names.values)
        linears = [read_linear(config, source, f"{name}.{part}") for part in inputs]
        self._qkv = linear_layer(*linears)
        self._caches = [linear.cache for linear in linears[1:]]
        self._o = linear_layer(read_linear(config, source, f"{name}.{names.output}"))
        self._output_gate = config.family.output_gate
        self._norms: tuple[CpuRMSNorm, CpuRMSNorm] | None = None
        if config.query_key_norms:
            self._norms = (
                CpuRMSNorm.read(config, source, f"{name}.{names.query_norm}"),
                CpuRMSNorm.read(config, source, f"{name}.{names.key_norm}"),
            )

    def __call__(self, x: Array, places: Places, caches: Sequence[LayerCache]) -> Array:
        """`[T, H]` to the same."""
        split = self._qkv(x).reshape(len(x), -1, self._head_dim)
        gate: Array | None = None
        if self._output_gate:
            both, rest = split[:, : 2 * self._heads], split[:, 2 * self._heads :]
            gate = both[:, 1::2].reshape(len(x), -1)
            split = np.concatenate([both[:, ::2], rest], axis=1)
        rotated, values = split[:, : -self._groups], split[:, -self._groups :]
        if self._norms is not None:
            queries, keys = rotated[:, : self._heads], rotated[:, self._heads :]
            rotated = np.concatenate([self._norms[0](queries), self._norms[1](keys)], axis=1)
        rotated = places.rotate(rotated)
        queries, keys = rotated[:, : self._heads], rotated[:, self._heads :]
        keys, values = (
            made if cache is None else cache.rounded(made.reshape(len(x), -1)).reshape(made.shape)
            for made, cache in zip((keys, values), self._caches, strict=True)
        )
        mixed = places.attend(queries, keys, values, caches, self._scale)
        if gate is not None:
            mixed /= 1 + np.exp(-gate)
        return self._o(mixed)


class CpuLatentAttention:
    """Multi-head latent attention; see `msquant.models.layers.LatentAttention`."""

    def __init__(self, config: ModelConfig, sizes: LatentSizes, source: WeightSource, name: str) -> None:
        self._heads, self._sizes = config.num_attention_heads, sizes
        self._scale = np.float32(softmax_scale(config, sizes))
        names = config.family.names
        first = names.queries if sizes.q_lora_rank is None else names.queries_down
        linears = [read_linear(config, source, f"{name}.{part}") for part in (first, names.latent_down)]
        self._compress = linear_layer(*linears)
        self._queries = len(linears[0].weight)
        self._q_norm = self._q_b = None
        if sizes.q_lora_rank is not None:
            norm = f"{name}.{names.queries_down_norm}"
            self._q_norm = CpuRMSNorm.read(config, source, norm, INNER_NORM_EPS)
            self._q_b = linear_layer(read_linear(config, source, f"{name}.{names.queries_up}"))
        self._kv_norm = CpuRMSNorm.read(config, source, f"{name}.{names.latent_norm}", INNER_NORM_EPS)
        up = read_linear(config, source, f"{name}.{names.latent_up}")
        self._kv_b = linear_layer(up)
        self._cache = linears[1].cache
        if self._cache is not None:
            self._up = float_weight(up).reshape(self._heads, -1, sizes.kv_lora_rank)
        self._o = linear_layer(read_linear(config, source, f"{name}.{names.output}"))

    def __call__(self, x: Array, places: Places, caches: Sequence[LayerCache]) -> Array:
        """`[T, H]` to the same."""
        tokens, nope, rank = len(x), self._sizes.qk_nope_head_dim, self._sizes.kv_lora_rank
        reduced = self._compress(x)
        queries, latent = reduced[:, : self._queries], reduced[:, self._queries :]
        if self._q_norm is not None and self._q_b is not None:
            queries = self._q_b(self._q_norm(queries))
        queries = queries.reshape(tokens, self._heads, -1)
        rotated, shared = places.rotate(queries[:, :, nope:]), places.rotate(latent[:, None, rank:])
        compressed = self._kv_norm(latent[:, :rank])
        if self._cache is not None:
            # In the channels of what is kept, see `msquant.models.layers.Absorbed`.
            turned = np.matmul(queries[:, :, :nope].swapaxes(0, 1), self._up[:, :nope])
            scale = token_scales(turned.reshape(-1, rank)).reshape(self._heads, tokens, 1)
            turned = (np.rint(turned / scale) * scale).swapaxes(0, 1)
            kept = self._cache.rounded(compressed)[:, None]
            queries, keys = (np.concatenate(parts, axis=2) for parts in ((turned, rotated), (kept, shared)))
            mixed = places.attend(queries, keys, kept, caches, self._scale).reshape(tokens, -1, rank)
            values = np.matmul(mixed.swapaxes(0, 1), self._up[:, nope:].swapaxes(1, 2))
            return self._o(values.swapaxes(0, 1).reshape(tokens, -1))
        queries = np.concatenate([queries[:, :, :nope], rotated], axis=2)
        expanded = self._kv_b(compressed).reshape(tokens, self._heads, -1)
        shared = np.broadcast_to(shared, (tokens, self._heads, shared.shape[2]))
        keys = np.concatenate([expanded[:, :, :nope], shared], axis=2)
        return self._o(places.attend(queries, keys, expanded[:, :, nope:], caches, self._scale))
