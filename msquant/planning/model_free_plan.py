"""What `msquant quantize --calibration none` would do to a model, by its headers alone."""

import re
from collections import defaultdict
from dataclasses import dataclass
from math import prod
from pathlib import Path

from msquant.checkpoint.disk import free_bytes, shown_sizes
from msquant.checkpoint.memory import available_memory
from msquant.errors import ModelError
from msquant.flows.conversion import output_folders
from msquant.flows.model_free import needed_memory
from msquant.flows.model_free_source import (
    ModelFreeSource,
    folder_plans,
    open_model_free,
    published_model_free,
)
from msquant.formats.folder_plan import FolderPlan
from msquant.planning.quantization_plan import FormatPlan
from msquant.recipe.recipe import Recipe

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class TensorKind:
    """Tensors of a model that have one name but for its numbers, one shape, and one fate.

    Attributes:
        pattern: their name, with `*` for numbers.
        count: how many there are.
        shape: of each.
        scheme: that they are quantized in, or `FLOAT`.
        reason: why they stay in floating point; empty for others.
        source_bytes: of all of them, without scales of FP8 blocks.
        output_bytes: of what they become, in the first format.
    """

    pattern: str
    count: int
    shape: tuple[int, ...]
    scheme: str
    reason: str
    source_bytes: int
    output_bytes: int


@dataclass(frozen=True)
class ModelFreePlan:
    """What a quantization without calibration would take and make.

    Attributes:
        model: as the recipe or the caller named it.
        source: folder of the weights; None if only the published config is known.
        output: the folder to make, that of the first format.
        formats: all folders to make.
        architecture: `model_type` of `config.json`.
        kinds: all tensors, those that are quantized first, the largest first of either.
        source_bytes: of all tensors of the source.
        output_bytes: of all shards, in all formats.
        free_disk: on the output's disk; None if that cannot be told.
        peak_memory: resident at most in each process, an estimate, without the comparison with the float
            model at the end.
        available_memory: on this machine; None if that cannot be told.
        notes: what the plan takes for granted.
        problems: what would not fit, with both numbers and a remedy.
        workers: processes that share the work.
    """

    model: str
    source: Path | None
    output: Path
    formats: tuple[FormatPlan, ...]
    architecture: str
    kinds: tuple[TensorKind, ...]
    source_bytes: int
    output_bytes: int
    free_disk: int | None
    peak_memory: int
    available_memory: int | None
    notes: tuple[str, ...]
    problems: tuple[str, ...]
    workers: int = 1

    @property
    def parameters(self) -> int:
        """Of all tensors, without the scales of FP8 blocks."""
        return sum(kind.count * prod(kind.shape) for kind in self.kinds)

    @property
    def disk_bytes(self) -> int:
        """Needed on the output's disk."""
        return self.output_bytes


def make_model_free_plan(
    recipe: Recipe, output: Path, *, source: str | None = None, workers: int = 1
) -> ModelFreePlan:
    """Plan a quantization without calibration; no weight is read, and nothing is written.

    Args:
        recipe: everything that affects the result.
        output: the folder that is to be made.
        source: folder of the weights, in place of the recipe's model. A published model of a family that
            msquant knows is planned without its weights if they are not here.
        workers: processes that share the work.

    Raises:
        MsquantError: the model is unknown, incomplete or cannot be started from, or the recipe does not fit.
    """
    notes: tuple[str, ...] = ()
    try:
        found = open_model_free(recipe, source or recipe.model)
    except ModelError as error:
        published = None if source else published_model_free(recipe)
        if published is None:
            raise
        found = published
        notes = (f"planned from the published config.json alone: {error.what}",)
    plans = folder_plans(recipe, found)
    written = sum(plan.file_bytes for plan in plans)
    free = free_bytes(output.absolute())
    problems = []
    if free is not None and written > free:
        wanted, left = shown_sizes(written, free)
        problems.append(
            f"disk: {wanted} are needed for the output, {left} are free there; free some space, or choose "
            "another disk with --output"
        )
    peak, available = needed_memory(found, plans[0], workers), available_memory()
    if available is not None and workers > 1 and workers * peak > available:
        wanted, left = shown_sizes(workers * peak, available)
        problems.append(
            f"memory: about {wanted} are needed by {workers} workers, {left} are available; use --workers "
            f"{max(1, available // peak)}"
        )
    return ModelFreePlan(
        model=source or recipe.model,
        source=found.folder,
        output=output,
        formats=tuple(
            FormatPlan(plan.format.name, plan.variant, plan.format.consumer, folder, plan.file_bytes)
            for plan, folder in zip(plans, output_folders(output, recipe.formats), strict=True)
        ),
        architecture=str(found.config.get("model_type")),
        kinds=_kinds(found, plans[0]),
        source_bytes=found.nbytes,
        output_bytes=written,
        free_disk=free,
        peak_memory=peak,
        available_memory=available,
        notes=(*notes, *found.notes),
        problems=tuple(problems),
        workers=workers,
    )


def _kinds(source: ModelFreeSource, plan: FolderPlan) -> tuple[TensorKind, ...]:
    sizes: dict[str, int] = defaultdict(int)
    for shard in plan.shards:
        for spec in shard.specs:
            module = spec.name.rpartition(".")[0]
            sizes[module if module in source.linears else spec.name] += spec.nbytes
    rows: dict[tuple[str, tuple[int, ...], str, str], list[tuple[int, int]]] = defaultdict(list)
    shares: dict[str, int] = defaultdict(int)
    for linear in source.linears.values():
        shares[linear.matrix.tensor] += 1
    for module, linear in source.linears.items():
        tensor = linear.matrix.tensor
        before = source.specs[tensor].nbytes // shares[tensor]
        key = _NUMBER.sub("*", f"{module}."), linear.matrix.shape, str(plan.linears[module]), ""
        rows[key].append((before, sizes[module]))
    for name, reason in source.kept.items():
        spec = source.specs[name]
        rows[_NUMBER.sub("*", f"{name}."), spec.shape, "FLOAT", reason].append((spec.nbytes, sizes[name]))
    kinds = [
        TensorKind(
            pattern.removesuffix("."),
            len(found),
            shape,
            scheme,
            reason,
            sum(before for before, _ in found),
            sum(after for _, after in found),
        )
        for (pattern, shape, scheme, reason), found in rows.items()
    ]
    return tuple(sorted(kinds, key=lambda kind: (bool(kind.reason), -kind.source_bytes, kind.pattern)))
