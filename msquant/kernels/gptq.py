"""GPTQ: weights rounded column by column, and each column's error made up for by those still to come.

The method is Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (2022), as golden-stick 1.4.1 has it (`ptq/quant_cells/mindone/linear_gptq_quant_wrappers.py`)
with its `desc_act` and `static_groups`. Two changes keep it from fitting the calibration text so closely
that another text loses by it:

- The Hessian's off-diagonal part, which says how columns make up for one another, is shrunk; its diagonal,
  which says how loud each column is, is not.
- The scale of a row or group is the one with the least error weighted with that diagonal, not the one that
  just takes the greatest weight.
"""

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from msquant.errors import CalibrationError
from msquant.interrupts import check_interrupt
from msquant.kernels.weight_rounding import RoundedWeight, for_parts, group_parameters
from msquant.schemes import Quant

Floats = NDArray[np.float32]

BLOCK_COLUMNS = 64
"""Columns whose errors are handed to all later ones at once."""

SCALE_RATIOS = tuple(ratio / 100 for ratio in range(100, 50, -6))
"""Of the greatest magnitude, what the largest integer may stand for; the first one wins a tie."""

# Tokens are few if so many times their number is less than the columns: what takes less time then.
_FEW = 2

# Of the values whose scales are searched at once: they and what becomes of them stay in a core's cache.
_SEARCH_BYTES = 1 << 19


def gram_matrix(inputs: Sequence[Floats]) -> Floats:
    """The second moments of a linear's inputs: batches `[T, K]` to `X^T X / T`, `[K, K]`."""
    total = sum(len(batch) for batch in inputs)
    columns = inputs[0].shape[1]
    gram = np.zeros((columns, columns), np.float32)
    for batch in inputs:
        gram += batch.T @ batch
    gram /= np.float32(max(1, total))
    return gram


def shrunk(gram: Floats, shrinkage: float, damping: float) -> Floats:
    """What is inverted: `(1 - shrinkage) H + shrinkage diag(H)`, with `damping` on its diagonal.

    A column that no token has used counts as one that is alone: 1 on the diagonal, nothing beside it.

    Args:
        gram: H, `[K, K]`, from `gram_matrix`.
        shrinkage: in [0, 1]; 0 is GPTQ's own, 1 rounds every column for itself.
        damping: in units of the mean of the diagonal; golden-stick's `damp_percent`.

    Raises:
        CalibrationError: it holds NaN or infinity.
    """
    diagonal = gram.diagonal().copy()
    if not np.isfinite(diagonal).all():
        raise CalibrationError(
            "the inputs of a linear are NaN or too large for their squares to be summed",
            remedy="check the checkpoint for infinite or huge weights",
        )
    hessian = gram * np.float32(1 - shrinkage)
    mean = float(diagonal.mean()) or 1.0
    dead = diagonal == 0
    diagonal[dead] = mean
    np.fill_diagonal(hessian, diagonal + np.float32(damping * mean))
    return hessian


def inverse_factor(hessian: Floats) -> Floats:
    """The upper triangular U with `U^T U = H^-1`, in float32, `[K, K]`.

    H is factored from its last column on, `H = R R^T` with R upper triangular, and U is the inverse of R: one
    factorization and one triangular inverse, where golden-stick's `cholesky_compute` takes two of each.

    Raises:
        CalibrationError: the matrix is not positive definite.
    """
    from scipy.linalg import LinAlgError, cholesky
    from scipy.linalg.lapack import strtri

    reversed_order = np.ascontiguousarray(hessian[::-1, ::-1])
    try:
        factor = cholesky(reversed_order, lower=True, overwrite_a=True, check_finite=False)
    except LinAlgError as error:
        raise CalibrationError(
            "the inputs of a linear say too little about it: their second moments are not positive definite",
            remedy="give more --samples, or a greater damping in the recipe's quantization section",
        ) from error
    upper, failed = strtri(factor[::-1, ::-1], lower=0)
    assert not failed
    return np.ascontiguousarray(np.triu(upper))


class _ManyTokens:
    """How the errors of columns are made up for, from the Hessian as a matrix: the method as it is published.

    Args:
        hessian: `[K, K]`, in the order of rounding.
    """

    def __init__(self, hessian: Floats) -> None:
        factor = inverse_factor(hessian)
        self._shares = factor / factor.diagonal()[:, None]

    def within(self, columns: slice) -> Floats:
        """What is taken from a column of a block for the error of one before it, `[B, B]`, row by row."""
        return self._shares[columns, columns]

    def before(self, left: Floats, columns: slice, outputs: Floats) -> Floats:
        """Make up for all earlier blocks in this one; returns what its columns' errors are counted from."""
        return left[columns]

    def after(self, left: Floats, columns: slice, errors: Floats, outputs: Floats) -> None:
        """Hand the errors of a block, `[B, N]`, on."""
        left[columns.stop :] -= self._shares[columns, columns.stop :].T @ errors

    def outputs(self, rows: int) -> Floats:
        """What is kept of a weight's errors from block to block, for so many rows."""
        return np.empty((0, rows), np.float32)


