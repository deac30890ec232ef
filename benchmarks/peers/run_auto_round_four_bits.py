"""Run by AutoRound's own Python, not msquant's: `MODEL TOKENS.npy OUTPUT SCHEME [ITERATIONS]`.

Weights in four bits by its default algorithm, SignRound, in its default 200 steps a layer, written in the
layout of AutoGPTQ. SCHEME is JSON, see `jobs.numbers_of`.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    """Write the folder in the format that AutoRound calls `auto_round`."""
    model_folder, tokens_file, output, word, *rest = sys.argv[1:]
    import numpy as np
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    scheme = json.loads(word)
    if scheme["input_bits"]:
        raise SystemExit("Error: its formats have no int4 weights beside int8 activations")
    tokens = torch.from_numpy(np.load(tokens_file)).long()
    batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in tokens]
    AutoRound(
        AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(model_folder),
        bits=scheme["weight_bits"],
        group_size=scheme["group_size"] or -1,
        sym=scheme["symmetric"],
        dataset=batches,
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        iters=int(rest[0]) if rest else 200,
        device_map="cpu",
    ).quantize_and_save(f"{output}-parent", format="auto_gptq")
    # It makes a folder in there that is named after the scheme.
    folders = [path for path in Path(f"{output}-parent").iterdir() if path.is_dir()]
    (folders[0] if folders else Path(f"{output}-parent")).rename(output)


if __name__ == "__main__":
    main()
