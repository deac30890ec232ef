"""GPTQ: weights rounded column by column, and each column's error made up for by those still to come.

The method is Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (2022), as golden-stick 1.4.1 has it (`ptq/quant_cells/mindone/linear_gptq_quant_wrappers.py`).
Two changes keep it from fitting the calibration text so closely that another text loses by it:

- The Hessian's off-diagonal part, which says how columns make up for one another, is shrunk; its diagonal,
  which says how loud each column is, is not.
- The scale of a row or group is the one with the least error weighted with that diagonal, not the one that
  just takes the greatest weight.
"""

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

SCALE_RATIOS = tuple(ratio / 100 for ratio in range(100, 44, -4))
"""Of the greatest magnitude, what the largest integer may stand for; the first one wins a tie."""


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


class InputMoments:
    """What rounding needs of inputs, found at the first use, once for all linears that read them.

    Args:
        inputs: batches `[T, K]`.
        shrinkage: as for `shrunk`.
        damping: likewise.
    """

    def __init__(self, inputs: Sequence[Floats], shrinkage: float, damping: float) -> None:
        self._inputs, self._shrinkage, self._damping = inputs, shrinkage, damping

    @cached_property
    def _found(self) -> tuple[Floats, Floats]:
        """How loud each column is, `[K]`, and the factor of the Hessian's inverse, `[K, K]`."""
        gram = gram_matrix(self._inputs)
        loudness = gram.diagonal().copy()
        loudness[loudness == 0] = loudness.mean() or 1.0
        return loudness, inverse_factor(shrunk(gram, self._shrinkage, self._damping))

    def rounded(
        self, weight: Floats, scale_dtype: str, quant: Quant, ratios: Sequence[float] = (1.0,)
    ) -> RoundedWeight:
        """Round a weight to integers so that the outputs of its linear change least.

        Args:
            weight: `[N, K]`.
            scale_dtype: as for `quantize_weight`, whose integers and scales these are.
            quant: the integers.
            ratios: of the greatest magnitude, the scales to choose from; `(1.0,)` is round to nearest's.

        Raises:
            CalibrationError: the inputs are not finite, or say too little.
        """
        rows, columns = weight.shape
        loudness, factor = self._found
        size = quant.group_size or columns
        step = _block_columns(size, quant.group_size is None)
        rounded = np.empty((rows, columns), np.int8)
        scales = np.empty((rows, columns // size), np.float32)
        offsets = None if quant.symmetric else np.empty(scales.shape, np.int32)

        def work(part: slice) -> None:
            # A row for each column of the weight: what is changed together lies together.
            left = np.ascontiguousarray(weight[part].T)
            for start in range(0, columns, step):
                check_interrupt()
                stop = min(start + step, columns)
                errors = np.empty((stop - start, left.shape[1]), np.float32)
                for column in range(start, stop):
                    if column % size == 0:
                        group = np.ascontiguousarray(left[column : column + size].T)
                        loud = loudness[column : column + size]
                        scale, zero = best_parameters(group, loud, scale_dtype, quant, ratios)
                        scales[part, column // size] = scale
                        if offsets is not None:
                            offsets[part, column // size] = zero
                    values = np.rint(left[column] / scale + zero)
                    np.clip(values, quant.low, quant.high, out=values)
                    rounded[part, column] = values
                    error = (left[column] - (values - zero) * scale) / factor[column, column]
                    errors[column - start] = error
                    left[column + 1 : stop] -= factor[column, column + 1 : stop, None] * error
                left[stop:] -= factor[start:stop, stop:].T @ errors

        for_parts(rows, work)
        shape = (rows,) if quant.group_size is None else scales.shape
        return RoundedWeight(
            rounded, scales.reshape(shape), None if offsets is None else offsets.reshape(shape)
        )


def best_parameters(
    groups: Floats, loudness: Floats, scale_dtype: str, quant: Quant, ratios: Sequence[float]
) -> tuple[Floats, Floats | np.float32]:
    """The scale and the zero point of each row with the least squared error, weighted column by column.

    Args:
        groups: `[G, size]`.
        loudness: second moments of the columns' inputs, `[size]`.
        scale_dtype: as for `quantize_weight`.
        quant: the integers.
        ratios: what part of a row's range the integers may take; the first one wins a tie.

    Returns:
        float32 `[G]` both; zero points are 0 for symmetric integers.
    """
    least = np.full(len(groups), np.inf, np.float32)
    best_scale, best_zero = np.empty_like(least), np.zeros_like(least)
    # All that parameters are made of; a ratio of them is that of the whole row.
    extremes = np.stack([groups.min(axis=1), groups.max(axis=1)], axis=1)
    for ratio in ratios:
        scale, offset = group_parameters(extremes * np.float32(ratio), scale_dtype, quant)
        zero = np.float32(0) if offset is None else offset
        values = np.clip(np.rint(groups / scale + zero), quant.low, quant.high)
        error = np.square((values - zero) * scale - groups) @ loudness
        better = error < least
        least[better], best_scale[better] = error[better], scale[better, 0]
        if offset is not None:
            best_zero[better] = offset[better, 0]
    return best_scale, best_zero


def _block_columns(size: int, alone: bool) -> int:
    """How many columns hand their errors on at once; a group begins where a block does, or within one."""
    if alone:
        return BLOCK_COLUMNS
    if size <= BLOCK_COLUMNS:
        return size * (BLOCK_COLUMNS // size)
    return max(step for step in range(1, BLOCK_COLUMNS + 1) if size % step == 0)
