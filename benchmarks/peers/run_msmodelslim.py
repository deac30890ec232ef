"""Run by msModelSlim's own Python, not msquant's: `MODEL TOKENS.npy OUTPUT static|dynamic|mixed`.

Its own `quant` command with its default practice for W8A8, `iter_smooth` and then `linear_quant`; the static
one has the activation scope of its static practices, per tensor and asymmetric. Its command takes texts; the
tokens are put in where it has them tokenized.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

# The names by which it finds its adapter of an architecture; it has none for Llama.
MODEL_TYPES = {"qwen3": "Qwen3-8B", "qwen3_moe": "Qwen3-30B", "deepseek_v3": "DeepSeek-V3"}
WEIGHT = {"scope": "per_channel", "dtype": "int8", "symmetric": True, "method": "minmax"}
DYNAMIC = {"scope": "per_token", "dtype": "int8", "symmetric": True, "method": "minmax"}
STATIC = {"scope": "per_tensor", "dtype": "int8", "symmetric": False, "method": "minmax"}
NOT_QUANTIZED = ["lm_head", "*mlp.gate"]


def main() -> None:
    """Write the folder in the ascend format."""
    model_folder, tokens_file, output, scheme = sys.argv[1:]
    quantize(model_folder, tokens_file, output, _practice(scheme))


def quantize(model_folder: str, tokens_file: str, output: str, practice: dict[str, Any]) -> None:
    """Run its command.

    Args:
        model_folder: the float model.
        tokens_file: `[samples, length]` in NumPy's format.
        output: folder to make.
        practice: what its command reads from a YAML file.
    """
    import numpy as np
    import torch
    from msmodelslim.cli.__main__ import main as command
    from msmodelslim.model.common.transformers import TransformersModel

    tokens = torch.from_numpy(np.load(tokens_file)).long()

    def tokenized(*_: Any, **__: Any) -> list[list[Any]]:
        return [[row[None], torch.ones_like(row[None])] for row in tokens]

    TransformersModel._get_tokenized_data = tokenized
    model_type = json.loads((Path(model_folder) / "config.json").read_text())["model_type"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "practice.yaml"
        # YAML reads JSON.
        file.write_text(json.dumps(practice))
        file.chmod(0o600)
        sys.argv[1:] = [
            *("quant", "--model_type", MODEL_TYPES.get(model_type, "default")),
            *("--model_path", model_folder, "--save_path", output),
            *("--device", "cpu", "--config_path", str(file)),
        ]
        command()


def _practice(scheme: str) -> dict[str, Any]:
    parts = {"static": [(STATIC, ["*"])], "dynamic": [(DYNAMIC, ["*"])]}.get(
        scheme, [(STATIC, ["*self_attn*"]), (DYNAMIC, ["*mlp*"])]
    )
    quantized = [
        {
            "type": "linear_quant",
            "qconfig": {"act": act, "weight": WEIGHT},
            "include": include,
            "exclude": NOT_QUANTIZED,
        }
        for act, include in parts
    ]
    return practice_of([{"type": "iter_smooth", "include": ["*"]}, *quantized], weight_bits=8)


def practice_of(process: list[dict[str, Any]], weight_bits: int) -> dict[str, Any]:
    """A practice of these steps, with the rest as its own have it."""
    return {
        "apiversion": "modelslim_v1",
        "metadata": {"config_id": "benchmark", "label": {"w_bit": weight_bits, "a_bit": 8}},
        "spec": {
            "process": process,
            "runner": "layer_wise",
            "dataset": "mix_calib.jsonl",
            "save": [{"type": "ascendv1_saver", "part_file_size": 4}],
        },
    }


if __name__ == "__main__":
    main()