class _FewTokens(_ManyTokens):
    """The same from the inputs themselves, where they are fewer than columns: no `[K, K]` matrix is made.

    Of a Hessian `D + X^T X` with D diagonal, columns c and later make up best for errors e of those before by
    `-D_c^-1 X_c^T (I + X_c D_c^-1 X_c^T)^-1 r`, where `r = X e` is their error in the outputs of the T tokens
    (the push-through identity). Column c gets `-g_c r` of it; all g are found from the last block to the
    first, in `4 T^2 K` operations.

    Args:
        x: `[T, K]`, in the order of rounding.
        diagonal: D, above 0, `[K]`.
    """

    def __init__(self, x: Floats, diagonal: Floats) -> None:
        self._x = x
        tokens, columns = x.shape
        self._gains = np.empty((columns, tokens), np.float32)
        inverse = np.eye(tokens, dtype=np.float32)
        for start in reversed(range(0, columns, BLOCK_COLUMNS)):
            check_interrupt()
            block = slice(start, start + BLOCK_COLUMNS)
            seen = inverse @ x[:, block]
            factor = inverse_factor(x[:, block].T @ seen + np.diag(diagonal[block]))
            self._gains[block] = (factor * factor.diagonal()[:, None]) @ seen.T
            known = seen @ factor.T
            inverse -= known @ known.T

    def within(self, columns: slice) -> Floats:
        """See `_ManyTokens`."""
        return -(self._gains[columns] @ self._x[:, columns]).T

    def before(self, left: Floats, columns: slice, outputs: Floats) -> Floats:
        """See `_ManyTokens`; errors are counted from the weight as it was."""
        origin = left[columns].copy()
        left[columns] += self._gains[columns] @ outputs
        return origin

    def after(self, left: Floats, columns: slice, errors: Floats, outputs: Floats) -> None:
        """See `_ManyTokens`."""
        outputs += self._x[:, columns] @ errors

    def outputs(self, rows: int) -> Floats:
        """See `_ManyTokens`: the sum of errors in the outputs, `[T, N]`."""
        return np.zeros((len(self._x), rows), np.float32)


