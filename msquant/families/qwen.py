"""Qwen2, Qwen3 and Qwen3's mixture of experts."""

from msquant.families.base import Config, Family, positive, unexpected


class QwenMoe(Family):
    """Qwen3-MoE: all layers have experts but those that `config.json` lists or steps over."""

    def has_experts(self, config: Config, index: int) -> bool:
        """See `Family`. Raises CheckpointError if `mlp_only_layers` is no list of layers."""
        dense = config.get("mlp_only_layers") or []
        if not isinstance(dense, list) or any(type(layer) is not int for layer in dense):
            raise unexpected("mlp_only_layers", dense, "a list of layer numbers")
        if len(dense) > (most := positive(config, "num_hidden_layers")):
            raise unexpected("mlp_only_layers", dense, f"a list of at most {most} numbers")
        return index not in dense and (index + 1) % positive(config, "decoder_sparse_step", 1) == 0


QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    attention_biases=(True, False),
    windowed=True,
    defaults={"num_key_value_heads": 32},
)

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    query_key_norms=True,
    windowed=True,
    defaults={"num_key_value_heads": 32, "head_dim": 128},
)

QWEN3_MOE = QwenMoe(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    query_key_norms=True,
    router="softmax",
    expert_count="num_experts",
    windowed=True,
    defaults={"num_key_value_heads": 4},
    # Neither backend of vLLM-MindSpore 0.5.1 has it quantized.
    formats=("ascend", "compressed-tensors"),
    mindspore_backend="mindformers",
)
