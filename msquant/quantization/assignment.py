"""Which scheme each unit of a model gets, so that bytes are fewest for a loss or the loss least for bytes.

A unit is what must share a scheme: linears that engines run as one. Each has options, of which one is taken,
with its bytes and its loss on every text. That is a multiple-choice knapsack with one constraint a text
(Kellerer, Pferschy, Pisinger, "Knapsack Problems", chapter 11), solved as an integer program by HiGHS.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from msquant.errors import MsquantError
from msquant.schemes import Scheme

GAP = 1e-3
"""A solution may have so much more bytes, or loss, than the best one has, as a part of them."""

SECONDS = 20.0
"""That one program may take; what was found by then is taken, with the gap that is proved."""


@dataclass(frozen=True)
class Option:
    """A scheme that a unit can have.

    Attributes:
        scheme: which.
        nbytes: of the unit's stored tensors in it.
        losses: what it costs on every text, in nats.
    """

    scheme: Scheme
    nbytes: int
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Unit:
    """Linears that must share a scheme.

    Attributes:
        layer: the decoder layer that they are in.
        name: of the unit within it, for example `qkv`.
        linears: their full names.
        options: the schemes that they can have; at least one.
    """

    layer: int
    name: str
    linears: tuple[str, ...]
    options: tuple[Option, ...]

    @property
    def key(self) -> str:
        """What it is called: `11.down`."""
        return f"{self.layer}.{self.name}"


@dataclass(frozen=True)
class Assignment:
    """A scheme for every unit.

    Attributes:
        chosen: the option of each unit, in their order.
        gap: the part by which its bytes, or its loss, may be above the least possible.
    """

    chosen: tuple[Option, ...]
    gap: float = field(default=0.0, compare=False)

    @property
    def nbytes(self) -> int:
        """Of all units."""
        return sum(option.nbytes for option in self.chosen)

    @property
    def losses(self) -> tuple[float, ...]:
        """The summed loss on every text."""
        return tuple(float(x) for x in np.sum([option.losses for option in self.chosen], axis=0))

    @property
    def loss(self) -> float:
        """On the text on which it is greatest."""
        return max(self.losses)


def smallest(
    units: Sequence[Unit], max_losses: Sequence[float], max_bytes: int | None = None
) -> Assignment | None:
    """The assignment of fewest bytes whose summed losses are at most so much.

    Args:
        units: of the whole model.
        max_losses: in nats, on every text.
        max_bytes: of all units; None for no limit.

    Returns:
        It; None if there is none.

    Raises:
        MsquantError: the solver finds nothing in time.
    """
    problem = _Problem(units)
    limits = list(zip(problem.losses, max_losses, strict=True))
    if max_bytes is not None:
        limits.append((problem.nbytes, float(max_bytes)))
    return problem.solve(problem.nbytes, limits)


def most_accurate(units: Sequence[Unit], max_bytes: int) -> Assignment | None:
    """The assignment of at most so many bytes whose greatest loss over the texts is least.

    Args:
        units: of the whole model.
        max_bytes: of all units.

    Returns:
        It; None if not even the smallest fits. Raises as `smallest`.
    """
    problem = _Problem(units)
    # A further variable is the greatest loss: no text's sum is above it.
    return problem.solve(None, [(problem.nbytes, float(max_bytes))])


def frontier(units: Sequence[Unit], points: int) -> list[Assignment]:
    """Assignments from the smallest to the most accurate one, at evenly spread bytes.

    Args:
        units: of the whole model.
        points: how many, at least 2; fewer where neighbours are the same.
    """
    problem = _Problem(units)
    least = sum(min(option.nbytes for option in unit.options) for unit in units)
    most = sum(min(unit.options, key=lambda option: max(option.losses)).nbytes for unit in units)
    found: list[Assignment] = []
    for limit in np.linspace(least, max(least, most), points):
        made = problem.solve(None, [(problem.nbytes, float(np.ceil(limit)))])
        if made is not None and (not found or made.chosen != found[-1].chosen):
            found.append(made)
    return found


class _Problem:
    """The options of all units as the 0-1 variables of an integer program."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self._units = units
        options = [option for unit in units for option in unit.options]
        self.nbytes = np.array([option.nbytes for option in options], dtype=np.float64)
        self.losses = np.array([option.losses for option in options], dtype=np.float64).T
        self._of_unit = np.repeat(np.arange(len(units)), [len(unit.options) for unit in units])

    def solve(
        self, cost: NDArray[np.float64] | None, limits: Sequence[tuple[NDArray[np.float64], float]]
    ) -> Assignment | None:
        """The choice of least cost within limits; without a cost, of the least greatest loss."""
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_matrix, hstack, vstack

        count, units = len(self.nbytes), len(self._units)
        extra = 0 if cost is not None else 1
        one_each = csr_matrix((np.ones(count), (self._of_unit, np.arange(count))), (units, count + extra))
        constraints = [LinearConstraint(one_each, 1, 1)]
        rows, bounds = [], []
        for row, limit in limits:
            # In units of the limit, so that the solver's tolerance is a part of it.
            scale = limit if limit > 0 else 1.0
            rows.append(np.append(row / scale, np.zeros(extra)))
            bounds.append(limit / scale)
        if rows:
            constraints.append(LinearConstraint(vstack([csr_matrix(row) for row in rows]), -np.inf, bounds))
        if cost is None:
            scale = max(float(self.losses.sum(axis=1).max()), 1e-12)
            below = hstack([csr_matrix(self.losses / scale), -np.ones((len(self.losses), 1))])
            constraints.append(LinearConstraint(below, -np.inf, 0))
            # Of equal losses the smaller: bytes weigh less than anything that is measured.
            objective = np.append(1e-7 * self.nbytes / max(self.nbytes.sum(), 1.0), 1.0)
        else:
            objective = cost / max(float(cost.sum()), 1.0)
        with _without_output():
            found = milp(
                objective,
                constraints=constraints,
                integrality=np.append(np.ones(count), np.zeros(extra)),
                bounds=Bounds(0, np.append(np.ones(count), np.full(extra, np.inf))),
                options={"mip_rel_gap": GAP, "time_limit": SECONDS},
            )
        if found.x is None:
            if found.status == 2:
                return None
            raise MsquantError(
                f"no assignment of schemes was found: {found.message}",
                remedy="give another bound, or fewer schemes with --schemes",
            )
        taken = iter(found.x[:count])
        chosen = []
        for unit in self._units:
            values = [next(taken) for _ in unit.options]
            chosen.append(unit.options[int(np.argmax(values))])
        return Assignment(tuple(chosen), float(found.mip_gap or 0.0))


@contextmanager
def _without_output() -> Iterator[None]:
    """Keep what HiGHS prints, on the process's own standard output, out of JSON that others read there."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
