"""`msquant.json`: everything that a result came from, and what the pass chose."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from msquant.algorithms.base import Algorithm
from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.kernels.layer_report import GroupReport, LayerReport
from msquant.recipe.recipe import Recipe

DIGITS = 4
"""Of measured losses and errors: on some processors, float32 products differ in the last place between
processes, which was seen to change losses by up to 5e-7 of their value."""

RECORDED = ("msquant", "mindspore", "mindspore-gs", "transformers", "numpy", "safetensors")


def job_identity(
    recipe: Recipe, source: Checkpoint, calibration: Mapping[str, Any], device: str
) -> dict[str, Any]:
    """What two runs must have in common for one to continue the other.

    It holds neither times nor paths of this machine but the model's, so equal inputs give equal bytes. How
    the result is measured and served is left out: it changes none of its tensors.

    Args:
        recipe: what was asked for.
        source: the checkpoint to quantize.
        calibration: the record of its samples.
        device: `cpu` or `ascend`.
    """
    return {
        "versions": {package: version(package) for package in RECORDED},
        "recipe": recipe.model_dump(mode="json", exclude={"evaluation", "serving"}),
        "source": source.fingerprint(),
        "calibration": dict(calibration),
        "device": device,
    }


def build_manifest(
    recipe: Recipe, identity: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The manifest of a result, without the format and the files, which the format adds.

    Args:
        recipe: what was asked for.
        identity: from `job_identity`.
        layers: from `layer_record`, one a decoder layer.
    """
    return {
        "msquant": version("msquant"),
        **identity,
        "recipe": recipe.model_dump(mode="json"),
        "seed": recipe.calibration.seed,
        "layers": list(layers),
        "experts_with_few_tokens": {
            str(layer["index"]): layer["experts"]["few_tokens"]
            for layer in layers
            if layer.get("experts", {}).get("few_tokens")
        },
    }


def measured(value: float) -> float:
    """A measured value as it is recorded, in so many digits as processes agree on."""
    return float(f"{value:.{DIGITS}g}")


def layer_record(index: int, report: LayerReport, policy: Algorithm) -> dict[str, Any]:
    """What is kept of one decoder layer's report."""
    record: dict[str, Any] = {
        "index": index,
        "error": measured(report.error),
        "groups": [_group_record(group) for group in report.groups],
        "mean_clip_ratio": {
            name: round(float(ratios.mean()), 4) for name, ratios in report.clip_ratios.items()
        },
    }
    if report.cache:
        record["cache"] = [
            {
                "name": cache.name,
                "range_floor": cache.range_floor,
                "factor": cache.factor,
                "loss": measured(cache.loss),
                **({} if cache.alpha is None else {"alpha": cache.alpha}),
            }
            for cache in report.cache
        ]
    if report.expert_tokens:
        fed = [got + lent for got, lent in zip(report.expert_tokens, report.lent_tokens, strict=True)]
        record["experts"] = {
            "tokens": report.expert_tokens,
            "lent_tokens": report.lent_tokens,
            "few_tokens": [i for i, tokens in enumerate(fed) if tokens < policy.min_expert_tokens],
        }
    return record


def _group_record(group: GroupReport) -> dict[str, Any]:
    record = {key: value for key, value in asdict(group).items() if value is not None}
    if group.loss is not None:
        record["loss"] = measured(group.loss)
    return record
