"""A decoder layer as a MindSpore cell, from operators that CPU and Ascend both have."""

from collections.abc import Callable
from typing import Any, Literal

from mindspore import Tensor, nn

from msquant.checkpoint.weights import WeightSource
from msquant.models.attention import Attention, KeyValueCache
from msquant.models.cells import RMSNorm, norm_cell
from msquant.models.config import ModelConfig
from msquant.models.feed_forward import MLP
from msquant.models.mla import LatentAttention
from msquant.models.moe import MoE
from msquant.models.positions import Positions, positions

__all__ = ["DecoderLayer", "KeyValueCache", "Part", "Positions", "RMSNorm", "State", "positions"]

Part = Literal["whole", "attention"]
State = tuple[Tensor, ...]


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
        self.input_layernorm = norm_cell(config, source, f"{name}.input_layernorm", dtype)
        # Not methods of self: the layer would refer to itself, and wait for the garbage collector.
        steps: list[tuple[str, Callable[..., State]]] = [("", DecoderLayer._normalize)]
        if config.latent is None:
            self.self_attn: Any = Attention(config, source, f"{name}.self_attn", dtype)
            steps += [("qkv", DecoderLayer._attend)]
        else:
            self.self_attn = LatentAttention(config, config.latent, source, f"{name}.self_attn", dtype)
            steps += [("q_kv_a", DecoderLayer._compress)]
            steps += [("q_b", DecoderLayer._expand_queries)] if self.self_attn.compresses_queries else []
            steps += [("kv_b", DecoderLayer._attend_latent)]
        self.post_attention_layernorm: RMSNorm | None = None
        steps += [("o", DecoderLayer._project)]
        if part == "whole":
            norm = f"{name}.post_attention_layernorm"
            self.post_attention_layernorm = norm_cell(config, source, norm, dtype)
            if config.has_experts(index):
                self.mlp: Any = MoE(config, source, f"{name}.mlp", dtype, resident)
                steps += [("", DecoderLayer._mix)]
            else:
                self.mlp = MLP(config, source, f"{name}.mlp", dtype)
                steps += [("gate_up", DecoderLayer._gate), ("down", DecoderLayer._finish)]
        self._steps = tuple(step for _, step in steps)
        self.step_of = {group: i for i, (group, _) in enumerate(steps) if group}

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
        state: State,
        batch: int,
        places: Positions,
        cache: KeyValueCache | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> State:
        """Run the steps from `start` to `stop` (excluded) on what the step before `start` returned.

        The first state is `(hidden [B*T, H],)`, the last `(output [B*T, H],)`.
        """
        for step in self._steps[start:stop]:
            state = step(self, state, batch, places, cache)
        return state

    def _normalize(self, state: State, *_: Any) -> State:
        (hidden,) = state
        return hidden, self.input_layernorm(hidden)

    def _attend(self, state: State, batch: int, places: Positions, cache: KeyValueCache | None) -> State:
        hidden, x = state
        return hidden, self.self_attn.context(x, batch, places, cache)

    def _compress(self, state: State, *_: Any) -> State:
        hidden, x = state
        queries, compressed, shared = self.self_attn.compress(x)
        if self.self_attn.compresses_queries:
            return hidden, queries, compressed, shared
        return hidden, compressed, queries, shared

    def _expand_queries(self, state: State, *_: Any) -> State:
        hidden, x, compressed, shared = state
        return hidden, compressed, self.self_attn.q_b_proj(x), shared

    def _attend_latent(
        self, state: State, batch: int, places: Positions, cache: KeyValueCache | None
    ) -> State:
        hidden, x, queries, shared = state
        return hidden, self.self_attn.context(queries, x, shared, batch, places, cache)

    def _project(self, state: State, *_: Any) -> State:
        hidden, context = state
        hidden = hidden + self.self_attn.o_proj(context)
        if self.post_attention_layernorm is None:
            return (hidden,)
        return hidden, self.post_attention_layernorm(hidden)

    def _mix(self, state: State, *_: Any) -> State:
        hidden, x = state
        return (hidden + self.mlp(x),)

    def _gate(self, state: State, *_: Any) -> State:
        hidden, x = state
        return hidden, self.mlp.gated(x)

    def _finish(self, state: State, *_: Any) -> State:
        hidden, gated = state
        return (hidden + self.mlp.down_proj(gated),)
