"""Llama, and Mistral without its sliding windows."""

from msquant.families.base import Family

LLAMA = Family(model_type="llama", architecture="LlamaForCausalLM", feed_forward_biases=True)

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    attention_biases=(False, False),
    windowed=True,
    defaults={"num_key_value_heads": 8},
    # vLLM-MindSpore 0.5.1 has no Mistral.
    formats=("compressed-tensors", "ascend"),
)
