"""llm-compressor 0.14.0.1 beside msquant on SmolLM2-135M: the same tokens, texts and arithmetic.

llm-compressor runs in its own environment; `MSQUANT_LLM_COMPRESSOR` is its Python. Make it with

    python3.11 -m venv peer && peer/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
"""

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import accuracy
from benchmarks.rows import row
from benchmarks.smollm2 import SAMPLES, SEQUENCE_LENGTH, float_folder

RUN = Path(__file__).parent / "llm_compressor_run.py"
OURS = {
    "static": ("smoothquant, static", "osl-robust, static"),
    "dynamic": ("smoothquant, per token", "osl-robust, per token"),
}
MOST_CPU = {"smoothquant": 1.5, "osl-robust": 10.0}


def measure() -> list[dict[str, Any]]:
    """Both activation schemes, theirs first."""
    python = os.environ.get("MSQUANT_LLM_COMPRESSOR")
    if not python:
        raise SystemExit(__doc__)
    folder = float_folder()
    reference = accuracy.Reference(folder)
    rows = []
    for scheme, names in OURS.items():
        with tempfile.TemporaryDirectory(prefix="msquant-peer-") as parent:
            theirs, seconds = _run(python, folder, Path(parent), scheme)
            kl, text = reference.score(accuracy.simulated(folder, theirs))
        rows.append(row(f"llm-compressor SmoothQuant, {scheme}", f"{text}; {seconds:.0f} CPU s"))
        for name in names:
            ours, ours_text, ours_seconds = reference.measure(accuracy.POLICIES[name])
            ratio, most = ours_seconds / seconds, MOST_CPU[name.partition(",")[0]]
            better = all(ours[key] < kl[key] for key in kl)
            rows.append(
                row(
                    f"msquant {name}",
                    f"{ours_text}; {ours_seconds:.0f} CPU s, {ratio:.1f} times",
                    f"KL below, at most {most} times",
                    better and ratio <= most,
                )
            )
    return rows


def _run(python: str, folder: Path, parent: Path, scheme: str) -> tuple[accuracy.Captured, float]:
    """What it wrote, and the CPU seconds it took."""
    from msquant.pipeline import calibration_tokens
    from msquant.recipes import Recipe

    recipe = Recipe(model=str(folder)).replace(
        "calibration", samples=SAMPLES, sequence_length=SEQUENCE_LENGTH
    )
    tokens, output = parent / "tokens.npy", parent / "out"
    np.save(tokens, calibration_tokens(recipe, folder))
    done = subprocess.run(
        [python, str(RUN), str(folder), str(tokens), str(output), scheme],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return read_folder(output), json.loads(done.stdout.splitlines()[-1])["cpu_seconds"]


def read_folder(folder: Path) -> accuracy.Captured:
    """A compressed-tensors folder of int8 linears."""
    from safetensors.torch import load_file

    from msquant.checkpoint.weights import QuantizedLinear

    captured = accuracy.Captured()
    tensors: dict[str, Any] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        module = name.removesuffix(".weight_scale")
        scale, offset = (tensors.get(f"{module}.input_{part}") for part in ("scale", "zero_point"))
        captured.linear(
            module,
            QuantizedLinear(
                tensors[f"{module}.weight"].numpy(),
                tensors[name].float().numpy().reshape(-1),
                input_scale=None if scale is None else scale.float().numpy().reshape(1),
                input_offset=None if offset is None else offset.numpy().astype(np.int32).reshape(1),
            ),
        )
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            captured.tensor(name, tensor.float().numpy())
    return captured
