"""Causal self-attention with grouped queries, and the key-value cache."""

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from numpy.typing import NDArray

from msquant.checkpoint.weights import INT8_MAX, INT8_MIN, CacheScale, WeightSource
from msquant.models.cells import add_linears, norm_cell
from msquant.models.config import ModelConfig
from msquant.models.positions import Positions, by_head, by_token


class KeyValueCache:
    """Keys and values of one decoder layer, `[B, key-value heads, past, channels]`, each of its own width."""

    def __init__(self) -> None:
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append those of new tokens and return all of them."""
        if self._keys is not None and self._values is not None:
            keys = ops.cat((self._keys, keys), axis=2)
            values = ops.cat((self._values, values), axis=2)
        self._keys, self._values = keys, values
        return keys, values


class CacheRounding:
    """What is read back of an int8 cache: see `CacheScale`. Keys and values `[B, heads, T, channels]`."""

    def __init__(self, scale: CacheScale, heads: int) -> None:
        self._scale = scale
        self._shape = 1, heads, 1, len(scale.scale) // heads
        self._kept: dict[tuple[int, ...], list[Tensor]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """To the same shape and dtype."""
        if x.shape not in self._kept:
            # In full shape, as `Positions` has its tables, and of one shape at a time: while tokens are
            # generated, every step but the first has the same.
            tables = self._scale.scale, self._scale.reciprocal, self._scale.offset
            self._kept = {x.shape: [self._table(values, x) for values in tables if values is not None]}
        scale, reciprocal, *offset = self._kept[x.shape]
        kept = x.astype(ms.float32) * reciprocal
        kept = ops.clamp(ops.round(kept + offset[0] if offset else kept), float(INT8_MIN), float(INT8_MAX))
        return (kept * scale).astype(x.dtype)

    def _table(self, values: NDArray[np.float32], x: Tensor) -> Tensor:
        return Tensor(np.broadcast_to(values.reshape(self._shape), x.shape).copy(), ms.float32)


class ScaledDotProduct(nn.Cell):
    """`softmax(queries keys^T * scale + causal mask) values` (arXiv 1706.03762), the softmax in float32."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.mix = ops.BatchMatMul()

    def construct(self, queries: Tensor, keys: Tensor, values: Tensor, places: Positions) -> Tensor:
        """Queries `[B, heads, T, D]`, keys `[B, groups, S, D]`, values `[B, groups, S, V]`.

        Returns:
            `[B*T, heads * V]`.
        """
        batch, heads, length, channels = queries.shape
        groups = keys.shape[1]
        # The query heads of one key-value head are stacked along the tokens instead of repeating the keys.
        rows = heads // groups * length
        scores = self.scores(queries.reshape(batch, groups, rows, channels), keys)
        scores = scores.astype(ms.float32) * self.scale
        scores = places.hide_future(scores.reshape(batch, heads, length, -1))
        weights = ops.softmax(scores, axis=-1).astype(values.dtype)
        mixed = self.mix(weights.reshape(batch, groups, rows, -1), values)
        return by_token(mixed.reshape(batch, heads, length, -1))


class Attention(nn.Cell):
    """Causal self-attention with grouped queries and rotary positions.

    Where the linears that make keys and values say so, those of every token are read as an int8 cache gives
    them back, whether the token was cached before or not: each token is computed as it is while generating.
    """

    def __init__(self, config: ModelConfig, source: WeightSource, name: str, dtype: Any) -> None:
        super().__init__()
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.output_gate = config.family.output_gate
        self.head_dim = config.head_dim
        self.names = names = config.family.names
        linears = names.queries, names.keys, names.values, names.output
        made = add_linears(self, config, source, name, dtype, *linears)
        caches = (made[part].cache for part in (names.keys, names.values))
        self.key_cache, self.value_cache = (
            None if cache is None else CacheRounding(cache, self.groups) for cache in caches
        )
        for norm in (names.query_norm, names.key_norm):
            normed = config.query_key_norms
            setattr(self, norm, norm_cell(config, source, f"{name}.{norm}", dtype) if normed else None)
        self.attend = ScaledDotProduct(config.head_dim**-0.5)

    def context(self, x: Tensor, batch: int, places: Positions, cache: KeyValueCache | None) -> Tensor:
        """The input of the output projection: `[B*T, H]` to `[B*T, heads * head_dim]`."""
        queries, keys, values, gate = self.project(x, batch, places)
        if self.key_cache is not None:
            keys = self.key_cache(keys)
        if self.value_cache is not None:
            values = self.value_cache(values)
        if cache is not None:
            keys, values = cache.extend(keys, values)
        mixed = self.attend(queries, keys, values, places)
        return mixed if gate is None else mixed * ops.sigmoid(gate)

    def project(
        self, x: Tensor, batch: int, places: Positions
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys and values, the first two rotated: `[B*T, H]` to `[B, heads, T, head_dim]` each.

        Behind them what gates the output, `[B*T, heads * head_dim]`, or None.
        """
        names = self.names
        queries, keys, values = (getattr(self, part)(x) for part in (names.queries, names.keys, names.values))
        gate: Tensor | None = None
        if self.output_gate:
            both = queries.reshape(-1, self.heads, 2, self.head_dim)
            queries, gate = (both[:, :, i].reshape(queries.shape[0], -1) for i in (0, 1))
        query_norm, key_norm = getattr(self, names.query_norm), getattr(self, names.key_norm)
        queries = places.rotate(self._split(queries, batch, self.heads, query_norm))
        keys = places.rotate(self._split(keys, batch, self.groups, key_norm))
        return queries, keys, self._split(values, batch, self.groups), gate

    def _split(self, x: Tensor, batch: int, heads: int, norm: nn.Cell | None = None) -> Tensor:
        if norm is not None:
            x = norm(x.reshape(-1, self.head_dim))
        return by_head(x.reshape(-1, heads * self.head_dim), batch, heads)
