"""A model's shape, as its Hugging Face `config.json` gives it."""

from dataclasses import field
from functools import cached_property
from typing import Any, Literal

from pydantic import ConfigDict, InstanceOf, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from msquant.errors import CheckpointError
from msquant.families.base import DeltaSizes, ExpertSizes, Family, LatentSizes, Shapes, SmoothGroup

_STRICT = ConfigDict(strict=True)

# DeepSeek's own code and transformers leave the epsilon of the inner norms at their default.
INNER_NORM_EPS = 1e-6


@dataclass(frozen=True, config=_STRICT)
class ModelConfig:
    """What the decoder layers and the two ends of a model need to know; sizes are in elements.

    Attributes:
        family: the names and options that its architecture implies.
        head_dim: of queries, keys and values; with latent attention, of their rotated part.
        rotary_dim: channels of a head that the rotary embedding rotates.
        shapes: of every tensor of the unquantized model, by name, experts one by one.
        extra_shapes: of the multi-token-prediction layers that the model may come with.
        raw: the content of `config.json`, as it is.
        rope_scaling: the `rope_scaling` section of `config.json`; empty for plain rotary embedding.
        dtype: storage dtype of the floating-point tensors: `bfloat16`, `float16` or `float32`.
        eos_token_ids: tokens that end a generation.
        latent: the sizes of multi-head latent attention, where the family has it.
        experts: the mixture of experts, where the family has one.
        delta: the sizes of gated delta rule attention, where the family has it.
        fp8_block: rows and columns that share a scale in a checkpoint with FP8 weights; None for others.
    """

    family: InstanceOf[Family]
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    rotary_dim: PositiveInt
    vocab_size: PositiveInt
    rms_norm_eps: PositiveFloat
    rope_theta: PositiveFloat
    max_position_embeddings: PositiveInt
    tie_word_embeddings: bool
    dtype: Literal["bfloat16", "float16", "float32"]
    shapes: Shapes
    extra_shapes: Shapes = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)
    rope_scaling: dict[str, Any] = field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()
    latent: LatentSizes | None = None
    experts: ExpertSizes | None = None
    delta: DeltaSizes | None = None
    num_nextn_predict_layers: NonNegativeInt = 0
    fp8_block: tuple[PositiveInt, PositiveInt] | None = None

    def mixer_groups(self, index: int) -> tuple[SmoothGroup, ...]:
        """The smooth groups of the block that mixes tokens in a layer, in the order of computation."""
        return self.family.mixer_groups(self.raw, index)

    @property
    def feed_forward_groups(self) -> tuple[SmoothGroup, ...]:
        """The smooth groups of a dense layer's feed-forward block, in the order of computation."""
        return self.family.feed_forward_groups

    def groups(self, index: int) -> tuple[SmoothGroup, ...]:
        """The smooth groups of a layer, if it is dense, in the order of computation."""
        return self.mixer_groups(index) + self.feed_forward_groups

    def linears(self, index: int) -> tuple[str, ...]:
        """The names of all linears within a dense decoder layer, in the order of computation."""
        return tuple(name for group in self.groups(index) for name in group.linears)

    @property
    def query_key_norms(self) -> bool:
        """Whether queries and keys are normalized per head before the rotary embedding."""
        return self.family.has_query_key_norms(self.raw)

    @property
    def interleaved_pairs(self) -> bool:
        """Whether the two channels of a rotated pair lie side by side."""
        return self.latent.rope_interleave if self.latent else self.family.interleaved_pairs

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that is computed here."""
        return self.longest_by[1]

    @property
    def longest_by(self) -> tuple[str, int]:
        """The same, behind the entry of `config.json` that says it."""
        positions = "max_position_embeddings", self.max_position_embeddings
        seen = self.family.most_tokens(self.raw)
        return positions if seen is None else min(positions, seen, key=lambda entry: entry[1])

    @property
    def qk_nope_head_dim(self) -> int:
        """Channels of a head's keys without a position: the key rows in each head of what makes them."""
        return self.latent.qk_nope_head_dim if self.latent else 0

    @property
    def v_head_dim(self) -> int:
        """Channels of a head's values."""
        return self.latent.v_head_dim if self.latent else self.head_dim

    @property
    def num_experts(self) -> int:
        """Routed experts of a layer that has them; 0 for a dense model."""
        return self.experts.count if self.experts else 0

    @property
    def experts_per_token(self) -> int:
        """How many routed experts compute each token; 0 for a dense model."""
        return self.experts.per_token if self.experts else 0

    @property
    def moe_intermediate_size(self) -> int:
        """Intermediate size of each routed expert; 0 for a dense model."""
        return self.experts.intermediate_size if self.experts else 0

    @property
    def end_names(self) -> tuple[str, ...]:
        """The tensors outside of the decoder layers."""
        names = self.family.names
        ends = (f"{end}.weight" for end in (names.embedding, names.final_norm, names.head))
        return tuple(name for name in ends if name in self.shapes)

    @property
    def extra_names(self) -> tuple[str, ...]:
        """The tensors of the multi-token-prediction layers, which a checkpoint may lack."""
        return tuple(self.extra_shapes)

    @property
    def prediction_indices(self) -> range:
        """The numbers of the multi-token-prediction layers, which follow those of the decoder layers."""
        first = self.num_hidden_layers
        return range(first, first + (1 if self.family.prediction_block else self.num_nextn_predict_layers))

    @property
    def extra_layers(self) -> tuple[Shapes, ...]:
        """The shapes of each multi-token-prediction layer, by full name."""
        if self.family.prediction_block:
            return (self.extra_shapes,) if self.extra_shapes else ()
        layers = map(self.layer_shapes, self.prediction_indices)
        return tuple(shapes for shapes in layers if shapes)

    def layer_shapes(self, index: int) -> Shapes:
        """Shapes of all tensors of one decoder layer, or multi-token-prediction layer, by full name."""
        return self._by_layer.get(self.family.layer_name(index), {})

    def decoder_shapes(self, index: int) -> Shapes:
        """As `layer_shapes`, without what a multi-token-prediction layer has around its decoder layer."""
        name = f"{self.family.layer_name(index)}."
        around = tuple(f"{name}{part}." for part in self.family.names.around_prediction)
        return {key: shape for key, shape in self.layer_shapes(index).items() if not key.startswith(around)}

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor, multi-token-prediction layers included; None if there is none so called."""
        return self.shapes.get(name) or self.extra_shapes.get(name)

    def carried_in_attention(self, index: int) -> dict[str, str | None]:
        """The tensors within attention that are carried through, by full name.

        Each with the name of the smooth group whose scale its columns take; None for one that takes none.
        """
        layer = f"{self.family.layer_name(index)}."
        block = f"{layer}{self.family.names.attention}."
        following = {part: group.name for group in self.mixer_groups(index) for part in group.followers}
        carried: dict[str, str | None] = {}
        for name in self.decoder_shapes(index):
            part = name.removeprefix(layer).rpartition(".")[0]
            if name.startswith(block) and self.family.never_quantized(part):
                carried[name] = following.get(part)
        return carried

    def expert_names(self, index: int) -> list[str]:
        """The full names of a layer's experts in the order in which they are added up, the shared one last.

        A dense feed-forward block is the only one of its layer.
        """
        parts = self.family.names
        block = f"{self.family.layer_name(index)}.{parts.feed_forward}"
        if not self.has_experts(index):
            return [block]
        names = [f"{block}.{parts.experts}.{number}" for number in range(self.num_experts)]
        shared = self.experts is not None and self.experts.shared
        return [*names, f"{block}.{parts.shared_experts}"] if shared else names

    def has_experts(self, index: int) -> bool:
        """Whether the feed-forward block of a layer is a mixture of experts."""
        return f"{self.family.router_name(index)}.weight" in self.layer_shapes(index)

    def mixer(self, index: int) -> str:
        """The name of the block that mixes tokens in a decoder layer, within the layer."""
        return self.family.mixer(self.raw, index)

    def delta_rule(self, index: int) -> DeltaSizes | None:
        """The sizes of gated delta rule attention, where a decoder layer mixes tokens by it; else None."""
        return self.delta if self.delta and self.mixer(index) == self.family.names.delta else None

    @cached_property
    def _by_layer(self) -> dict[str, Shapes]:
        layers: dict[str, Shapes] = {}
        parts = self.family.layer_name(0).count(".") + 1
        for name, shape in (self.shapes | self.extra_shapes).items():
            layers.setdefault(".".join(name.split(".")[:parts]), {})[name] = shape
        return layers


def check_shape(config: ModelConfig, name: str, shape: tuple[int, ...]) -> None:
    """Check a tensor that was read against `config.json`.

    Raises:
        CheckpointError: the shapes differ, or there is no such tensor; names the tensor and both shapes.
    """
    expected = config.shape(name)
    if shape != expected:
        says = "has no such tensor" if expected is None else f"says {list(expected)}"
        raise CheckpointError(
            f"{name} has shape {list(shape)}, config.json {says}",
            remedy="use the config.json that belongs to these weights",
        )
