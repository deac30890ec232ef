"""Run by llm-compressor's own Python, not msquant's: `MODEL TOKENS.npy OUTPUT static|dynamic|mixed`.

SmoothQuant at 0.5 with llm-compressor's own mappings, then W8A8 of every linear but the head, the router and
gates, as its examples have it. `mixed` is static in attention and per token in the feed-forward blocks.
"""

import sys
from typing import Any


def main() -> None:
    """Write the compressed-tensors folder."""
    model_folder, tokens_file, output, scheme = sys.argv[1:]
    import numpy as np
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from transformers import AutoModelForCausalLM

    tokens = np.load(tokens_file)
    ones = np.ones_like(tokens)
    data = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": ones.tolist()})
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    targets = {"static": {"static": ["Linear"]}, "dynamic": {"dynamic": ["Linear"]}}.get(
        scheme, {"static": ["re:.*self_attn.*"], "dynamic": ["re:.*mlp.*"]}
    )
    groups = {f"group_{i}": _group(*item) for i, item in enumerate(targets.items())}
    ignore = ["lm_head", "re:.*mlp.gate$", "re:.*shared_expert_gate$", "re:.*in_proj_ba$"]
    recipe = [
        SmoothQuantModifier(smoothing_strength=0.5),
        QuantizationModifier(config_groups=groups, ignore=ignore),
    ]
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
    )
    model.save_pretrained(output, save_compressed=True)


def _group(scheme: str, targets: list[str]) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    if scheme == "static":
        activations |= {"symmetric": False, "strategy": "tensor", "dynamic": False}
    return {"targets": targets, "weights": weights, "input_activations": activations}


if __name__ == "__main__":
    main()
