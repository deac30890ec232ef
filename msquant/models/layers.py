"""A decoder layer as a MindSpore cell, from operators that CPU and Ascend both have.

Multi-head latent attention is that of DeepSeek-V2 (arXiv 2405.04434): queries, keys and values from few
channels.
"""

from collections.abc import Callable
from typing import Any, Literal

import mindspore as ms
from mindspore import Tensor, nn, ops

from msquant.checkpoint.weights import INT8_MAX, CacheScale, Linear, WeightSource, float_weight
from msquant.families.base import LatentSizes
from msquant.models.attention import Attention, CacheRounding, KeyValueCache, ScaledDotProduct
from msquant.models.cells import RMSNorm, add_linears, norm_cell
from msquant.models.config import INNER_NORM_EPS, ModelConfig
from msquant.models.delta_net import DeltaCache, GatedDeltaNet
from msquant.models.feed_forward import MLP
from msquant.models.moe import MoE
from msquant.models.positions import Positions, by_head, positions
from msquant.models.rope import softmax_scale


class Absorbed:
    """Queries in the channels of the latent state, and what attention mixes of it, as `[heads, D, rank]`.

    With an int8 cache attention looks at the latent state as it is kept, so queries are turned into its
    channels (`q W_UK`, arXiv 2405.04434) and rounded there, each by its own range, as the servers' operators
    do (aclnnMlaPrologV2: `dequantScaleQNope`).

    Args:
        up: what makes keys and values of the latent state.
        cache: of the latent state.
        heads: of attention.
        nope: channels of a head's keys without a position.
        dtype: compute dtype.
    """

    def __init__(self, up: Linear, cache: CacheScale, heads: int, nope: int, dtype: Any) -> None:
        weight = float_weight(up).reshape(heads, -1, up.weight.shape[1])
        self._keys, self._values = (
            Tensor(part.copy(), dtype) for part in (weight[:, :nope], weight[:, nope:])
        )
        self._into, self._out_of = ops.BatchMatMul(), ops.BatchMatMul(transpose_b=True)
        self.kept = CacheRounding(cache, 1)

    def queries(self, queries: Tensor) -> Tensor:
        """Rounded, `[B, heads, T, nope]` to `[B, heads, T, rank]`."""
        batch, heads, length, channels = queries.shape
        stacked = queries.transpose(1, 0, 2, 3).reshape(heads, batch * length, channels)
        turned = self._into(stacked, self._keys).astype(ms.float32)
        scale = ops.abs(turned).max(axis=-1, keepdims=True) / INT8_MAX
        scale = ops.select(scale > 0, scale, ops.ones_like(scale))
        rounded = (ops.round(turned / scale) * scale).astype(queries.dtype)
        return rounded.reshape(heads, batch, length, -1).transpose(1, 0, 2, 3)

    def values(self, mixed: Tensor) -> Tensor:
        """Of what was mixed of the latent state: `[B*T, heads * rank]` to `[B*T, heads * v_head_dim]`."""
        heads, _, rank = self._values.shape
        expanded = self._out_of(mixed.reshape(-1, heads, rank).transpose(1, 0, 2), self._values)
        return expanded.transpose(1, 0, 2).reshape(mixed.shape[0], -1)


