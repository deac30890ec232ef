"""Model families as data: the names of a decoder layer's parts and what feeds what."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SmoothGroup:
    """Linears that share one smooth scale, and the cell whose output carries its inverse.

    Attributes:
        name: how the group is called in recipes, progress and the manifest.
        linears: their names within the decoder layer.
        previous: the norm, or the linear, that the inverse scale is folded into.
    """

    name: str
    linears: tuple[str, ...]
    previous: str


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_type: `model_type` in `config.json`.
        architecture: the entry of `architectures` in `config.json`.
        groups: the smooth groups, in the order in which a decoder layer computes them.
    """

    model_type: str
    architecture: str
    groups: tuple[SmoothGroup, ...]

    @property
    def linears(self) -> tuple[str, ...]:
        """The names of all linears within a decoder layer, in the order of computation."""
        return tuple(name for group in self.groups for name in group.linears)

    @staticmethod
    def layer_name(index: int) -> str:
        """The name of decoder layer `index` in a checkpoint."""
        return f"model.layers.{index}"


NORMS = ("input_layernorm", "post_attention_layernorm")
EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

_LLAMA_GROUPS = (
    SmoothGroup("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    SmoothGroup("o", ("self_attn.o_proj",), "self_attn.v_proj"),
    SmoothGroup("gate_up", ("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    SmoothGroup("down", ("mlp.down_proj",), "mlp.up_proj"),
)

FAMILIES = {
    family.model_type: family for family in (Family("llama", "LlamaForCausalLM", groups=_LLAMA_GROUPS),)
}
