"""Peak memory of quantizing a DeepSeek-V3 of 4 and of 32 layers, and of 8 and of 256 experts a layer.

In float32 the 32 layers would take 2.2 GB (4: 0.25 GB) and a layer's 256 experts 1.6 GB (8: 0.05 GB): beside
the 0.9 GB that the process takes in any case, holding either would show. Between equal runs the peak moves by
a few percent, with what threads happen to allocate at the same time.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.command import msquant
from benchmarks.r1_layers import Sizes, write_r1_layers
from benchmarks.rows import row
from tests.fixtures.policies import rules

MAX_GROWTH = 0.1
FEW_LAYERS, MANY_LAYERS = 4, 32
FEW_EXPERTS, MANY_EXPERTS = 8, 256
SIZES: dict[str, int] = {
    **{"hidden": 1024, "heads": 8, "q_rank": 384, "kv_rank": 256, "dense": 2048, "expert": 512},
    **{"per_token": 2, "groups": 1},
}
RECIPE: dict[str, Any] = {
    # One candidate each: memory is asked for, and a search takes what its first candidate takes.
    "quantization": {
        "schemes": rules(skip=["lm_head", "kv_b_proj"], dynamic=["mlp."]),
        "smooth_alpha": [0.5],
    },
    "calibration": {"samples": 2, "sequence_length": 64},
}


def measure() -> list[dict[str, Any]]:
    """Quantize the smaller and the larger of either."""
    layers = [_peak(count, FEW_EXPERTS) for count in (FEW_LAYERS, MANY_LAYERS)]
    # Two layers: one is dense.
    experts = [_peak(2, count) for count in (FEW_EXPERTS, MANY_EXPERTS)]
    return [
        *_rows("layers", (FEW_LAYERS, MANY_LAYERS), layers),
        *_rows("experts", (FEW_EXPERTS, MANY_EXPERTS), experts),
    ]


def _rows(what: str, counts: tuple[int, int], peaks: list[int]) -> list[dict[str, Any]]:
    ratio = peaks[1] / peaks[0]
    target, met = f"< {1 + MAX_GROWTH}", ratio < 1 + MAX_GROWTH
    return [
        *(row(f"{n} {what}, peak memory, GB", round(p / 1e9, 3)) for n, p in zip(counts, peaks, strict=True)),
        row(f"{counts[1]} {what} to {counts[0]}", round(ratio, 3), target, met),
    ]


def _peak(layers: int, experts: int) -> int:
    """Bytes, of a model whose first layer is dense."""
    folder = Path(tempfile.mkdtemp(prefix="msquant-memory-"))
    try:
        sizes = Sizes(**SIZES, experts=experts)
        model = write_r1_layers(folder / "model", dense=1, moe=layers - 1, sizes=sizes)
        recipe = folder / "recipe.yaml"
        # JSON is YAML.
        recipe.write_text(json.dumps({"model": str(model)} | RECIPE))
        result = msquant("quantize", recipe, "--output", folder / "out")
        return int(result["peak_memory_bytes"])
    finally:
        shutil.rmtree(folder)