class LatentAttention(nn.Cell):
    """Causal self-attention whose keys and values are made of a compressed state.

    A head's keys are its own rows, without a position, of what the compressed state is expanded to, followed
    by rotated channels that all heads share. Where the linear that makes the compressed state says so, that
    of every token is read as an int8 cache gives it back, as in `Attention`.
    """

    def __init__(
        self, config: ModelConfig, sizes: LatentSizes, source: WeightSource, name: str, dtype: Any
    ) -> None:
        super().__init__()
        self.heads, self.sizes = config.num_attention_heads, sizes
        self.compresses_queries = sizes.q_lora_rank is not None
        self.names = names = config.family.names
        linears, norms = [names.queries], [names.latent_norm]
        if self.compresses_queries:
            linears, norms = [names.queries_down, names.queries_up], [names.queries_down_norm, *norms]
        linears += [names.latent_down, names.latent_up, names.output]
        made = add_linears(self, config, source, name, dtype, *linears)
        cache, nope = made[names.latent_down].cache, sizes.qk_nope_head_dim
        self.absorbed = None
        if cache is not None:
            self.absorbed = Absorbed(made[names.latent_up], cache, self.heads, nope, dtype)
        for norm in norms:
            setattr(self, norm, norm_cell(config, source, f"{name}.{norm}", dtype, INNER_NORM_EPS))
        self.attend = ScaledDotProduct(softmax_scale(config, sizes))

    def compress(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the layer's input is reduced to, `[B*T, H]` to three tensors with `B*T` rows.

        Returns:
            The compressed queries (or the queries themselves where they are not), the compressed keys and
            values, and the keys' shared channels that are yet to be rotated.
        """
        names = self.names
        latent = getattr(self, names.latent_down)(x)
        compressed, shared = ops.split(latent, (self.sizes.kv_lora_rank, self.sizes.qk_rope_head_dim), axis=1)
        if self.compresses_queries:
            queries = getattr(self, names.queries_down_norm)(getattr(self, names.queries_down)(x))
        else:
            queries = getattr(self, names.queries)(x)
        return queries, getattr(self, names.latent_norm)(compressed), shared

    def expand_queries(self, compressed: Tensor) -> Tensor:
        """Compressed queries to `[B*T, heads * qk_head_dim]`."""
        return getattr(self, self.names.queries_up)(compressed)

    def context(
        self,
        queries: Tensor,
        compressed: Tensor,
        shared: Tensor,
        batch: int,
        places: Positions,
        cache: KeyValueCache | None,
    ) -> Tensor:
        """The input of the output projection, `[B*T, heads * v_head_dim]`.

        Args:
            queries: `[B*T, heads * qk_head_dim]`.
            compressed: keys and values, `[B*T, kv_lora_rank]`.
            shared: the keys' shared channels, `[B*T, qk_rope_head_dim]`.
            batch: B.
            places: the tokens' positions.
            cache: of the tokens before these; extended in place.
        """
        nope, value = self.sizes.qk_nope_head_dim, self.sizes.v_head_dim
        queries, latent, rotated = self.project(queries, compressed, shared, batch, places)
        if self.absorbed is not None:
            kept = self.absorbed.kept(latent)
            own, positions = ops.split(queries, (nope, self.sizes.qk_rope_head_dim), axis=3)
            queries = ops.cat((self.absorbed.queries(own), positions), axis=3)
            keys, values = ops.cat((kept, rotated), axis=3), kept
            if cache is not None:
                keys, values = cache.extend(keys, values)
            return self.absorbed.values(self.attend(queries, keys, values, places))
        expanded = by_head(getattr(self, self.names.latent_up)(compressed), batch, self.heads)
        own, values = ops.split(expanded, (nope, value), axis=3)
        keys = ops.cat((own, ops.tile(rotated, (1, self.heads, 1, 1))), axis=3)
        if cache is not None:
            keys, values = cache.extend(keys, values)
        return self.attend(queries, keys, values, places)

    def project(
        self, queries: Tensor, compressed: Tensor, shared: Tensor, batch: int, places: Positions
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, the latent state and its shared channels by head; arguments as `context`.

        Returns:
            `[B, heads, T, qk_head_dim]`, rotated; `[B, 1, T, kv_lora_rank]`; `[B, 1, T, qk_rope_head_dim]`,
            rotated.
        """
        return (
            places.rotate(by_head(queries, batch, self.heads)),
            by_head(compressed, batch, 1),
            places.rotate(by_head(shared, batch, 1)),
        )


__all__ = ["DecoderLayer", "KeyValueCache", "Part", "Positions", "RMSNorm", "State", "positions"]

Part = Literal["whole", "attention"]
State = tuple[Tensor, ...]
Cache = KeyValueCache | DeltaCache


class DecoderLayer(nn.Cell):
    """One decoder layer, `[B, T, H]` to the same, as a chain of steps.

    Every step but the first starts with the linears of one smooth group (the mixture of experts, which has
    none, with its router). So a search over one group computes the steps before it once,
    `run(state, stop=step_of[group])`, and only the rest for every candidate, `run(state,
    start=step_of[group])`. The state before such a step is `(hidden, x, ...)` with the residual stream first,
    the input of the linears second, and what later steps need behind.

    Args:
        config: the model's shape.
        source: its weights.
        index: the layer's number, or its name, for example `model.layers.3`.
        dtype: compute dtype, as `use_device` returned it.
        part: "attention" for the layer up to the residual stream behind attention; the feed-forward block and
            the norm before it are then neither read nor computed.
        resident: keep all experts in memory, see `MoE`.

    Attributes:
        step_of: the step that starts with a smooth group's linears, by the group's name.

    Raises:
        CheckpointError: a weight is missing or damaged, or does not fit the config.
    """

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        index: int | str,
        dtype: Any,
        part: Part = "whole",
        *,
        resident: bool = False,
    ) -> None:
        super().__init__()
        index = int(index.rsplit(".", 1)[1]) if isinstance(index, str) else index
        name = config.family.layer_name(index)
        self.names = names = config.family.names
        groups = config.mixer_groups(index)
        self.mixer = config.mixer(index)
        block = f"{name}.{self.mixer}"
        setattr(self, names.input_norm, norm_cell(config, source, f"{name}.{names.input_norm}", dtype))
        mixer: Any
        if (delta := config.delta_rule(index)) is not None:
            mixer = GatedDeltaNet(config, delta, source, block, dtype)
        elif config.latent is None:
            mixer = Attention(config, source, block, dtype)
        else:
            mixer = LatentAttention(config, config.latent, source, block, dtype)
        self.mixes_by_delta_rule = isinstance(mixer, GatedDeltaNet)
        setattr(self, self.mixer, mixer)
        self._output_norm(config, source, name, names.attention_output_norm, dtype)
        experts = part == "whole" and config.has_experts(index)
        for unused in (names.feed_forward_norm, names.feed_forward_output_norm):
            if unused is not None:
                setattr(self, unused, None)
        if part == "whole":
            norm, block = f"{name}.{names.feed_forward_norm}", f"{name}.{names.feed_forward}"
            setattr(self, names.feed_forward_norm, norm_cell(config, source, norm, dtype))
            feed_forward: Any
            if experts:
                feed_forward = MoE(config, source, block, dtype, resident)
            else:
                feed_forward = MLP(config, source, block, dtype)
                groups += config.feed_forward_groups
            setattr(self, names.feed_forward, feed_forward)
            self._output_norm(config, source, name, names.feed_forward_output_norm, dtype)
        # Not methods of self: the layer would refer to itself, and wait for the garbage collector.
        steps: list[tuple[str, Callable[..., State]]]
        first = DecoderLayer._normalize_and_gate if self.mixes_by_delta_rule else DecoderLayer._normalize
        steps = [("", first), *((group.name, _STEPS[group.name]) for group in groups)]
        steps += [("", DecoderLayer._mix)] if experts else []
        self._steps = tuple(step for _, step in steps)
        self.step_of = {group: i for i, (group, _) in enumerate(steps) if group}

    def _output_norm(
        self, config: ModelConfig, source: WeightSource, layer: str, norm: str | None, dtype: Any
    ) -> None:
        if norm is not None:
            setattr(self, norm, norm_cell(config, source, f"{layer}.{norm}", dtype))

    def _add(self, hidden: Tensor, output: Tensor, norm: str | None) -> Tensor:
        """The residual stream behind a block."""
        return hidden + (output if norm is None else getattr(self, norm)(output))

    @property
    def steps(self) -> int:
        """How many steps the layer is made of."""
        return len(self._steps)

    def new_cache(self) -> Cache:
        """What keeps the tokens that the layer has seen, empty."""
        return DeltaCache() if self.mixes_by_delta_rule else KeyValueCache()

    def construct(self, hidden: Tensor, places: Positions, cache: Cache | None = None) -> Tensor:
        """`[B, T, H]` to `[B, T, H]`; with a cache, the tokens follow those in it."""
        batch, length, size = hidden.shape
        state = (hidden.reshape(batch * length, size),)
        return self.run(state, batch, places, cache)[0].reshape(batch, length, size)

    def run(
        self,
        state: State,
        batch: int,
        places: Positions,
        cache: Cache | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> State:
        """Run the steps from `start` to `stop` (excluded) on what the step before `start` returned.

        The first state is `(hidden [B*T, H],)`, the last `(output [B*T, H],)`.
        """
        for step in self._steps[start:stop]:
            state = step(self, state, batch, places, cache)
        return state

    @property
    def mixer_block(self) -> Any:
        """What mixes tokens: attention with grouped queries or latent, or the delta rule."""
        return getattr(self, self.mixer)

    @property
    def feed_forward(self) -> Any:
        """Its feed-forward block, dense or a mixture of experts."""
        return getattr(self, self.names.feed_forward)

    def _normalize(self, state: State, *_: Any) -> State:
        (hidden,) = state
        return hidden, getattr(self, self.names.input_norm)(hidden)

    def _normalize_and_gate(self, state: State, *_: Any) -> State:
        hidden, x = self._normalize(state)
        # Made before the step that a search begins with: a candidate quantizes what the linears read alone.
        return hidden, x, self.mixer_block.gates(x)

    def _apply_delta_rule(self, state: State, batch: int, places: Positions, cache: Cache | None) -> State:
        hidden, x, gates = state
        return hidden, self.mixer_block.context(x, gates, batch, cache)

    def _attend(self, state: State, batch: int, places: Positions, cache: Cache | None) -> State:
        hidden, x = state
        return hidden, self.mixer_block.context(x, batch, places, cache)

    def _compress(self, state: State, *_: Any) -> State:
        hidden, x = state
        queries, compressed, shared = self.mixer_block.compress(x)
        if self.mixer_block.compresses_queries:
            return hidden, queries, compressed, shared
        return hidden, compressed, queries, shared

    def _expand_queries(self, state: State, *_: Any) -> State:
        hidden, x, compressed, shared = state
        return hidden, compressed, self.mixer_block.expand_queries(x), shared

    def _attend_latent(self, state: State, batch: int, places: Positions, cache: Cache | None) -> State:
        hidden, x, queries, shared = state
        return hidden, self.mixer_block.context(queries, x, shared, batch, places, cache)

    def _project(self, state: State, *_: Any) -> State:
        hidden, context = state
        linear = self.names.delta_output if self.mixes_by_delta_rule else self.names.output
        output = getattr(self.mixer_block, linear)(context)
        hidden = self._add(hidden, output, self.names.attention_output_norm)
        norm = getattr(self, self.names.feed_forward_norm)
        return (hidden,) if norm is None else (hidden, norm(hidden))

    def _mix(self, state: State, *_: Any) -> State:
        hidden, x = state
        return (self._add(hidden, self.feed_forward(x), self.names.feed_forward_output_norm),)

    def _gate(self, state: State, *_: Any) -> State:
        hidden, x = state
        return hidden, self.feed_forward.gated(x)

    def _finish(self, state: State, *_: Any) -> State:
        hidden, gated = state
        output = self.feed_forward.down(gated)
        return (self._add(hidden, output, self.names.feed_forward_output_norm),)


# The step that starts with the linears of a smooth group, by the group's name.
_STEPS: dict[str, Callable[..., State]] = {
    "qkv": DecoderLayer._attend,
    "qkvz": DecoderLayer._apply_delta_rule,
    "q_kv_a": DecoderLayer._compress,
    "q_b": DecoderLayer._expand_queries,
    "kv_b": DecoderLayer._attend_latent,
    "o": DecoderLayer._project,
    "gate_up": DecoderLayer._gate,
    "down": DecoderLayer._finish,
}
