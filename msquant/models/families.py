"""Model families as data: the names of a decoder layer's parts and what feeds what."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SmoothGroup:
    """Linears that share one smooth scale, and the cell whose output carries its inverse.

    Attributes:
        name: how the group is called in recipes, progress and the manifest.
        linears: their names within the decoder layer.
        previous: the norm, or the linear, that the inverse scale is folded into. For `self_attn.kv_b_proj` it
            is folded into the value rows only: each head has `qk_nope_head_dim` rows of keys, then
            `v_head_dim` rows of values.
    """

    name: str
    linears: tuple[str, ...]
    previous: str


EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

GROUPED_QUERY = (
    SmoothGroup("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    SmoothGroup("o", ("self_attn.o_proj",), "self_attn.v_proj"),
)
_LATENT_TAIL = (
    SmoothGroup("kv_b", ("self_attn.kv_b_proj",), "self_attn.kv_a_layernorm"),
    SmoothGroup("o", ("self_attn.o_proj",), "self_attn.kv_b_proj"),
)
LATENT = (
    SmoothGroup("q_kv_a", ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"), "input_layernorm"),
    SmoothGroup("q_b", ("self_attn.q_b_proj",), "self_attn.q_a_layernorm"),
    *_LATENT_TAIL,
)
LATENT_FULL_RANK_QUERY = (
    SmoothGroup("q_kv_a", ("self_attn.q_proj", "self_attn.kv_a_proj_with_mqa"), "input_layernorm"),
    *_LATENT_TAIL,
)
FEED_FORWARD = (
    SmoothGroup("gate_up", ("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    SmoothGroup("down", ("mlp.down_proj",), "mlp.up_proj"),
)


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_type: `model_type` in `config.json`.
        architecture: the entry of `architectures` in `config.json`.
        attention: "grouped-query" (also multi-head), or "latent": multi-head latent attention.
        query_key_norms: whether queries and keys are normalized per head before the rotary embedding.
        router: how a token's scores for the experts are made of the router's logits; None without experts.
        correction_bias: whether experts are chosen by their scores plus a stored bias.
    """

    model_type: str
    architecture: str
    attention: Literal["grouped-query", "latent"] = "grouped-query"
    query_key_norms: bool = False
    router: Literal["softmax", "sigmoid"] | None = None
    correction_bias: bool = False

    @staticmethod
    def layer_name(index: int) -> str:
        """The name of decoder layer `index` in a checkpoint."""
        return f"model.layers.{index}"


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM"),
        Family("mistral", "MistralForCausalLM"),
        Family("qwen2", "Qwen2ForCausalLM"),
        Family("qwen3", "Qwen3ForCausalLM", query_key_norms=True),
        Family("qwen3_moe", "Qwen3MoeForCausalLM", query_key_norms=True, router="softmax"),
        Family("deepseek_v2", "DeepseekV2ForCausalLM", attention="latent", router="softmax"),
        Family(
            "deepseek_v3", "DeepseekV3ForCausalLM", attention="latent", router="sigmoid", correction_bias=True
        ),
    )
}
