"""Run by AutoRound's own Python, not msquant's: `MODEL TOKENS.npy OUTPUT static|dynamic|mixed`.

Its scheme INT8 with its default algorithm, SignRound, in its default 200 steps a layer.
"""

import sys
from pathlib import Path


def main() -> None:
    """Write the compressed-tensors folder, which AutoRound calls the format `llm_compressor`."""
    model_folder, tokens_file, output, scheme = sys.argv[1:]
    import numpy as np
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = torch.from_numpy(np.load(tokens_file)).long()
    batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in tokens]
    options = {} if scheme == "dynamic" else {"act_dynamic": False, "act_sym": False}
    if scheme == "mixed":
        options = {"layer_config": {"self_attn": {"act_dynamic": False, "act_sym": False}}}
    AutoRound(
        AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(model_folder),
        scheme="INT8",
        dataset=batches,
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        iters=200,
        device_map="cpu",
        **options,
    ).quantize_and_save(f"{output}-parent", format="llm_compressor")
    # It makes a folder in there that is named after the scheme.
    (written,) = Path(f"{output}-parent").iterdir()
    written.rename(output)


if __name__ == "__main__":
    main()
