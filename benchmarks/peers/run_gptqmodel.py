"""Run by GPTQModel's own Python, not msquant's: `MODEL TOKENS.npy OUTPUT SCHEME`.

Weights in four bits by its GPTQ with its defaults, on the CPU. SCHEME is JSON, see `jobs.numbers_of`.
"""

import json
import sys


def main() -> None:
    """Write the folder in the layout of AutoGPTQ."""
    model_folder, tokens_file, output, word = sys.argv[1:]
    import numpy as np
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    scheme = json.loads(word)
    if scheme["input_bits"]:
        raise SystemExit("Error: it quantizes weights alone")
    tokens = torch.from_numpy(np.load(tokens_file)).long()
    data = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    config = QuantizeConfig(
        bits=scheme["weight_bits"], group_size=scheme["group_size"] or -1, sym=scheme["symmetric"]
    )
    model = GPTQModel.load(model_folder, config, device="cpu", dtype=torch.float32)
    model.quantize(data, batch_size=1)
    model.save(output)


if __name__ == "__main__":
    main()
