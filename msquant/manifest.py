"""`msquant.json`: everything that a result came from, and what the pass chose."""

import hashlib
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.reader import Checkpoint
from msquant.quantization.report import LayerReport
from msquant.recipes import Recipe

RECORDED = ("msquant", "mindspore", "mindspore-gs", "transformers", "numpy", "safetensors")


def build_manifest(
    recipe: Recipe, source: Checkpoint, tokens: NDArray[np.int32], reports: list[LayerReport]
) -> dict[str, Any]:
    """The manifest of a result, without the format and the files, which the format adds.

    It holds neither times nor paths of this machine, so that equal inputs give equal bytes.

    Args:
        recipe: what was asked for.
        source: the checkpoint that was quantized.
        tokens: `[samples, sequence_length]`, the calibration batches.
        reports: one a decoder layer.
    """
    return {
        "msquant": version("msquant"),
        "recipe": recipe.model_dump(mode="json"),
        "seed": recipe.calibration.seed,
        "versions": {package: version(package) for package in RECORDED},
        "source": {
            "tensors": len(source.names()),
            "bytes": sum(source.nbytes(name) for name in source.names()),
            "shards": {name: shard.path.stat().st_size for name, shard in sorted(source.shards.items())},
        },
        "calibration": {"shape": list(tokens.shape), "sha256": hashlib.sha256(tokens.tobytes()).hexdigest()},
        "layers": [layer_record(index, report) for index, report in enumerate(reports)],
    }


def layer_record(index: int, report: LayerReport) -> dict[str, Any]:
    """What is kept of one decoder layer's report."""
    return {
        "index": index,
        "error": report.error,
        "groups": [{"name": group.name, "alpha": group.alpha, "loss": group.loss} for group in report.groups],
        "mean_clip_ratio": {
            name: round(float(ratios.mean()), 4) for name, ratios in report.clip_ratios.items()
        },
    }
