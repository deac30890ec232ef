"""GLM-4, and its mixtures of experts from GLM-4.5 on."""

from msquant.families.base import Config, Family, Names
from msquant.families.grouped_experts import SIGMOID_ROUTER, GroupedExperts

GLM4 = Family(
    model_type="glm4",
    architecture="Glm4ForCausalLM",
    names=Names(
        attention_output_norm="post_self_attn_layernorm",
        feed_forward_output_norm="post_mlp_layernorm",
        gate_up="gate_up_proj",
    ),
    attention_biases=(None, False),
    interleaved_pairs=True,
    defaults={"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True},
    options={"partial_rotary_factor": None},
    # vllm-ascend does not find the description of gate and up in one tensor (vllm 0.11.0, models/glm4.py,
    # `packed_modules_mapping`), and vLLM-MindSpore has the model in floating point only.
    formats=("compressed-tensors",),
)


class GlmMoe(GroupedExperts):
    """GLM-4.5, 4.6 and 4.7: grouped queries, of each head only a part rotated, and DeepSeek-V3's experts."""

    def has_query_key_norms(self, config: Config) -> bool:
        """See `Family`: of the published ones GLM-4.5-Air has none."""
        return bool(config.get("use_qk_norm", False))


GLM4_MOE = GlmMoe(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    attention_biases=(None, False),
    router="sigmoid",
    correction_bias=True,
    predicts=True,
    # GLM-4.5 has them in the layer, 4.6 and 4.7 do not.
    shares_prediction_ends=True,
    defaults={"num_key_value_heads": 8, "first_k_dense_replace": 1, "n_shared_experts": 1},
    options={
        "partial_rotary_factor": None,
        **SIGMOID_ROUTER,
    },
    # No backend of vLLM-MindSpore has it quantized: MindFormers 2.1.0 builds it in floating point.
    formats=("ascend", "compressed-tensors"),
    mindspore_backend="mindformers",
)
