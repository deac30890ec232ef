"""Run by llm-compressor's own Python, not msquant's: `MODEL TOKENS.npy OUTPUT static|dynamic`.

Writes the compressed-tensors folder and prints the CPU seconds of the calibration and quantization as JSON.
"""

import json
import sys
import time


def main() -> None:
    """SmoothQuant at 0.5 with llm-compressor's own mappings, then W8A8 of every linear but the head."""
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
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    if scheme == "static":
        activations |= {"symmetric": False, "strategy": "tensor", "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    recipe = [
        SmoothQuantModifier(smoothing_strength=0.5),
        QuantizationModifier(config_groups={"group_0": group}, ignore=["lm_head"]),
    ]
    started, wall = time.process_time(), time.monotonic()
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
    )
    seconds, wall = time.process_time() - started, time.monotonic() - wall
    model.save_pretrained(output, save_compressed=True)
    print(json.dumps({"cpu_seconds": seconds, "seconds": wall}))


if __name__ == "__main__":
    main()
