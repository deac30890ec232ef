"""Which groups of linears to keep out of static int8, by what quantizing each of them costs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from msquant.errors import RecipeError
from msquant.kernels.layer_report import GroupError

BudgetKind = Literal["keep_float", "keep_dynamic", "max_error", "max_size"]


@dataclass(frozen=True)
class Budget:
    """What a selection may take or must reach.

    Attributes:
        kind: `keep_float`: at most so many matrices stay in floating point; `keep_dynamic`: at most so many
            get a scale per token; `max_error`: as few as possible stay in floating point for the summed error
            to be at most that; `max_size`: as many stay in floating point as the bytes of all tensors allow.
        amount: matrices, error or bytes.
    """

    kind: BudgetKind
    amount: float

    @property
    def option(self) -> str:
        """As the command line calls it."""
        return f"--{self.kind.replace('_', '-')}"

    def refused(self, what: str, remedy: str) -> RecipeError:
        """The error for a budget that cannot be kept."""
        return RecipeError(what, where=self.option, remedy=remedy)


def budget_of(
    keep_float: int | None, keep_dynamic: int | None, max_error: float | None, max_size: int | None
) -> Budget | None:
    """The budget of which the amount is given; None if none is. Raises RecipeError for several."""
    amounts: dict[BudgetKind, float | None] = {
        "keep_float": keep_float,
        "keep_dynamic": keep_dynamic,
        "max_error": max_error,
        "max_size": max_size,
    }
    given = [Budget(kind, amount) for kind, amount in amounts.items() if amount is not None]
    if len(given) > 1:
        raise RecipeError(
            f"{' and '.join(budget.option for budget in given)} exclude one another",
            remedy="give one of them",
        )
    return given[0] if given else None


@dataclass(frozen=True)
class RankedGroup:
    """A group among all of a model.

    Attributes:
        measured: its error.
        share: of the sum of all errors.
        float_bytes: what the written tensors grow by if it stays in floating point; None where the serving
            backend does not run that.
        per_token: whether its error with a scale per token is known, and the serving backend runs that.
    """

    measured: GroupError
    share: float
    float_bytes: int | None
    per_token: bool = True

    @property
    def matrices(self) -> int:
        """How many linears it has."""
        return len(self.measured.linears)


def gain(group: RankedGroup, budget: Budget) -> float:
    """How much error it takes away to keep a group as the budget keeps groups; 0 where that is not known."""
    if budget.kind != "keep_dynamic":
        return group.measured.error
    dynamic = group.measured.dynamic_error
    return 0.0 if dynamic is None else group.measured.error - dynamic


def select(groups: Sequence[RankedGroup], budget: Budget, output_bytes: int) -> list[RankedGroup]:
    """Choose groups, the one that buys most for its cost first.

    Args:
        groups: of the whole model.
        budget: the limit.
        output_bytes: of all tensors, with nothing selected.

    Returns:
        Those to keep in floating point, or to give a scale per token for `keep_dynamic`; in the order in
        which they were chosen.

    Raises:
        RecipeError: the error cannot be reached.
    """
    if budget.kind == "max_error":
        return _fewest(groups, budget)
    if budget.kind == "keep_dynamic":
        groups = [group for group in groups if group.per_token]
        return _most(groups, budget, lambda group: group.matrices, budget.amount)
    able = [group for group in groups if group.float_bytes is not None]
    if budget.kind == "keep_float":
        return _most(able, budget, lambda group: group.matrices, budget.amount)
    return _most(able, budget, lambda group: group.float_bytes or 0, budget.amount - output_bytes)


def _most(
    groups: Sequence[RankedGroup], budget: Budget, cost: Callable[[RankedGroup], int], limit: float
) -> list[RankedGroup]:
    """By gain for the cost, all that the limit still takes."""
    kept = []
    for group in sorted(groups, key=lambda group: -gain(group, budget) / max(1, cost(group))):
        if gain(group, budget) > 0 and cost(group) <= limit:
            kept.append(group)
            limit -= cost(group)
    return kept


def _fewest(groups: Sequence[RankedGroup], budget: Budget) -> list[RankedGroup]:
    """By error for each matrix until the sum is low enough, without those that it would be low without."""

    def left(kept: Sequence[RankedGroup]) -> float:
        return math.fsum(group.measured.error for group in groups if group not in kept)

    able = [group for group in groups if group.float_bytes is not None]
    kept: list[RankedGroup] = []
    for group in sorted(able, key=lambda g: -g.measured.error / g.matrices):
        if left(kept) <= budget.amount:
            break
        kept.append(group)
    if left(kept) > budget.amount:
        raise budget.refused(
            f"{left(kept):.3g} is left with all that the serving backend runs in floating point kept there",
            f"give more than {left(kept):.3g}",
        )
    for group in reversed(kept):
        others = [other for other in kept if other != group]
        if left(others) <= budget.amount:
            kept = others
    return kept
