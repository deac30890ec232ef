"""The search of `osl`: smooth scales that hold on text which calibration has not seen.

A channel that calibration text leaves quiet may be loud in another domain: on SmolLM2-135M the ranges of the
inputs of `down_proj` on two kinds of text are almost uncorrelated, and what leaves its range saturates. Two
changes to OutlierSuppressionLite follow:

- A channel's range is never taken for less than a floor: a quantile, over all channels, of the measured
  range in units of what is typical for the channel by the weights in front of it, times what is typical.
- Alpha and the floor are chosen on tokens held out from the range statistics: each half of the samples is
  quantized with the ranges of the other half; per token, where nothing can saturate, each quarter with those
  of the rest.

The loss is the group's own output error of every token relative to what the token's output is read
by: the residual stream, which the next norm divides by its size, where the group writes to it, otherwise the
linear's output. A token with massive activations counts as one token.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from mindspore import Tensor
from mindspore_gs.common import logger
from mindspore_gs.ptq.ptq_config import QuantGranularity
from mindspore_gs.ptq.quant_cells.quant_cell import QuantCell
from numpy.typing import NDArray

from msquant.algorithms.smoothers import Batch, FastOSLSmoother, GroupCells, nothing_finite
from msquant.checkpoint.weights import INT8_MAX, INT8_MIN, token_scales
from msquant.interrupts import check_interrupt
from msquant.kernels.fake_quant import activation_parameters, shifted_parameters
from msquant.kernels.integer_product import product_by_inputs
from msquant.kernels.layer_report import GroupReport
from msquant.kernels.smoothing import smooth_scale
from msquant.kernels.weight_rounding import INT8, for_blocks, quantize_smoothed, smoothed_and_rounded
from msquant.models.layers import DecoderLayer
from msquant.schemes import Quant, parse_scheme

Floats = NDArray[np.float32]

SEARCH_TOKENS = 1024
"""Tokens that candidates are compared on, spread evenly over the samples."""

STATIC_PARTS, PER_TOKEN_PARTS = 2, 4
"""Parts of the samples, each of which is quantized with the ranges of the others."""

# Where the search starts: best on most of the groups of SmolLM2-135M.
FIRST_ALPHA = 0.85

FEW_TOKENS = 256
"""So many of the tokens are computed for every candidate, the others for those that are still in the race."""

# By how many times the best loss of few tokens a candidate may miss it and stay in the race. On SmolLM2-135M
# 1.3 changes no choice of 120 groups, 1.2 one and 1.1 five; half of the products are saved.
RACE = 1.3


@dataclass(frozen=True)
class Choice:
    """What the search chose, and its loss: the mean over tokens of the relative squared error."""

    alpha: float
    range_floor: float
    loss: float


@dataclass(eq=False)
class GroupInputs:
    """What feeds the linears of one smooth group, and what reads them.

    Attributes:
        low: least value of every channel in each sample, `[S, K]`.
        high: greatest value, `[S, K]`.
        x: some tokens of all samples, `[R, K]`.
        sample: which sample each of them is of, `[R]`.
        residual: the residual stream that the linear is added to, `[R, N]`; None where it is not.
        typical: a channel's typical magnitude by the weights in front, up to a common factor, `[K]`.
        query_groups: key-value heads and query heads of each, where the scale is shared by the query heads.
    """

    low: Floats
    high: Floats
    x: Floats
    sample: NDArray[np.intp]
    residual: Floats | None
    typical: Floats
    query_groups: tuple[int, int] | None = None

    def shared(self, maxima: Floats) -> Floats:
        """The greatest of the query heads of one key-value head, for each of them: `[K]` to `[K]`."""
        if self.query_groups is None:
            return maxima
        heads = maxima.reshape(*self.query_groups, -1)
        return np.broadcast_to(heads.max(axis=1, keepdims=True), heads.shape).reshape(-1)


class HeldOutSearch:
    """The candidates of one group, compared on held-out tokens.

    Products are those of integers, as an engine computes them: exact, whatever the processor, and each block
    of a weight's rows on a core of its own.

    Args:
        inputs: of the group.
        weights: of its linears, float32 `[N, K]` each.
        per_token: activations get a scale per token, not a static one.
        shifted: static ones have a zero point a column.
        quant: the integers of the weights.
        check: called before every candidate; may raise to interrupt the search.
    """

    def __init__(
        self,
        inputs: GroupInputs,
        weights: Sequence[Floats],
        *,
        per_token: bool = False,
        shifted: bool = False,
        quant: Quant = INT8,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._inputs, self._weights, self._per_token, self._check = inputs, weights, per_token, check
        self._quant, self._shifted = quant, shifted
        columns = np.maximum.reduce([np.abs(weight).max(axis=0) for weight in weights])
        self._columns = inputs.shared(columns)
        self._folds = [
            _Fold.of(inputs, weights, measured, rows)
            for measured, rows in _folds(inputs, PER_TOKEN_PARTS if per_token else STATIC_PARTS)
        ]
        self._few: dict[tuple[float, float], float] = {}
        self._all: dict[tuple[float, float], float] = {}

    @np.errstate(over="ignore", invalid="ignore")
    def best(self, alphas: Sequence[float], floors: Sequence[float]) -> Choice:
        """The best floor at `FIRST_ALPHA`, the best alpha at that floor, and the best floor at that alpha.

        Args:
            alphas: migration strengths; the first one wins a tie.
            floors: quantiles in [0, 1); 0 is no floor.

        Returns:
            The choice; its loss is not finite where no candidate's is.
        """
        alpha = min(alphas, key=lambda value: abs(value - FIRST_ALPHA))
        _, floor = self._least([(alpha, value) for value in floors])
        alpha, _ = self._least([(value, floor) for value in alphas])
        _, floor = self._least([(alpha, value) for value in floors])
        return Choice(alpha, floor, self.loss(alpha, floor))

    def loss(self, alpha: float, floor: float) -> float:
        """Mean over tokens and linears of the relative squared error, with the ranges of the other parts.

        Infinity where it is not finite.
        """
        candidate = (alpha, floor)
        if candidate not in self._all:
            total = self._few_loss(candidate) + self._sum(candidate, [fold.others for fold in self._folds])
            self._all[candidate] = total / (len(self._inputs.x) * len(self._weights))
        return self._all[candidate]

    def scale(self, choice: Choice) -> Floats:
        """The smooth scale of a choice by the ranges of all samples, `[K]`."""
        low, high = self._inputs.low.min(axis=0), self._inputs.high.max(axis=0)
        return self._scale(low, high, choice.alpha, choice.range_floor)

    def _least(self, candidates: Sequence[tuple[float, float]]) -> tuple[float, float]:
        """The one of least loss, of those that `FEW_TOKENS` leave in the race."""
        limit = RACE * min(map(self._few_loss, candidates))
        left = [each for each in candidates if self._few_loss(each) <= limit]
        return min(left, key=lambda each: self.loss(*each))

    def _few_loss(self, candidate: tuple[float, float]) -> float:
        if candidate not in self._few:
            self._check()
            self._few[candidate] = self._sum(candidate, [fold.first for fold in self._folds])
        return self._few[candidate]

    def _sum(self, candidate: tuple[float, float], rows: Sequence[slice]) -> float:
        """Over some tokens of each fold; infinity where it is not finite."""
        total = sum(
            self._errors(fold, part, self._scale(fold.low, fold.high, *candidate))
            for fold, part in zip(self._folds, rows, strict=True)
        )
        return total if np.isfinite(total) else np.inf

    def _errors(self, fold: "_Fold", rows: slice, scale: Floats) -> float:
        x, step, offset = self._quantized(fold, rows, scale)
        if not len(x):
            return 0.0
        lowest, highest = INT8_MIN - offset, INT8_MAX - offset
        np.clip(x, lowest, highest, out=x)
        product = None
        # A range that leaves out 0 has a zero point that no int8 is: it is widened when it is chosen.
        in_int8 = (offset >= INT8_MIN).all() and (offset <= INT8_MAX).all()
        if in_int8 and self._quant.group_size is None and self._quant.symmetric:
            product = product_by_inputs(x, lowest, highest)

        def error(weight: Floats, output: Floats, factors: Floats, block: slice) -> float:
            if product is not None:
                rounded = quantize_smoothed(weight[block], scale, self._quant)
                y = product(rounded.weight)
                y *= rounded.scale
            else:
                y = x @ smoothed_and_rounded(weight[block], scale, quant=self._quant).T
            # An error state is a thread's own.
            with np.errstate(over="ignore", invalid="ignore"):
                y *= step
                y -= output[:, block]
            return float(np.einsum("rn,rn->r", y, y) @ factors)

        linears = zip(self._weights, fold.outputs, fold.factors, strict=True)
        return sum(
            sum(for_blocks(weight, partial(error, weight, output[rows], factors[rows])))
            for weight, output, factors in linears
        )

    def _quantized(self, fold: "_Fold", rows: slice, scale: Floats) -> tuple[Floats, Floats, Floats]:
        """Inputs as whole numbers less their zero points, not clipped yet; their scale; the zero points."""
        x = fold.x[rows] / scale
        if self._per_token:
            step, offset = token_scales(x), np.zeros(1, np.float32)
        else:
            step, offset = self._static(fold.low / scale, fold.high / scale)
        x /= step
        # Added before rounding: it decides where ties go.
        x += offset
        np.rint(x, out=x)
        x -= offset
        return x, step, offset

    def _static(self, low: Floats, high: Floats) -> tuple[Floats, Floats]:
        if self._shifted:
            return shifted_parameters(low, high)
        return activation_parameters(low.min(keepdims=True), high.max(keepdims=True))

    def _scale(self, low: Floats, high: Floats, alpha: float, floor: float) -> Floats:
        # With zero points of columns it is half of a range that counts, wherever it lies.
        reach = (high - low) / 2 if self._shifted else np.maximum(np.abs(low), np.abs(high))
        maxima = floored(reach, self._inputs.typical, floor)
        return smooth_scale(self._inputs.shared(maxima), self._columns, alpha)


def floored(maxima: Floats, typical: Floats, floor: float) -> Floats:
    """Ranges of channels, none of them for less than a quantile of all, in units of what is typical.

    Args:
        maxima: greatest magnitudes, `[K]`.
        typical: as `typical_magnitudes` gives it, `[K]`.
        floor: the quantile, in [0, 1); 0 is no floor.
    """
    if not floor:
        return maxima
    unit = np.quantile(maxima / typical, floor).astype(np.float32)
    return np.maximum(maxima, unit * typical)


def typical_magnitudes(*weights: Floats) -> Floats:
    """What is typical for the channels that these weights make, up to a common factor.

    Args:
        weights: a norm's `[K]`, or linears' `[K, H]`: a gated product's magnitude goes with the product of
            its rows' norms.

    Returns:
        float32 `[K]`, above 0.
    """
    magnitudes = [np.abs(w) if w.ndim == 1 else np.linalg.norm(w, axis=1) for w in weights]
    typical = np.prod(magnitudes, axis=0)
    floor: Floats = np.maximum(typical, 1e-6 * typical.max(initial=1e-30)).astype(np.float32)
    return floor


@dataclass(eq=False)
class _Fold:
    """Tokens that are quantized with the ranges of the samples that they are not of.

    Attributes:
        low: least value of every channel in the other samples, `[K]`.
        high: greatest value, `[K]`.
        x: the tokens, `[R, K]`.
        outputs: of each linear, `[R, N]`.
        factors: of each linear, what a token's squared error is multiplied by, `[R]`.
        few: so many of the tokens, the first ones, are computed for every candidate.
    """

    low: Floats
    high: Floats
    x: Floats
    outputs: list[Floats]
    factors: list[Floats]
    few: int

    @classmethod
    def of(
        cls,
        inputs: GroupInputs,
        weights: Sequence[Floats],
        measured: NDArray[np.intp],
        rows: NDArray[np.intp],
    ) -> "_Fold":
        """Of the samples whose ranges are measured, and the rows that are quantized with them."""
        every = max(1, len(inputs.x) // FEW_TOKENS)
        spread = np.arange(len(rows)) % every == 0
        rows = np.concatenate([rows[spread], rows[~spread]])
        x = inputs.x[rows]
        outputs = [x @ weight.T for weight in weights]
        read = [inputs.residual[rows] + y if inputs.residual is not None else y for y in outputs]
        low, high = inputs.low[measured].min(axis=0), inputs.high[measured].max(axis=0)
        return cls(low, high, x, outputs, [inverse_squares(each) for each in read], np.count_nonzero(spread))

    @property
    def first(self) -> slice:
        """The tokens that are computed for every candidate."""
        return slice(self.few)

    @property
    def others(self) -> slice:
        """The rest of them."""
        return slice(self.few, None)


def _folds(inputs: GroupInputs, parts: int) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Samples whose ranges are measured and rows that are quantized with them, once for each part."""
    samples = np.arange(len(inputs.low))
    if len(samples) == 1:
        return [(samples, np.arange(len(inputs.x)))]
    parts = min(parts, len(samples))
    return [
        (samples[samples % parts != part], np.flatnonzero(inputs.sample % parts == part))
        for part in range(parts)
    ]