class InputMoments:
    """What rounding needs of inputs, found at the first use, once for all linears that read them.

    Args:
        inputs: batches `[T, K]`.
        shrinkage: as for `shrunk`.
        damping: likewise.
    """

    def __init__(self, inputs: Sequence[Floats], shrinkage: float = 1.0, damping: float = 0.01) -> None:
        self._inputs, self._shrinkage, self._damping = inputs, shrinkage, damping
        self._tokens = sum(map(len, inputs))

    @cached_property
    def _squares(self) -> Floats:
        """The second moment of each column, `[K]`."""
        total = np.sum([np.einsum("tk,tk->k", batch, batch) for batch in self._inputs], axis=0)
        squares: Floats = (total / np.float32(max(1, self._tokens))).astype(np.float32)
        return squares

    @cached_property
    def _loudness(self) -> Floats:
        """The same; the mean of all where no token has used a column."""
        loudness = self._squares.copy()
        loudness[loudness == 0] = loudness.mean() or 1.0
        return loudness

    @cached_property
    def _order(self) -> NDArray[np.intp]:
        """The columns, the loudest first: golden-stick's `desc_act`."""
        return np.argsort(-self._squares, kind="stable")

    @cached_property
    def _compensation(self) -> _ManyTokens:
        """How errors are made up for, by columns in that order."""
        columns = len(self._squares)
        if _FEW * self._tokens >= columns:
            hessian = shrunk(gram_matrix(self._inputs), self._shrinkage, self._damping)
            return _ManyTokens(hessian[np.ix_(self._order, self._order)])
        diagonal = shrunk(np.diag(self._squares), 1.0, self._damping).diagonal()
        x = np.concatenate([batch[:, self._order] for batch in self._inputs])
        x *= np.float32(math.sqrt((1 - self._shrinkage) / self._tokens))
        return _FewTokens(x, (diagonal - np.float32(1 - self._shrinkage) * self._squares)[self._order])

    def rounded(
        self, weight: Floats, scale_dtype: str, quant: Quant, ratios: Sequence[float] = (1.0,)
    ) -> RoundedWeight:
        """Round a weight to integers so that the outputs of its linear change least.

        The loudest column comes first, whose error all others can make up for. Scales are found before, from
        the weight as it is (golden-stick's `static_groups`), so that groups are of neighbouring columns.

        Args:
            weight: `[N, K]`.
            scale_dtype: as for `quantize_weight`, whose integers and scales these are.
            quant: the integers.
            ratios: of the greatest magnitude, the scales to choose from; `(1.0,)` is round to nearest's.

        Raises:
            CalibrationError: the inputs are not finite, or say too little.
        """
        rows, columns = weight.shape
        order, compensation = self._order, self._compensation
        size = quant.group_size or columns
        rounded = np.empty((rows, columns), np.int8)
        scales = np.empty((rows, columns // size), np.float32)
        offsets = np.zeros(scales.shape, np.float32)

        def work(part: slice) -> None:
            scales[part], offsets[part] = best_parameters(
                weight[part], self._loudness, scale_dtype, quant, ratios
            )
            # A row for each column of the weight: what is changed together lies together.
            scale, zero = (np.ascontiguousarray(each[part].T) for each in (scales, offsets))
            left = weight[part].T[order]
            taken = np.empty(left.shape, np.int8)
            outputs = compensation.outputs(left.shape[1])
            for start in range(0, columns, BLOCK_COLUMNS):
                check_interrupt()
                block = slice(start, min(start + BLOCK_COLUMNS, columns))
                origin = compensation.before(left, block, outputs)
                current, shares = left[block], compensation.within(block)
                errors = np.empty(current.shape, np.float32)
                for place, group in enumerate(order[block] // size):
                    values = np.rint(current[place] / scale[group] + zero[group])
                    np.clip(values, quant.low, quant.high, out=values)
                    taken[start + place] = values
                    errors[place] = origin[place] - (values - zero[group]) * scale[group]
                    current[place + 1 :] -= shares[place, place + 1 :, None] * errors[place]
                compensation.after(left, block, errors, outputs)
            rounded[part, order] = taken.T

        for_parts(rows, work)
        return _as_stored(rounded, scales, offsets, quant)

    def nearest(
        self, weight: Floats, scale_dtype: str, quant: Quant, ratios: Sequence[float] = (1.0,)
    ) -> RoundedWeight:
        """As `rounded`, with every column rounded for itself: the inputs choose nothing but scales."""
        return nearest_by_loudness(weight, self._loudness, scale_dtype, quant, ratios)


def nearest_by_loudness(
    weight: Floats, loudness: Floats, scale_dtype: str, quant: Quant, ratios: Sequence[float]
) -> RoundedWeight:
    """Round a weight to nearest with the scales of `best_parameters`, whose arguments these are."""
    groups = weight.reshape(len(weight), -1, quant.group_size or weight.shape[1])
    scales = np.empty(groups.shape[:2], np.float32)
    offsets = np.zeros(groups.shape[:2], np.float32)
    rounded = np.empty(groups.shape, np.int8)

    def work(part: slice) -> None:
        check_interrupt()
        scales[part], offsets[part] = best_parameters(weight[part], loudness, scale_dtype, quant, ratios)
        values = np.rint(groups[part] / scales[part, :, None] + offsets[part, :, None])
        rounded[part] = np.clip(values, quant.low, quant.high, out=values)

    for_parts(len(weight), work)
    return _as_stored(rounded.reshape(weight.shape), scales, offsets, quant)


def best_parameters(
    weight: Floats, loudness: Floats, scale_dtype: str, quant: Quant, ratios: Sequence[float]
) -> tuple[Floats, Floats]:
    """The scales and zero points of a weight with the least squared error, weighted column by column.

    Args:
        weight: `[N, K]`.
        loudness: second moments of the columns' inputs, `[K]`.
        scale_dtype: as for `quantize_weight`.
        quant: the integers.
        ratios: what part of a range the integers may take; the first one wins a tie.

    Returns:
        float32 `[N, K / group_size]` both; zero points are 0 for symmetric integers.
    """
    rows, columns = weight.shape
    size = quant.group_size or columns
    scales = np.empty((rows, columns // size), np.float32)
    zeros = np.zeros_like(scales)
    loud = loudness.reshape(-1, size, 1)
    step = max(1, _SEARCH_BYTES // (4 * columns))
    for start in range(0, rows, step):
        groups = weight[start : start + step].reshape(-1, columns // size, size)
        # All that parameters are made of; a ratio of them is that of the whole group.
        extremes = np.stack([groups.min(axis=2), groups.max(axis=2)], axis=2).reshape(-1, 2)
        least = np.full(groups.shape[:2], np.inf, np.float32)
        values = np.empty_like(groups)
        for number, ratio in enumerate(ratios):
            found, offset = group_parameters(extremes * np.float32(ratio), scale_dtype, quant)
            scale = found.reshape(*least.shape, 1)
            np.divide(groups, scale, out=values)
            if offset is not None:
                zero = offset.reshape(scale.shape)
                values += zero
            np.rint(values, out=values)
            np.clip(values, quant.low, quant.high, out=values)
            if offset is not None:
                values -= zero
            values *= scale
            values -= groups
            np.square(values, out=values)
            # [G, n, size] by [G, size, 1].
            error = np.matmul(values.transpose(1, 0, 2), loud)[..., 0].T
            # The first is taken even where squares overflow.
            better = error < least if number else np.ones_like(least, bool)
            least[better] = error[better]
            scales[start : start + step][better] = scale[better, 0]
            if offset is not None:
                zeros[start : start + step][better] = zero[better, 0]
    return scales, zeros


def _as_stored(rounded: NDArray[np.int8], scales: Floats, offsets: Floats, quant: Quant) -> RoundedWeight:
    """What `quantize_weight` returns of the same integers."""
    shape = (len(rounded),) if quant.group_size is None else scales.shape
    zeros = None if quant.symmetric else offsets.astype(np.int32).reshape(shape)
    return RoundedWeight(rounded, scales.reshape(shape), zeros)
