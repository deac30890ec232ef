"""The choice of a scheme for every unit, held to brute force."""

from itertools import product

import numpy as np
import pytest

from msquant.quantization.assignment import GAP, Option, Unit, frontier, most_accurate, smallest
from msquant.schemes import FLOAT, W4A16, W8A8, W8A16

SCHEMES = (FLOAT, W8A16, W4A16, W8A8)
# Of the solver's own feasibility, as a part of a limit.
TOLERANCE = 1e-6


def made_up(seed: int, units: int = 6, texts: int = 3) -> list[Unit]:
    """Units with two to four options of random bytes and losses, the first without a loss."""
    random = np.random.default_rng(seed)
    made = []
    for number in range(units):
        size = int(random.integers(1000, 9000))
        options = [Option(FLOAT, 4 * size, (0.0,) * texts)]
        for place in range(1, int(random.integers(2, 5))):
            losses = tuple(float(x) for x in random.exponential(10.0 ** -(3 - place / 2), texts))
            options.append(Option(SCHEMES[place], int(4 * size * random.uniform(0.2, 0.6)), losses))
        made.append(Unit(number, "down", (f"model.layers.{number}.mlp.down_proj",), tuple(options)))
    return made


def everything(units: list[Unit]) -> list[tuple[int, float]]:
    """Bytes and greatest loss of every assignment there is."""
    found = []
    for chosen in product(*(unit.options for unit in units)):
        losses = np.sum([option.losses for option in chosen], axis=0)
        found.append((sum(option.nbytes for option in chosen), float(losses.max())))
    return found


def texts_of(units: list[Unit]) -> int:
    """How many texts losses are of."""
    return len(units[0].options[0].losses)


@pytest.mark.parametrize("seed", range(12))
def test_the_smallest_is_that_of_brute_force(seed: int) -> None:
    units = made_up(seed)
    possible = everything(units)
    for part in (0.0, 0.1, 0.4, 1.0):
        bound = part * max(loss for _, loss in possible)
        found = smallest(units, [bound] * texts_of(units))
        assert found is not None
        assert found.loss <= bound * (1 + TOLERANCE) + 1e-12
        best = min(nbytes for nbytes, loss in possible if loss <= bound)
        assert found.nbytes <= best * (1 + GAP)


@pytest.mark.parametrize("seed", range(12))
def test_the_most_accurate_is_that_of_brute_force(seed: int) -> None:
    units = made_up(seed)
    possible = everything(units)
    least, most = min(possible)[0], max(possible)[0]
    for part in (0.0, 0.2, 0.6, 1.0):
        limit = int(least + part * (most - least))
        found = most_accurate(units, limit)
        assert found is not None
        assert found.nbytes <= limit
        best = min(loss for nbytes, loss in possible if nbytes <= limit)
        assert found.loss <= best * (1 + GAP) + 1e-6 * max(loss for _, loss in possible)


def test_bounds_that_no_assignment_keeps_have_none() -> None:
    units = made_up(1)
    least = min(nbytes for nbytes, _ in everything(units))
    assert most_accurate(units, least - 1) is None
    assert smallest(units, [0.0] * texts_of(units), least) is None
    tight = most_accurate(units, least)
    assert tight is not None
    assert tight.nbytes == least


def test_the_frontier_rises_in_bytes_and_falls_in_loss() -> None:
    units = made_up(3, units=10)
    found = frontier(units, 8)
    assert 2 <= len(found) <= 8
    sizes, losses = [each.nbytes for each in found], [each.loss for each in found]
    assert sizes == sorted(sizes)
    assert losses == sorted(losses, reverse=True)
    assert found[-1].loss == 0


def test_many_units_are_solved_in_time() -> None:
    units = made_up(5, units=200, texts=6)
    bound = 0.3 * sum(max(max(option.losses) for option in unit.options) for unit in units) / 6
    found = smallest(units, [bound] * texts_of(units))
    assert found is not None
    assert found.gap <= GAP