def inverse_squares(read: Floats) -> Floats:
    """1 over the square of every row, in float64: weights may be huge; 0 for a row of zeros."""
    squares = np.square(read, dtype=np.float64).sum(axis=1)
    inverse: Floats = np.divide(1, squares, out=np.zeros_like(squares), where=squares > 0).astype(np.float32)
    return inverse


RESIDUAL_GROUPS = ("o", "down")
"""Groups whose output is added to the residual stream."""


class HeldOutSmoother(FastOSLSmoother):
    """OutlierSuppressionLite with ranges and alphas that hold on text which calibration has not seen."""

    def _search_best_ratio(
        self, name: str, layer: DecoderLayer, group: GroupCells, search_inputs: Any, *heads: int
    ) -> tuple[Tensor, float]:
        policy = self.get_layer_policy(group.curr_layer[0].layer_name)
        scheme = parse_scheme(policy.algo_args["scheme"])
        search = HeldOutSearch(
            self._inputs(layer, group, self.batches_of(layer, search_inputs), heads),
            [cell.layer.weight.asnumpy() for cell in group.curr_layer],
            per_token=policy.act_quant_granularity is QuantGranularity.PER_TOKEN,
            shifted=scheme.is_shifted,
            quant=scheme.weights or INT8,
            check=check_interrupt,
        )
        choice = search.best(policy.algo_args["smooth_alpha"], policy.algo_args["range_floor"])
        if not math.isfinite(choice.loss):
            raise nothing_finite(group.name, self.report.name)
        logger.info(f"{self.report.name} {group.name}: {choice}")
        scale = Tensor(search.scale(choice))
        chosen = GroupReport(group.name, choice.alpha, choice.loss, choice.range_floor)
        self.report_group(chosen, scale, heads[-1])
        return scale, choice.alpha

    def _inputs(
        self, layer: DecoderLayer, group: GroupCells, batches: Sequence[Batch], heads: tuple[int, ...]
    ) -> GroupInputs:
        query, key_value = heads
        states = [batch.states[group.step] for batch in batches]
        inputs = [
            state[1].asnumpy().reshape(batch.samples, -1, state[1].shape[-1])
            for batch, state in zip(batches, states, strict=True)
        ]
        lengths = [length for samples, length, _ in (x.shape for x in inputs) for _ in range(samples)]
        places = slice(0, None, math.ceil(sum(lengths) / SEARCH_TOKENS))
        residual = None
        if group.name in RESIDUAL_GROUPS:
            residual = np.concatenate([state[0].asnumpy() for state in states])[places]
        return GroupInputs(
            low=np.concatenate([x.min(axis=1) for x in inputs]),
            high=np.concatenate([x.max(axis=1) for x in inputs]),
            x=np.concatenate([x.reshape(-1, x.shape[-1]) for x in inputs])[places],
            sample=np.repeat(np.arange(len(lengths)), lengths)[places],
            residual=residual,
            typical=_typical(layer, group, key_value, query // key_value if self.is_gqa_wo_layer else 1),
            query_groups=(key_value, query // key_value) if self.is_gqa_wo_layer else None,
        )


def _typical(layer: DecoderLayer, group: GroupCells, heads: int, repeat: int) -> NDArray[np.float32]:
    """By the norm's weight or the rows in front; what a key-value head makes is read by several queries."""
    before = [_unwrapped(group.prev_layer).weight.clone().asnumpy()]
    if group.name == "down":
        # Of gate and up in one linear, gate is first and as long as up.
        gate = _unwrapped(layer.feed_forward.inputs[0]).weight.asnumpy()
        before.append(gate[: len(before[0])])
    typical = typical_magnitudes(*before)
    return np.repeat(typical.reshape(heads, 1, -1), repeat, axis=1).reshape(-1) if repeat > 1 else typical


def _unwrapped(cell: Any) -> Any:
    return cell.layer if isinstance(cell, QuantCell) else cell
