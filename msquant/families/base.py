"""What a model family is: its names, its shapes, what feeds what, what engines do with it, what is refused.

`Family` is a decoder with grouped queries and gated feed-forward blocks as Llama has them. A family that
differs by names or options is an instance of it, and one that differs in its structure overrides a method.
"""

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass as checked_dataclass

from msquant.checkpoint.config_limits import check_number, check_numbers
from msquant.errors import CheckpointError, ModelError
from msquant.families.row_orders import RopeRows
from msquant.schemes import FLOAT, W8A8, W8A8_DYNAMIC, Scheme

Config = Mapping[str, Any]
"""The content of a `config.json`."""

Shapes = dict[str, tuple[int, ...]]

LinearShape = tuple[str, int, int, bool]
"""A linear's name within its block, output channels, input channels and whether it has a bias."""

_STRICT = ConfigDict(strict=True)


@checked_dataclass(frozen=True, config=_STRICT)
class LatentSizes:
    """The sizes of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

    Attributes:
        q_lora_rank: channels that queries are compressed to; None where they are not.
        kv_lora_rank: channels that keys and values are compressed to.
        qk_nope_head_dim: channels of a head's queries and keys without a position.
        qk_rope_head_dim: channels of a head's queries and keys that are rotated; all heads share such keys.
        v_head_dim: channels of a head's values.
        rope_interleave: whether the pairs that are rotated lie side by side, and not half a head apart.
    """

    q_lora_rank: PositiveInt | None
    kv_lora_rank: PositiveInt
    qk_nope_head_dim: PositiveInt
    qk_rope_head_dim: PositiveInt
    v_head_dim: PositiveInt
    rope_interleave: bool

    @property
    def qk_head_dim(self) -> int:
        """Channels of a head's queries and keys."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@checked_dataclass(frozen=True, config=_STRICT)
class ExpertSizes:
    """A mixture of experts, and how its router chooses among them.

    Attributes:
        count: routed experts of a layer.
        per_token: how many of them compute each token.
        intermediate_size: of each routed expert.
        shared: experts that compute every token, stored as one of `shared * intermediate_size`.
        groups: the experts are ranked in this many groups of equal size.
        groups_per_token: only experts of the best so many groups are chosen from.
        group_score: a group is worth the sum of its best so many experts.
        normalize: whether the chosen experts' weights are scaled to a sum of 1.
        scaling_factor: of the chosen experts' weights.
    """

    count: PositiveInt
    per_token: PositiveInt
    intermediate_size: PositiveInt
    shared: NonNegativeInt = 0
    groups: PositiveInt = 1
    groups_per_token: PositiveInt = 1
    group_score: PositiveInt = 1
    normalize: bool = False
    scaling_factor: PositiveFloat = 1.0


@checked_dataclass(frozen=True, config=_STRICT)
class DeltaSizes:
    """The sizes of gated delta rule attention (Gated DeltaNet, arXiv 2412.06464).

    Attributes:
        key_heads: heads of queries and keys; each serves `value_heads / key_heads` heads of values.
        value_heads: heads of values, each with a state `[key_dim, value_dim]` of its own.
        key_dim: channels of a head's queries and keys.
        value_dim: channels of a head's values.
        kernel: tokens that the short convolution in front sees, the one at hand included.
    """

    key_heads: PositiveInt
    value_heads: PositiveInt
    key_dim: PositiveInt
    value_dim: PositiveInt
    kernel: PositiveInt

    @property
    def repeat(self) -> int:
        """Heads of values that share a head of queries and keys."""
        return self.value_heads // self.key_heads

    @property
    def keys(self) -> int:
        """Channels of all queries, and of all keys."""
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        """Channels of all values, and of the gates of their outputs."""
        return self.value_heads * self.value_dim


@dataclass(frozen=True)
class Names:
    """What a family calls the parts of its decoder in a checkpoint; by default as Llama and DeepSeek do.

    The ends and `layers` are full names, all others are names within the part that holds them. What is None
    most families do not have: norms behind the two blocks, before their outputs are added to the residual
    stream; and gate and up as one linear, gate first.
    """

    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    layers: str = "model.layers"
    input_norm: str = "input_layernorm"
    attention: str = "self_attn"
    queries: str = "q_proj"
    keys: str = "k_proj"
    values: str = "v_proj"
    output: str = "o_proj"
    query_norm: str = "q_norm"
    key_norm: str = "k_norm"
    queries_down: str = "q_a_proj"
    queries_down_norm: str = "q_a_layernorm"
    queries_up: str = "q_b_proj"
    latent_down: str = "kv_a_proj_with_mqa"
    latent_norm: str = "kv_a_layernorm"
    latent_up: str = "kv_b_proj"
    attention_output_norm: str | None = None
    feed_forward_norm: str = "post_attention_layernorm"
    feed_forward_output_norm: str | None = None
    feed_forward: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    gate_up: str | None = None
    down: str = "down_proj"
    router: str = "gate"
    correction_bias: str = "e_score_correction_bias"
    experts: str = "experts"
    shared_experts: str = "shared_experts"
    shared_gate: str = "shared_expert_gate"
    delta: str = "linear_attn"
    delta_inputs: str = "in_proj_qkvz"
    delta_gates: str = "in_proj_ba"
    delta_convolution: str = "conv1d"
    delta_decay: str = "A_log"
    delta_step: str = "dt_bias"
    delta_norm: str = "norm"
    delta_output: str = "out_proj"
    prediction_embedding: str = "embed_tokens"
    prediction_embedding_norm: str = "enorm"
    prediction_hidden_norm: str = "hnorm"
    prediction_projection: str = "eh_proj"
    prediction_norm: str = "shared_head.norm"
    prediction_head: str = "shared_head.head"

    @property
    def around_prediction(self) -> tuple[str, ...]:
        """The parts of a multi-token-prediction layer that lie around the decoder layer in it."""
        return (
            self.prediction_embedding,
            self.prediction_embedding_norm,
            self.prediction_hidden_norm,
            self.prediction_projection,
            self.prediction_norm,
            self.prediction_head,
        )

    @property
    def feed_forward_inputs(self) -> tuple[str, ...]:
        """The linears that a feed-forward block's input goes to: gate and up, or the one that is both."""
        return (self.gate, self.up) if self.gate_up is None else (self.gate_up,)

    @property
    def output_norms(self) -> tuple[str, ...]:
        """The norms behind the two blocks of a layer, where there are such."""
        norms = self.attention_output_norm, self.feed_forward_output_norm
        return tuple(norm for norm in norms if norm is not None)

    def layer(self, index: int) -> str:
        """The name of decoder layer `index`."""
        return f"{self.layers}.{index}"

    def within_attention(self, *parts: str) -> tuple[str, ...]:
        """The names of parts of the attention block within the layer."""
        return tuple(f"{self.attention}.{part}" for part in parts)

    def within_feed_forward(self, *parts: str) -> tuple[str, ...]:
        """The names of parts of the feed-forward block within the layer."""
        return tuple(f"{self.feed_forward}.{part}" for part in parts)


