"""Run by llm-compressor's own Python, not msquant's: `MODEL TOKENS.npy OUTPUT SCHEME gptq|awq`.

Weights in four bits: `gptq` with its defaults; `awq` as its example for Llama has it, with both kinds of
scaling tried, and its rounding to nearest behind. SCHEME is JSON, see `jobs.numbers_of`; where it is of
routed experts alone, all else is in eight bits, but for the router and gates. Its AWQ asks for pinned memory
and crashes where there is no accelerator: here that call is left out, which changes no number.
"""

import json
import sys
from typing import Any


def main() -> None:
    """Write the compressed-tensors folder."""
    model_folder, tokens_file, output, scheme, algorithm = sys.argv[1:]
    import numpy as np
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM

    IntermediatesCache.pin_memory = lambda *_, **__: None
    tokens = np.load(tokens_file)
    ones = np.ones_like(tokens)
    data = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": ones.tolist()})
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    numbers = json.loads(scheme)
    groups = {"group_0": _group(numbers, ["Linear"])}
    if numbers["experts_alone"]:
        experts, others = r"re:.*mlp\.experts\..*_proj$", r"re:(?!.*mlp\.experts\.).*proj.*"
        groups = {
            "group_0": _group(numbers, [experts]),
            "group_1": _group(numbers | {"weight_bits": 8}, [others]),
        }
    target = {
        "config_groups": groups,
        "ignore": ["lm_head", "re:.*mlp.gate$", "re:.*shared_expert_gate$", "re:.*in_proj_ba$"],
    }
    recipes = {
        "gptq": lambda: [GPTQModifier(**target)],
        "awq": lambda: [AWQModifier(duo_scaling="both"), QuantizationModifier(**target)],
    }
    oneshot(
        model=model,
        dataset=data,
        recipe=recipes[algorithm](),
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
    )
    model.save_pretrained(output, save_compressed=True)


def _group(scheme: dict[str, Any], targets: list[str]) -> dict[str, Any]:
    size = scheme["group_size"]
    weights = {
        "num_bits": scheme["weight_bits"],
        "type": "int",
        "symmetric": scheme["symmetric"],
        "strategy": "group" if size else "channel",
        "group_size": size,
        "dynamic": False,
    }
    group: dict[str, Any] = {"targets": targets, "weights": weights}
    if scheme["input_bits"]:
        group["input_activations"] = {
            "num_bits": scheme["input_bits"],
            "type": "int",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }
    return group


if __name__ == "__main__":
    main()
