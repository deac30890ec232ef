"""The flow of `msquant analyze`: what quantizing each group of linears costs, and a recipe that spares some.

One pass over the decoder layers in floating point, one layer in memory at a time; nothing is written but
hidden states, into a temporary folder. What it is made of: `analysis_work.py`.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from msquant.checkpoint.disk import shown_sizes
from msquant.checkpoint.memory import MEMORY_BUDGET, peak_memory
from msquant.errors import RecipeError
from msquant.evaluation.ranking import rank
from msquant.flows.analysis_work import AnalysisJob, measure
from msquant.flows.calibration import calibration_of, require_sources
from msquant.flows.source import (
    batch_tokens,
    folder_plan,
    folder_plans,
    open_model,
    require_target,
    rotated,
)
from msquant.flows.workers import Workers
from msquant.formats.folder_plan import FolderPlan, plan_folder
from msquant.interrupts import deferred_interrupts
from msquant.kernels.layer_report import GroupError
from msquant.models.config import ModelConfig
from msquant.models.device import require_device
from msquant.progress import Progress
from msquant.quantization.layer_schemes import layer_schemes
from msquant.quantization.selection import Budget, RankedGroup, gain, select
from msquant.recipe.recipe import Recipe
from msquant.schemes import FLOAT, W8A8_DYNAMIC, Scheme


@dataclass(frozen=True)
class Analysis:
    """The groups of a model by what quantizing them costs.

    Attributes:
        groups: the greatest error first.
        error: the sum of their errors.
        mixed_error: the same with the kept ones as they are kept; None without a budget.
        kept: those that the budget keeps, in the order in which they were chosen; empty without one.
        recipe: the recipe given, with these kept; None without a budget.
        output_bytes: of all tensors that the recipe given makes.
        mixed_bytes: of all tensors that `recipe` makes; None without a budget.
        seconds: wall time.
        peak_memory: greatest resident set of this process so far, in bytes.
    """

    groups: list[RankedGroup]
    error: float
    mixed_error: float | None
    kept: list[RankedGroup]
    recipe: Recipe | None
    output_bytes: int
    mixed_bytes: int | None
    seconds: float
    peak_memory: int


def analyze(
    recipe: Recipe,
    *,
    budget: Budget | None = None,
    source: str | None = None,
    device: str = "cpu",
    memory_budget: int = MEMORY_BUDGET,
    verbose: bool = False,
    offline: bool = False,
    workers: Workers | None = None,
    progress: Progress | None = None,
) -> Analysis:
    """Measure the error that quantizing each group of linears causes alone.

    Args:
        recipe: what is to be done to the model.
        budget: what may be kept out of static int8; None only ranks.
        source: folder of the weights, in place of the recipe's model.
        device: `cpu` or `ascend`.
        memory_budget: bytes of hidden states held in memory.
        verbose: show golden-stick's own log.
        offline: ask no hub for calibration text.
        workers: who does the work; this process alone if None. The numbers are the same.
        progress: callbacks; a layer's record holds its `index` and the `errors` of its groups by name.

    Raises:
        MsquantError: the input is bad; or the budget is one that the model or the serving backend cannot
            keep, which is said before any work where it does not depend on the errors.
    """
    started = time.monotonic()
    progress = progress or Progress()
    require_device(device)
    require_sources(recipe.calibration)
    model = rotated(open_model(recipe, source, note=progress.stage), recipe.quantization)
    plans = folder_plans(recipe, model)
    plan = plans[0]
    if budget is not None:
        _check_budget(budget, plans)
    samples = calibration_of(recipe.calibration, model.folder, offline=offline, progress=progress).samples
    per_token = all(W8A8_DYNAMIC in plan.format.words for plan in plans)
    batches = list(samples.batches(batch_tokens(model.config)))
    length = samples.tokens.shape[1]
    job = AnalysisJob(recipe, batches, length, per_token, device, memory_budget, verbose)
    with deferred_interrupts():
        measured = measure(job, model, workers or Workers(), progress)
    groups = _ranked(measured, model.config, recipe)
    error = math.fsum(group.measured.error for group in groups)
    kept: list[RankedGroup] = []
    mixed = mixed_bytes = mixed_error = None
    if budget is not None:
        kept = select(groups, budget, plan.tensor_bytes)
        mixed = _mixed(recipe, kept, budget)
        mixed_bytes = folder_plan(mixed, model).tensor_bytes
        mixed_error = error - math.fsum(gain(group, budget) for group in kept)
    return Analysis(
        groups=groups,
        error=error,
        mixed_error=mixed_error,
        kept=kept,
        recipe=mixed,
        output_bytes=plan.tensor_bytes,
        mixed_bytes=mixed_bytes,
        seconds=time.monotonic() - started,
        peak_memory=peak_memory(),
    )


def _check_budget(budget: Budget, plans: Sequence[FolderPlan]) -> None:
    """Refuse what no measurement can make possible."""
    plan = plans[0]
    if not budget.amount >= (0 if budget.kind == "max_error" else 1):
        raise budget.refused(f"{budget.amount:g} is too little", "give a positive number")
    for form in (plan.format for plan in plans):
        if budget.kind == "keep_dynamic" and W8A8_DYNAMIC not in form.words:
            raise budget.refused(
                f"{form.consumer} runs {' and '.join(form.vocabulary)} only", "use --keep-float"
            )
    if budget.kind == "max_size" and budget.amount < plan.tensor_bytes:
        given, least = shown_sizes(int(budget.amount), plan.tensor_bytes)
        raise budget.refused(
            f"{given} is less than the {least} that the recipe makes as it is",
            f"give {math.ceil(plan.tensor_bytes / 1e6)}MB or more",
        )
    if budget.kind in ("keep_float", "keep_dynamic"):
        able = [
            s
            for s in plan.linears.values()
            if s.is_static or (not s.is_float and budget.kind == "keep_float")
        ]
        if budget.amount > len(able):
            raise budget.refused(
                f"{budget.amount:.0f} matrices are more than the {len(able)} that the recipe quantizes",
                f"give at most {len(able)}",
            )


def _ranked(errors: Sequence[GroupError], config: ModelConfig, recipe: Recipe) -> list[RankedGroup]:
    groups = []
    for ranked in rank({error: error.error for error in errors}):
        error = ranked.key
        schemes = layer_schemes(config, recipe.quantization, error.layer)
        as_float = schemes | dict.fromkeys(error.linears, FLOAT)
        per_token = schemes | dict.fromkeys(error.linears, W8A8_DYNAMIC)
        grown = None
        after = _layer_bytes(config, error.layer, as_float, recipe)
        if after is not None:
            grown = after - (_layer_bytes(config, error.layer, schemes, recipe) or 0)
        served = error.dynamic_error is not None and (
            _layer_bytes(config, error.layer, per_token, recipe) is not None
        )
        groups.append(RankedGroup(error, ranked.share, grown, served))
    return groups


def _layer_bytes(
    config: ModelConfig, index: int, schemes: Mapping[str, Scheme], recipe: Recipe
) -> int | None:
    """Bytes of a decoder layer's tensors; None where a format's consumer does not run it in these schemes."""
    layer = [config.layer_shapes(index)]
    try:
        plans = [
            plan_folder(layer, schemes, config.raw, config.dtype, format_name=name) for name in recipe.formats
        ]
        require_target(recipe, plans)
    except RecipeError:
        return None
    return plans[0].tensor_bytes


def _mixed(recipe: Recipe, kept: Sequence[RankedGroup], budget: Budget) -> Recipe:
    names = [linear for group in kept for linear in group.measured.linears]
    scheme = W8A8_DYNAMIC if budget.kind == "keep_dynamic" else FLOAT
    rules = (*((name, scheme) for name in names), *recipe.quantization.schemes)
    return recipe.replace("quantization", schemes=rules)