@dataclass(frozen=True)
class SmoothGroup:
    """Linears that share one smooth scale, and the cell whose output carries its inverse.

    Attributes:
        name: how the group is called in recipes, progress and the manifest.
        linears: their names within the decoder layer.
        previous: the norm, or the linear, that the inverse scale is folded into. For the linear that makes
            keys and values of latent attention it is folded into the value rows only: each head has
            `qk_nope_head_dim` rows of keys, then `v_head_dim` rows of values. For the one that is gate and up
            it is folded into the second half of the rows, those of up.
        followers: further linears that read the same and stay in floating point, but take the scale.
        heads: so many heads share `previous`, a norm of one head's channels, and so the scale; None where
            nothing is shared but by the key-value heads of attention.
    """

    name: str
    linears: tuple[str, ...]
    previous: str
    followers: tuple[str, ...] = ()
    heads: int | None = None


@dataclass(frozen=True)
class DefaultRecipe:
    """What is done to a model without a recipe of its own.

    Attributes:
        formats: the formats that some server serves such a model in, the default one first; each format is
            written for one server.
        schemes: patterns of linears' names with the scheme of each, static where a server wants that; what a
            format's server runs per token as well becomes that, see `Format.per_token`.
        options: further options of the algorithm.
    """

    formats: tuple[str, ...]
    schemes: tuple[tuple[str, Scheme], ...]
    options: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """One architecture.

    Attributes:
        model_type: `model_type` in `config.json`.
        architecture: the entry of `architectures` in `config.json`.
        read_as: the `model_type` whose config class of transformers reads such a `config.json`, where
            transformers does not know this one.
        names: of its parts.
        attention: "grouped-query" (also multi-head), or "latent": multi-head latent attention.
        query_key_norms: whether queries and keys are normalized per head before the rotary embedding.
        attention_biases: whether queries, keys and values, and whether the output projection have biases;
            None where the entry `attention_bias` of `config.json` says it.
        feed_forward_biases: whether the entry `mlp_bias` of `config.json` can ask for biases.
        router: how a token's scores for the experts are made of the router's logits; None without experts.
        correction_bias: whether experts are chosen by their scores plus a stored bias.
        expert_count: the entry of `config.json` that counts the routed experts of a layer; None without.
        shared_gate: whether a gate of its own weighs the shared expert's output of each token.
        prediction_block: what holds all multi-token-prediction layers, where they are not named like decoder
            layers; they are then carried through as they are.
        output_gate: whether queries come with a gate of the attention's output: each head has `head_dim`
            rows of queries, then `head_dim` rows of the gate.
        windowed: whether its config class knows attention that does not see all earlier tokens.
        defaults: what transformers 4.57.1 takes for an entry of `config.json` that is left out, where it is
            not derived from the others.
        options: the values of entries of `config.json` that are computed here, beside `COMPUTED`; None where
            all are.
        interleaved_pairs: whether the pairs that the rotary embedding rotates lie side by side, and not half
            the rotated channels apart. Latent attention says it by `LatentSizes`.
        predicts: whether it comes with multi-token-prediction layers that are named like decoder layers; for
            others see `prediction_block`.
        shares_prediction_ends: whether those may be without an embedding and a head of their own, which are
            then the model's.
        formats: see `DefaultRecipe`.
        mindspore_backend: the backend of vLLM-MindSpore that has the family's model code.
    """

    model_type: str
    architecture: str
    read_as: str | None = None
    names: Names = Names()
    attention: Literal["grouped-query", "latent"] = "grouped-query"
    query_key_norms: bool = False
    attention_biases: tuple[bool | None, bool | None] = (None, None)
    feed_forward_biases: bool = False
    router: Literal["softmax", "sigmoid"] | None = None
    correction_bias: bool = False
    expert_count: str | None = None
    shared_gate: bool = False
    output_gate: bool = False
    prediction_block: str | None = None
    windowed: bool = False
    defaults: Config = field(default_factory=dict)
    options: Mapping[str, tuple[Any, ...] | None] = field(default_factory=dict)
    interleaved_pairs: bool = False
    predicts: bool = False
    shares_prediction_ends: bool = False
    formats: tuple[str, ...] = ("golden-stick", "ascend", "compressed-tensors")
    mindspore_backend: Literal["native", "mindformers"] = "native"

    def layer_name(self, index: int) -> str:
        """The name of decoder layer `index` in a checkpoint."""
        return self.names.layer(index)

    def prediction_name(self, index: int) -> str:
        """What holds multi-token-prediction layer `index`, counted on behind the decoder layers."""
        return self.prediction_block or self.layer_name(index)

    def router_name(self, index: int) -> str:
        """The name of the router of decoder layer `index`, whether the layer has one or not."""
        return f"{self.layer_name(index)}.{self.names.feed_forward}.{self.names.router}"

    # What feeds what.

    def attention_groups(self, config: Config) -> tuple[SmoothGroup, ...]:
        """The smooth groups of attention, in the order of computation."""
        names = self.names
        values, output = names.within_attention(names.values, names.output)
        inputs = names.within_attention(names.queries, names.keys, names.values)
        return SmoothGroup("qkv", inputs, names.input_norm), SmoothGroup("o", (output,), values)

    def mixer(self, config: Config, index: int) -> str:
        """The name within decoder layer `index` of the block that mixes tokens: attention, or another."""
        return self.names.attention

    def mixers_as(self, config: Config, layers: Sequence[int]) -> dict[str, Any]:
        """The entries of a `config.json` whose layers mix tokens as these layers of `config` do, in order."""
        return {}

    def mixer_groups(self, config: Config, index: int) -> tuple[SmoothGroup, ...]:
        """The smooth groups of the block that mixes tokens in a layer, in the order of computation."""
        return self.attention_groups(config)

    @property
    def feed_forward_groups(self) -> tuple[SmoothGroup, ...]:
        """The smooth groups of a dense layer's feed-forward block, in the order of computation."""
        names = self.names
        *inputs, down = names.within_feed_forward(*names.feed_forward_inputs, names.down)
        return (
            SmoothGroup("gate_up", tuple(inputs), names.feed_forward_norm),
            SmoothGroup("down", (down,), inputs[-1]),
        )

    def norm_before(self, config: Config, index: int, linear: str) -> str | None:
        """The norm through which a linear reads the residual stream; None for one that reads something else.

        Args:
            config: the content of `config.json`.
            index: of the layer.
            linear: its name within the layer, for example `mlp.experts.3.up_proj`; the router is one, too.

        Returns:
            The norm's name within the layer.
        """
        names, (block, _, part) = self.names, linear.partition(".")
        if block == names.feed_forward:
            reads = part.rpartition(".")[2] in (*names.feed_forward_inputs, names.router, names.shared_gate)
            return names.feed_forward_norm if reads else None
        reading = (
            (*group.linears, *group.followers)
            for group in self.mixer_groups(config, index)
            if group.previous == names.input_norm
        )
        return names.input_norm if any(linear in linears for linears in reading) else None

    def writes_residual(self, linear: str) -> bool:
        """Whether a linear's outputs are added to the residual stream; by its name within the layer."""
        block, last = linear.partition(".")[0], linear.rpartition(".")[2]
        return linear == self.value_columns or (block, last) == (self.names.feed_forward, self.names.down)

    def never_quantized(self, linear: str) -> bool:
        """Whether a matrix is carried through by any policy; by its name within the layer."""
        return linear in self.float_only

    def most_tokens(self, config: Config) -> tuple[str, int] | None:
        """The longest context in which attention sees all earlier tokens, and the entry that says so.

        None where it always does.

        Raises:
            CheckpointError: the entry is no positive integer.
        """
        return None

    @property
    def value_rows(self) -> str | None:
        """The linear within a layer whose rows make the values; with latent attention, see `SmoothGroup`.

        None where the values of a head cannot be rotated, because a gate weighs each of their channels.
        """
        names = self.names
        if self.output_gate:
            return None
        return f"{names.attention}.{names.latent_up if self.attention == 'latent' else names.values}"

    @property
    def cached(self) -> tuple[str, ...]:
        """The linears within a layer that make what is cached: keys and values, each in channels of its own.

        Latent attention caches what both are made of, which one linear makes.
        """
        names = self.names
        made = (names.latent_down,) if self.attention == "latent" else (names.keys, names.values)
        return names.within_attention(*made)

    @property
    def value_columns(self) -> str:
        """The linear within a layer whose columns read the heads' values."""
        return f"{self.names.attention}.{self.names.output}"

    def norm_offset(self, norm: str) -> float:
        """What is added to a norm's stored weight before it is multiplied by; by the norm's full name."""
        return 0.0

    # What is stored.

    def shapes(self, config: Config) -> Shapes:
        """Shapes of all tensors of the unquantized model, by name.

        Experts are listed one by one. Scales of a block-quantized checkpoint and multi-token-prediction
        layers (`extra_shapes`) are left out.

        Raises:
            CheckpointError: `config.json` lacks a size, or holds something else than a positive integer.
        """
        config = self.completed(config)
        hidden, vocabulary = positive(config, "hidden_size"), positive(config, "vocab_size")
        shapes: Shapes = {
            f"{self.names.embedding}.weight": (vocabulary, hidden),
            f"{self.names.final_norm}.weight": (hidden,),
        }
        if not config.get("tie_word_embeddings", False):
            shapes[f"{self.names.head}.weight"] = (vocabulary, hidden)
        for index in range(positive(config, "num_hidden_layers")):
            shapes |= self.layer_shapes(config, index)
        return shapes

    def extra_shapes(self, config: Config) -> Shapes:
        """Shapes of the tensors of multi-token-prediction layers, which follow the decoder layers by number.

        Each is a decoder layer with an embedding, norms and a head of its own, and is named
        `model.layers.<num_hidden_layers + i>`. Many conversions drop them, though `config.json` still counts
        them.

        Raises:
            CheckpointError: as for `shapes`.
        """
        if not self.predicts or not config.get("num_nextn_predict_layers"):
            return {}
        config = self.completed(config)
        hidden, vocabulary = positive(config, "hidden_size"), positive(config, "vocab_size")
        first = positive(config, "num_hidden_layers")
        shapes: Shapes = {}
        for index in range(first, first + positive(config, "num_nextn_predict_layers")):
            name, names = self.layer_name(index), self.names
            shapes |= {
                f"{name}.{names.prediction_embedding}.weight": (vocabulary, hidden),
                f"{name}.{names.prediction_embedding_norm}.weight": (hidden,),
                f"{name}.{names.prediction_hidden_norm}.weight": (hidden,),
                f"{name}.{names.prediction_projection}.weight": (hidden, 2 * hidden),
                f"{name}.{names.prediction_norm}.weight": (hidden,),
                f"{name}.{names.prediction_head}.weight": (vocabulary, hidden),
            }
            shapes |= self.layer_shapes(config, index)
        return shapes

    def completed(self, config: Config) -> dict[str, Any]:
        """A `config.json` with the family's defaults. Raises CheckpointError if a number is too large."""
        check_numbers(dict(config))
        return {**self.defaults, **config}

    def layer_shapes(self, config: Config, index: int) -> Shapes:
        """Shapes of the tensors of one decoder layer, by full name; `config` is complete."""
        names, hidden = self.names, positive(config, "hidden_size")
        layer = self.layer_name(index)
        block = f"{layer}.{names.feed_forward}"
        shapes: Shapes = {
            f"{layer}.{names.input_norm}.weight": (hidden,),
            f"{layer}.{names.feed_forward_norm}.weight": (hidden,),
            **{f"{layer}.{norm}.weight": (hidden,) for norm in names.output_norms},
        }
        shapes |= self.mixer_shapes(config, index, hidden)
        if self.expert_count is None or not self.has_experts(config, index):
            return shapes | self._feed_forward(config, block, hidden, positive(config, "intermediate_size"))
        inner, count = positive(config, "moe_intermediate_size"), positive(config, self.expert_count)
        shapes[f"{block}.{names.router}.weight"] = (count, hidden)
        if self.correction_bias:
            shapes[f"{block}.{names.router}.{names.correction_bias}"] = (count,)
        if shared := self.shared_size(config):
            shapes |= self._feed_forward(config, f"{block}.{names.shared_experts}", hidden, shared)
        if self.shared_gate:
            shapes[f"{block}.{names.shared_gate}.weight"] = (1, hidden)
        for expert in range(count):
            shapes |= self._feed_forward(config, f"{block}.{names.experts}.{expert}", hidden, inner)
        return shapes

    def mixer_shapes(self, config: Config, index: int, hidden: int) -> Shapes:
        """Shapes of the tensors of the block that mixes tokens in a layer, by full name."""
        block = f"{self.layer_name(index)}.{self.names.attention}"
        shapes: Shapes = {}
        for linear in self.attention_linears(config, hidden):
            shapes |= _stored(block, linear)
        for norm, size in self.attention_norms(config, hidden):
            shapes[f"{block}.{norm}.weight"] = (size,)
        return shapes

    def attention_linears(self, config: Config, hidden: int) -> Iterator[LinearShape]:
        """The linears of attention; `config` is complete, `hidden` the size of its input."""
        heads = positive(config, "num_attention_heads")
        kv_heads = positive(config, "num_key_value_heads", heads)
        head_size = positive(config, "head_dim", hidden // heads)
        asked = bool(config.get("attention_bias"))
        inputs, output = (asked if always is None else always for always in self.attention_biases)
        yield self.names.queries, heads * head_size * (2 if self.output_gate else 1), hidden, inputs
        yield self.names.keys, kv_heads * head_size, hidden, inputs
        yield self.names.values, kv_heads * head_size, hidden, inputs
        yield self.names.output, hidden, heads * head_size, output

    def attention_norms(self, config: Config, hidden: int) -> Iterator[tuple[str, int]]:
        """The norms within attention and their sizes; arguments as for `attention_linears`."""
        if self.has_query_key_norms(config):
            head_size = positive(config, "head_dim", hidden // positive(config, "num_attention_heads"))
            yield self.names.query_norm, head_size
            yield self.names.key_norm, head_size

    def has_query_key_norms(self, config: Config) -> bool:
        """Whether queries and keys are normalized per head, which some families leave to `config.json`."""
        return self.query_key_norms

    def has_experts(self, config: Config, index: int) -> bool:
        """Whether a layer of a family with experts has them; `config` is complete."""
        return True

    def shared_experts(self, config: Config) -> int:
        """How many experts of a layer compute every token."""
        return 0

    def shared_size(self, config: Config) -> int:
        """The intermediate size of the one block that all shared experts are stored as; 0 without."""
        return positive(config, "moe_intermediate_size") * self.shared_experts(config)

    def _feed_forward(self, config: Config, block: str, hidden: int, inner: int) -> Shapes:
        names, bias = self.names, self.feed_forward_biases and bool(config.get("mlp_bias"))
        rows = inner if names.gate_up is None else 2 * inner
        shapes = _stored(block, (names.down, hidden, inner, bias))
        for linear in names.feed_forward_inputs:
            shapes |= _stored(block, (linear, rows, hidden, bias))
        return shapes

    # What the entries of transformers' config object mean.

    def latent_sizes(self, config: Any) -> LatentSizes | None:
        """The sizes of latent attention of a config object of transformers; None without it."""
        return None

    def delta_sizes(self, config: Any) -> DeltaSizes | None:
        """The sizes of gated delta rule attention of a config object of transformers; None without."""
        return None

    def expert_sizes(self, config: Any) -> ExpertSizes | None:
        """The mixture of experts of a config object of transformers; None for a dense family."""
        if self.expert_count is None:
            return None
        return ExpertSizes(
            count=getattr(config, self.expert_count),
            per_token=config.num_experts_per_tok,
            intermediate_size=config.moe_intermediate_size,
            normalize=config.norm_topk_prob,
        )

    def refuse_options(self, config: Config, where: Path | str) -> None:
        """Raise ModelError for what would silently change the arithmetic of the decoder layers."""
        for option, values in {**COMPUTED, **self.options}.items():
            if values is not None and config.get(option) not in values:
                raise ModelError(f"{option} = {config[option]!r} is not supported", where=where)

    def refuse_windows(self, config: Any, where: Path | str) -> None:
        """Raise ModelError if a config object of transformers has attention that misses earlier tokens."""
        if not self.windowed:
            return
        window = config.sliding_window
        kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
        if kinds or (window is not None and window < config.max_position_embeddings):
            what = f"sliding_window = {window!r}" if window is not None else f"layer_types {sorted(kinds)}"
            raise ModelError(
                f"{what} is not supported: every layer here attends to all earlier tokens",
                where=where,
                remedy="use a version of the model without sliding windows, for example Mistral-7B v0.3",
            )

    # What engines do with it.

    @property
    def fused(self) -> dict[str, tuple[str, ...]]:
        """The linears that vLLM runs as one layer, by its name: the model's `packed_modules_mapping`."""
        names = self.names
        gate_up = {"gate_up_proj": names.feed_forward_inputs} if names.gate_up is None else {}
        return {"qkv_proj": (names.queries, names.keys, names.values), **gate_up}

    @property
    def float_only(self) -> dict[str, str]:
        """What no engine quantizes, tables and the router, by the end of its name."""
        return {
            self.names.head: "the output head",
            self.names.embedding.rpartition(".")[2]: "embeddings",
            f"{self.names.feed_forward}.{self.names.router}": "the router",
        }

    @property
    def folded(self) -> tuple[str, ...]:
        """Linears whose weights engines multiply into the attention, so that those stay in floating point."""
        return ()

    def row_orders(self, config: Config) -> RopeRows:
        """The linears whose rotary rows MindFormers wants in another order.

        Raises:
            CheckpointError: a size is missing or no positive integer.
        """
        return RopeRows({}, 0)

    def served_formats(self, config: Config) -> tuple[str, ...]:
        """The formats that some server serves a model of the family in, the default one first."""
        return self.formats

    def default_recipe(self, config: Config) -> DefaultRecipe:
        """All static where an engine serves that, which run experts with a scale per token alone."""
        floats = tuple((name, FLOAT) for name in (self.names.head, *self.folded))
        experts = ((f"{self.names.feed_forward}.", W8A8_DYNAMIC),) if self.router else ()
        return DefaultRecipe(
            formats=self.served_formats(config),
            schemes=(*floats, *experts, ("*", W8A8)),
            options={"feed_forward_alpha": 0.5} if self.router else {},
        )


COMPUTED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": (None, "silu"),
    "pretraining_tp": (None, 1),
    "partial_rotary_factor": (None, 1),
}
"""Of entries of `config.json` that change arithmetic, the values that are computed here."""


def positive(config: Config, key: str, default: int | None = None) -> int:
    """An entry of `config.json`. Raises CheckpointError if it is no positive integer, or beyond its limit."""
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or value <= 0:
        raise unexpected(key, value, "a positive integer")
    check_number(key, value)
    return value


def unexpected(key: str, value: Any, expected: str) -> CheckpointError:
    """The error for an entry of `config.json` that makes no sense."""
    return CheckpointError(
        f"{key} is {reprlib.repr(value)}, {expected} is expected",
        where="config.json",
        remedy="copy config.json of the original model again",
    )


def _stored(block: str, linear: LinearShape) -> Shapes:
    name, rows, columns, bias = linear
    weight: Shapes = {f"{block}.{name}.weight": (rows, columns)}
    return weight | {f"{block}.{name}.bias": (rows,)} if bias else weight
