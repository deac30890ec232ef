"""A decoder layer of the Llama family as MindSpore cells, from operators that CPU and Ascend both have."""

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from numpy.typing import NDArray

from msquant.checkpoint.weights import WeightSource
from msquant.errors import CheckpointError
from msquant.models.config import ModelConfig, check_shape
from msquant.models.linear import linear_cell
from msquant.models.rope import rotary_tables


class Positions:
    """What a decoder layer knows of its tokens' places, in the shapes that it asks for.

    Full shapes, kept for the next layer: on a CPU an operator that broadcasts takes 20 times longer.

    Args:
        cos: float32 `[T, head_dim]`.
        sin: float32 `[T, head_dim]`.
        mask: float32 `[T, past + T]`, 0 where a token may look and a large negative number where not.
        dtype: compute dtype.
    """

    def __init__(
        self, cos: NDArray[np.float32], sin: NDArray[np.float32], mask: NDArray[np.float32], dtype: Any
    ) -> None:
        half = sin.shape[1] // 2
        # Rotating is then a swap of the halves: its minus sign is in the table.
        signed = np.concatenate([-sin[:, :half], sin[:, half:]], axis=1)
        self._tables = {"cos": (cos, dtype), "sin": (signed, dtype), "mask": (mask, ms.float32)}
        self._full: dict[tuple[str, int, int], Tensor] = {}

    def rotate(self, x: Tensor) -> Tensor:
        """Apply the rotary embedding to queries or keys, `[B, heads, T, head_dim]`."""
        half = x.shape[3] // 2
        swapped = ops.cat((x[..., half:], x[..., :half]), axis=-1)
        return x * self._get("cos", x) + swapped * self._get("sin", x)

    def hide_future(self, scores: Tensor) -> Tensor:
        """Add the causal mask to attention scores, `[B, heads, T, past + T]`."""
        return scores + self._get("mask", scores)

    def _get(self, name: str, like: Tensor) -> Tensor:
        batch, heads = like.shape[:2]
        key = name, batch, heads
        if key not in self._full:
            table, dtype = self._tables[name]
            self._full[key] = Tensor(np.broadcast_to(table, (batch, heads, *table.shape)).copy(), dtype)
        return self._full[key]


def positions(config: ModelConfig, length: int, dtype: Any, past: int = 0) -> Positions:
    """Rotary tables and causal mask for `length` tokens that follow `past` cached ones."""
    cos, sin = rotary_tables(config, past, length)
    visible = np.arange(past + length)[None, :] <= np.arange(past, past + length)[:, None]
    mask = np.where(visible, 0, np.finfo(np.float32).min).astype(np.float32)
    return Positions(cos, sin, mask, dtype)


class KeyValueCache:
    """Keys and values of one decoder layer, `[B, key-value heads, past, head_dim]` each."""

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


class RMSNorm(nn.Cell):
    """`x / sqrt(mean(x^2) + eps) * weight`, the mean in float32 (arXiv 1910.07467)."""

    def __init__(self, weight: NDArray[np.float32], eps: float, dtype: Any) -> None:
        super().__init__()
        self.weight = Parameter(Tensor(weight, dtype))
        self.eps = eps
        self.mean = ops.ReduceMean(keep_dims=True)
        self.outer = ops.MatMul()

    def construct(self, x: Tensor) -> Tensor:
        """`[T, H]` to the same."""
        wide = x.astype(ms.float32)
        scale = ops.rsqrt(self.mean(ops.square(wide), -1) + self.eps)
        # An outer product, because on a CPU an operator that broadcasts takes 20 times longer.
        factors = self.outer(scale, self.weight.astype(ms.float32).reshape(1, -1))
        return (wide * factors).astype(x.dtype)


class Attention(nn.Cell):
    """Causal self-attention with grouped queries and rotary positions."""

    def __init__(self, config: ModelConfig, source: WeightSource, name: str, dtype: Any) -> None:
        super().__init__()
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.q_proj = _linear(config, source, f"{name}.q_proj", dtype)
        self.k_proj = _linear(config, source, f"{name}.k_proj", dtype)
        self.v_proj = _linear(config, source, f"{name}.v_proj", dtype)
        self.o_proj = _linear(config, source, f"{name}.o_proj", dtype)
        self.scale = config.head_dim**-0.5
        self.scores = ops.BatchMatMul(transpose_b=True)
        self.mix = ops.BatchMatMul()

    def context(self, x: Tensor, batch: int, places: Positions, cache: KeyValueCache | None) -> Tensor:
        """The input of `o_proj`: `[B*T, H]` to `[B*T, heads * head_dim]`."""
        length = x.shape[0] // batch
        queries = places.rotate(self._split(self.q_proj(x), batch, self.heads))
        keys = places.rotate(self._split(self.k_proj(x), batch, self.groups))
        values = self._split(self.v_proj(x), batch, self.groups)
        if cache is not None:
            keys, values = cache.extend(keys, values)
        # The query heads of one key-value head are stacked along the tokens instead of repeating the keys.
        per_group = self.heads // self.groups
        queries = queries.reshape(batch, self.groups, per_group * length, self.head_dim)
        scores = self.scores(queries, keys).astype(ms.float32) * self.scale
        scores = places.hide_future(scores.reshape(batch, self.heads, length, -1))
        weights = ops.softmax(scores, axis=-1).astype(x.dtype)
        mixed = self.mix(weights.reshape(batch, self.groups, per_group * length, -1), values)
        mixed = mixed.reshape(batch, self.heads, length, self.head_dim).transpose(0, 2, 1, 3)
        return mixed.reshape(batch * length, self.heads * self.head_dim)

    def _split(self, x: Tensor, batch: int, heads: int) -> Tensor:
        return x.reshape(batch, -1, heads, self.head_dim).transpose(0, 2, 1, 3)


