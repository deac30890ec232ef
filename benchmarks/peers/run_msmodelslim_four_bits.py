"""Run by msModelSlim's own Python, not msquant's: `MODEL TOKENS.npy OUTPUT SCHEME`.

The two steps of its W4A8 practices (`lab_practice/qwen3_moe`), on all linears: `flex_smooth_quant` behind
norms, then `ssz` weights in four bits with activations per token. SCHEME is JSON, see `jobs.numbers_of`.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from run_msmodelslim import DYNAMIC, NOT_QUANTIZED, practice_of, quantize

SMOOTH = {"type": "flex_smooth_quant", "enable_subgraph_type": ["norm-linear"], "include": ["*"]}
WEIGHT = {"scope": "per_channel", "dtype": "int4", "symmetric": True, "method": "ssz"}
ROUND = {
    "type": "linear_quant",
    "qconfig": {"act": DYNAMIC, "weight": WEIGHT},
    "include": ["*"],
    "exclude": NOT_QUANTIZED,
}


def main() -> None:
    """Write the folder in the ascend format."""
    model_folder, tokens_file, output, word = sys.argv[1:]
    scheme = json.loads(word)
    if not scheme["input_bits"]:
        raise SystemExit("Error: its practices have no int4 weights beside activations in floating point")
    quantize(model_folder, tokens_file, output, practice_of([SMOOTH, ROUND], weight_bits=4))


if __name__ == "__main__":
    main()
