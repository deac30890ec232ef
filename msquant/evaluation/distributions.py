"""Next-token distributions and how far two are apart, from logits that come in blocks of the vocabulary.

All sums are running ones in float64, so that neither the tokens' logits nor the head are ever whole:
`log sum exp` is kept relative to the greatest logit so far (the online softmax of arXiv 1805.02867).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TOP = 5

Wide = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Block:
    """Logits of some tokens for some of the vocabulary, as the reference has them.

    Attributes:
        logits: `[R, B]`.
        exponents: `exp(logits - top)` with the greatest logit so far, `[R, B]`.
        faded: what sums over earlier blocks are multiplied by, now that `top` may be another, `[R]`.
    """

    logits: Wide
    exponents: Wide
    faded: Wide


class Distributions:
    """One model's distributions of the token after each given one.

    Args:
        targets: the token that came next, `[N]`; -1 where none is known.
    """

    def __init__(self, targets: NDArray[np.integer]) -> None:
        count = len(targets)
        self._targets = targets
        self._top = np.full(count, -np.inf)
        self._sum = np.zeros(count)
        self._chosen = np.zeros(count)
        self._best = np.full((count, TOP), -np.inf)
        self._best_ids = np.full((count, TOP), -1)

    def add(self, rows: slice, first: int, logits: NDArray[np.float32]) -> Block:
        """Take the logits of the tokens `rows` for the vocabulary from `first` on, `[R, B]`."""
        wide = logits.astype(np.float64)
        # NaN and infinity are found in the end, once for all.
        with np.errstate(invalid="ignore", over="ignore"):
            top = np.maximum(self._top[rows], wide.max(axis=1))
            faded = np.exp(self._top[rows] - top)
            exponents = wide - top[:, None]
            np.exp(exponents, out=exponents)
            self._top[rows] = top
            self._sum[rows] = self._sum[rows] * faded + exponents.sum(axis=1)
        here = self._targets[rows] - first
        known = np.flatnonzero((self._targets[rows] >= 0) & (here >= 0) & (here < wide.shape[1]))
        self._chosen[rows.start + known] = wide[known, here[known]]
        self._rank(rows, first, logits)
        return Block(wide, exponents, faded)

    def _rank(self, rows: slice, first: int, logits: NDArray[np.float32]) -> None:
        # The greatest, one after the other: a tenth of the time of a partition.
        left, each = logits.copy(), np.arange(len(logits))
        ids = np.empty((len(logits), min(TOP, logits.shape[1])), np.int64)
        for place in range(ids.shape[1]):
            ids[:, place] = left.argmax(axis=1)
            left[each, ids[:, place]] = -np.inf
        values = np.concatenate([self._best[rows], np.take_along_axis(logits, ids, axis=1)], axis=1)
        ids = np.concatenate([self._best_ids[rows], ids + first], axis=1)
        order = np.argsort(-values, axis=1, kind="stable")[:, :TOP]
        self._best[rows] = np.take_along_axis(values, order, axis=1)
        self._best_ids[rows] = np.take_along_axis(ids, order, axis=1)

    @property
    def log_normalizers(self) -> Wide:
        """`log sum exp` of every token's logits, `[N]`."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self._top + np.log(self._sum)

    @property
    def known(self) -> NDArray[np.bool_]:
        """Whether the token that came next is known, `[N]`."""
        return self._targets >= 0

    @property
    def top(self) -> Wide:
        """Each token's greatest logit, `[N]`."""
        return self._top

    @property
    def losses(self) -> Wide:
        """Negative log-likelihood of the next token in nats, `[N]`; 0 where none is known."""
        return np.where(self.known, self.log_normalizers - self._chosen, 0.0)

    @property
    def best(self) -> NDArray[np.integer]:
        """The ids of the most likely tokens, the first first, `[N, 5]`; -1 where there are fewer."""
        return self._best_ids

    @classmethod
    def joined(cls, parts: Sequence["Distributions"]) -> "Distributions":
        """Those of several parts of the tokens, one part after the other."""
        made = cls(np.concatenate([part._targets for part in parts]))
        for name in ("_top", "_sum", "_chosen", "_best", "_best_ids"):
            setattr(made, name, np.concatenate([getattr(part, name) for part in parts]))
        return made


class Divergence:
    """How far another model's distributions are from a reference's.

    Args:
        reference: the reference's.
        other: the other's, of the same tokens.
    """

    def __init__(self, reference: Distributions, other: Distributions) -> None:
        self._reference, self._other = reference, other
        count = len(reference.best)
        self._weighted, self._wrong, self._power = np.zeros(count), np.zeros(count), np.zeros(count)

    def add(self, rows: slice, expected: Block, found: Block) -> None:
        """Take what both `Distributions.add` returned for the same logits."""
        with np.errstate(invalid="ignore", over="ignore"):
            apart = expected.logits - found.logits
            weighted = np.einsum("rb,rb->r", expected.exponents, apart)
            self._weighted[rows] = self._weighted[rows] * expected.faded + weighted
            self._wrong[rows] += np.einsum("rb,rb->r", apart, apart)
            self._power[rows] += np.einsum("rb,rb->r", expected.logits, expected.logits)

    @classmethod
    def joined(
        cls, parts: Sequence["Divergence"], reference: Distributions, other: Distributions
    ) -> "Divergence":
        """That of several parts of the tokens, one part after the other; see `Distributions.joined`."""
        made = cls(reference, other)
        for name in ("_weighted", "_wrong", "_power"):
            setattr(made, name, np.concatenate([getattr(part, name) for part in parts]))
        return made

    @property
    def kl(self) -> Wide:
        """KL(reference || other) of every token in nats, `[N]`."""
        normalizers = self._reference.log_normalizers
        mean_apart = self._weighted / np.exp(normalizers - self._reference.top)
        # Rounding must not make a distribution less than identical.
        return np.maximum(mean_apart - normalizers + self._other.log_normalizers, 0.0)

    @property
    def squares(self) -> tuple[Wide, Wide]:
        """Squared error of the logits, and the square of the reference's, `[N]` each."""
        return self._wrong, self._power

    @property
    def same_best(self) -> NDArray[np.bool_]:
        """Whether both find the same token most likely, `[N]`."""
        return self._reference.best[:, 0] == self._other.best[:, 0]

    @property
    def shared_best(self) -> Wide:
        """The part of the reference's five most likely tokens that are among the other's five, `[N]`."""
        expected, found = self._reference.best, self._other.best
        real = expected >= 0
        shared = (expected[:, :, None] == found[:, None, :]).any(axis=2) & real
        return shared.sum(axis=1) / real.sum(axis=1)