class MLP(nn.Cell):
    """The gated feed-forward block: `down(silu(gate(x)) * up(x))` (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, source: WeightSource, name: str, dtype: Any) -> None:
        super().__init__()
        self.gate_proj = _linear(config, source, f"{name}.gate_proj", dtype)
        self.up_proj = _linear(config, source, f"{name}.up_proj", dtype)
        self.down_proj = _linear(config, source, f"{name}.down_proj", dtype)

    def gated(self, x: Tensor) -> Tensor:
        """The input of `down_proj`: `[T, H]` to `[T, intermediate]`."""
        return ops.silu(self.gate_proj(x)) * self.up_proj(x)


class DecoderLayer(nn.Cell):
    """One decoder layer, `[B, T, H]` to the same, as a chain of steps.

    Step `i + 1` holds the linears of smooth group `i` of the family, so a search over one group computes the
    steps before it once (`run(state, 0, i + 1)`) and only the rest for every candidate (`run(state, i + 1)`).
    """

    def __init__(self, config: ModelConfig, source: WeightSource, name: str, dtype: Any) -> None:
        super().__init__()
        self.input_layernorm = _norm(config, source, f"{name}.input_layernorm", dtype)
        self.self_attn = Attention(config, source, f"{name}.self_attn", dtype)
        self.post_attention_layernorm = _norm(config, source, f"{name}.post_attention_layernorm", dtype)
        self.mlp = MLP(config, source, f"{name}.mlp", dtype)
        self._steps = (self._normalize, self._attend, self._project, self._gate, self._finish)

    @property
    def steps(self) -> int:
        """How many steps the layer is made of."""
        return len(self._steps)

    def construct(self, hidden: Tensor, places: Positions, cache: KeyValueCache | None = None) -> Tensor:
        """`[B, T, H]` to `[B, T, H]`; with a cache, the tokens follow those in it."""
        batch, length, size = hidden.shape
        state = (hidden.reshape(batch * length, size),)
        return self.run(state, batch, places, cache)[0].reshape(batch, length, size)

    def run(
        self,
        state: tuple[Tensor, ...],
        batch: int,
        places: Positions,
        cache: KeyValueCache | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Run the steps from `start` to `stop` (excluded) on what the step before `start` returned.

        The first state is `(hidden [B*T, H],)`, the last `(output [B*T, H],)`.
        """
        for step in self._steps[start:stop]:
            state = step(state, batch, places, cache)
        return state

    def _normalize(self, state: Any, *_: Any) -> tuple[Tensor, ...]:
        (hidden,) = state
        return hidden, self.input_layernorm(hidden)

    def _attend(
        self, state: Any, batch: int, places: Positions, cache: KeyValueCache | None
    ) -> tuple[Tensor, ...]:
        hidden, x = state
        return hidden, self.self_attn.context(x, batch, places, cache)

    def _project(self, state: Any, *_: Any) -> tuple[Tensor, ...]:
        hidden, context = state
        hidden = hidden + self.self_attn.o_proj(context)
        return hidden, self.post_attention_layernorm(hidden)

    def _gate(self, state: Any, *_: Any) -> tuple[Tensor, ...]:
        hidden, x = state
        return hidden, self.mlp.gated(x)

    def _finish(self, state: Any, *_: Any) -> tuple[Tensor, ...]:
        hidden, gated = state
        return (hidden + self.mlp.down_proj(gated),)


def _norm(config: ModelConfig, source: WeightSource, name: str, dtype: Any) -> RMSNorm:
    weight = source.tensor(f"{name}.weight")
    check_shape(config, f"{name}.weight", weight.shape)
    return RMSNorm(weight, config.rms_norm_eps, dtype)


def _linear(config: ModelConfig, source: WeightSource, name: str, dtype: Any) -> nn.Cell:
    linear = source.linear(name)
    check_shape(config, f"{name}.weight", linear.weight.shape)
    if (linear.bias is not None) != (f"{name}.bias" in config.shapes):
        found, asked = ("has a", "none") if linear.bias is not None else ("has no", "one")
        raise CheckpointError(
            f"{name} {found} bias, config.json asks for {asked}",
            remedy="use the config.json that belongs to these weights",
        )
    return linear_cell(linear, dtype)
