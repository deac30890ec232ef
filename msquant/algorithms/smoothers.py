"""OutlierSuppressionLite: the search for each group's migration strength, as golden-stick modules.

The arithmetic is golden-stick's (`ptq/algo_modules/mindone/anti_outliers.py`): for every alpha, quantize one
group only and compare the decoder layer's output with the floating-point one; the least error wins, the
smaller alpha on a tie. `FastOSLSmoother` computes the same with samples in batches, with everything before
the group computed once, and without finishing candidates that have already lost.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mindspore import Tensor, ops
from mindspore_gs.ptq.algo_modules.mindone import OSLSmoother, SmoothQuantSmoother
from mindspore_gs.ptq.quant_cells.mindone import OSLSmoothQuantLinearCell
from numpy.typing import NDArray

from msquant.errors import CalibrationError
from msquant.interrupts import check_interrupt
from msquant.kernels.fake_quant import activation_parameters, fake_quantize
from msquant.kernels.layer_report import GroupReport, LayerReport
from msquant.kernels.ranges import GroupReporter
from msquant.kernels.weight_rounding import column_maxima, smoothed_and_rounded
from msquant.models.layers import DecoderLayer


@dataclass(eq=False)
class GroupCells:
    """A smooth group resolved to the cells of one decoder layer, in the form golden-stick asks for.

    Attributes:
        name: the group's name in its family.
        step: the decoder layer's step that holds its linears.
        prev_layer: the cell that the inverse of the smooth scale is folded into.
        curr_layer: the linears that share the scale.
        followers: cells with a matrix in floating point that reads the same.
        shared: whether all heads share what `prev_layer` multiplies by, and so the scale.
        smooth_scale: set by golden-stick.
    """

    name: str
    step: int
    prev_layer: Any
    curr_layer: list[Any]
    followers: Sequence[Any] = ()
    shared: bool = False
    smooth_scale: Any = None


class SearchLinearCell(OSLSmoothQuantLinearCell):  # type: ignore[misc]  # golden-stick has no types
    """A linear whose weight can be replaced by a candidate for the time of a forward pass."""

    candidate: Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Twice as fast as golden-stick's Dense on a CPU.
        self.matmul = ops.MatMul(transpose_b=True)

    def construct(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`[T, K]` to `[T, N]`."""
        if self.candidate is None:
            return self.layer(x)
        y = self.matmul(x, self.candidate)
        return y + self.layer.bias if self.layer.has_bias else y


class HostSmoother:
    """What of golden-stick's smoothers is done on the host; comes before one of them in a class's bases."""

    is_gqa_wo_layer: bool

    def _get_weight_stats(self, layer_info: GroupCells, heads: int, key_value_heads: int) -> Tensor:
        """The greatest magnitude of each column of a group, over the query heads of one key-value head."""
        # golden-stick knows by the name of the linear alone that heads share a scale.
        self.is_gqa_wo_layer = self.is_gqa_wo_layer or layer_info.shared
        columns = [column_maxima(cell.layer.weight.asnumpy()) for cell in layer_info.curr_layer]
        highest = np.maximum.reduce(columns)
        if self.is_gqa_wo_layer:
            highest = highest.reshape(key_value_heads, heads // key_value_heads, -1).max(axis=1).reshape(-1)
        return Tensor(highest)

    def _apply_smooth_scale(self, layer_info: GroupCells, smooth_scale: Tensor, *heads: int) -> None:
        self.is_gqa_wo_layer = self.is_gqa_wo_layer or layer_info.shared
        super()._apply_smooth_scale(layer_info, smooth_scale, *heads)  # type: ignore[misc]
        for cell in layer_info.followers:
            _scale_columns(cell, smooth_scale)

    def _apply_smooth_scale_to_curr_layer(self, layer: Any, smooth_scale: Tensor) -> None:
        _scale_columns(layer.layer, smooth_scale)


def _scale_columns(cell: Any, smooth_scale: Tensor) -> None:
    # On the host: an operator's output stays MindSpore's own when the weight is long gone.
    cell.weight.set_data(Tensor.from_numpy(cell.weight.asnumpy() * smooth_scale.asnumpy()))


class FastOSLSmoother(GroupReporter, HostSmoother, OSLSmoother):  # type: ignore[misc]
    """The same search, in a fraction of the time; its items are batches of samples of equal length."""

    def __init__(self, net_config: Any, layer_policies: Any, *, report: LayerReport) -> None:
        super().__init__(net_config, layer_policies)
        self.report = report
        self._batches: list[Batch] = []

    def get_wrapper_layer(self, layer_type: Any, config: Any) -> type | None:
        """Wrap what golden-stick would wrap, in our cell."""
        return SearchLinearCell if super().get_wrapper_layer(layer_type, config) else None

    def batches_of(self, layer: DecoderLayer, search_inputs: Any) -> list["Batch"]:
        """What the decoder layer makes of its inputs in floating point, computed once for all groups."""
        if not self._batches:
            self._batches = [Batch(layer, *args) for args in search_inputs.layer_args]
        return self._batches

    def _search_best_ratio(
        self, name: str, layer: DecoderLayer, group: GroupCells, search_inputs: Any, *heads: int
    ) -> tuple[Tensor, float]:
        alphas = self.get_layer_policy(name).algo_args["smooth_alpha"]
        scales = {
            alpha: self._calculate_smooth_scale(self.act_stats, self.weight_stats, alpha, *heads)
            for alpha in alphas
        }
        batches = self.batches_of(layer, search_inputs)
        loss = _GroupLoss(layer, group, batches, scales)
        alpha, least = least_loss(alphas, len(batches), loss)
        if not math.isfinite(least):
            raise nothing_finite(group.name, self.report.name)
        self.report_group(GroupReport(group.name, alpha, least), scales[alpha], heads[-1])
        return scales[alpha], alpha


class OneAlphaSmoother(GroupReporter, HostSmoother, SmoothQuantSmoother):  # type: ignore[misc]
    """golden-stick's own, whose alpha is 0.5, with the recipe's alpha, and groups that are reported."""

    def __init__(self, net_config: Any, layer_policies: Any, *, report: LayerReport) -> None:
        super().__init__(net_config, layer_policies)
        self.report = report

    def _compute_smooth_scale(self, **kwargs: Any) -> Tensor:
        group = kwargs["layer_info"]
        alpha = self.get_layer_policy(group.curr_layer[0].layer_name).algo_args["smoothquant_alpha"]
        heads = kwargs["num_attention_heads"], kwargs["num_key_value_heads"]
        scale = self._calculate_smooth_scale(self.act_stats, self.weight_stats, alpha, *heads)
        self.report_group(GroupReport(group.name, alpha), scale, heads[1])
        return scale


def nothing_finite(group: str, layer: str) -> CalibrationError:
    """The error for a group whose every candidate overflows."""
    return CalibrationError(
        f"no alpha gives a finite error for group {group!r}",
        where=layer,
        remedy="check the checkpoint for infinite or huge weights",
    )


class Batch:
    """Samples with all that the decoder layer's steps make of them in floating point."""

    def __init__(self, layer: DecoderLayer, hidden: Tensor, places: Any) -> None:
        self.samples, length, size = hidden.shape
        self.places = places
        state: tuple[Tensor, ...] = (hidden.reshape(self.samples * length, size),)
        self.states = [state]
        for step in range(layer.steps):
            state = layer.run(state, self.samples, places, start=step, stop=step + 1)
            self.states.append(state)
        self.output = state[0].asnumpy()


class _GroupLoss:
    """The loss of one group's candidates, in parts: one a batch, which add up to the mean over samples."""

    def __init__(
        self, layer: DecoderLayer, group: GroupCells, batches: list[Batch], scales: dict[float, Tensor]
    ) -> None:
        self._layer, self._group, self._batches = layer, group, batches
        self._scales = {alpha: scale.asnumpy() for alpha, scale in scales.items()}
        self._total = sum(batch.output.size for batch in batches)
        self._inputs = [_GroupInput(batch, group.step) for batch in batches]
        self._candidate: tuple[float, list[Tensor]] | None = None

    def __call__(self, alpha: float, index: int) -> float:
        check_interrupt()
        batch = self._batches[index]
        before, _, *others = batch.states[self._group.step]
        state = (before, self._inputs[index].quantized(self._scales[alpha]), *others)
        for cell, weight in zip(self._group.curr_layer, self._weights(alpha), strict=True):
            cell.candidate = weight
        try:
            output = self._layer.run(state, batch.samples, batch.places, start=self._group.step)[0]
        finally:
            for cell in self._group.curr_layer:
                cell.candidate = None
        difference = output.asnumpy() - batch.output
        return float(np.vdot(difference, difference)) / float(self._total)

    def _weights(self, alpha: float) -> list[Tensor]:
        """The group's weights, smoothed, quantized and dequantized; kept until another alpha is asked for."""
        if self._candidate is None or self._candidate[0] != alpha:
            # Let go of the one before first: together they would be the greatest use of memory.
            self._candidate = None
            weights = [
                smoothed_and_rounded(cell.layer.weight.asnumpy(), self._scales[alpha])
                for cell in self._group.curr_layer
            ]
            self._candidate = alpha, [Tensor.from_numpy(weight) for weight in weights]
        return self._candidate[1]


class _GroupInput:
    """What feeds a group's linears in one batch."""

    def __init__(self, batch: Batch, step: int) -> None:
        self._samples = batch.samples
        self._x = batch.states[step][1].asnumpy()
        by_sample = self._x.reshape(self._samples, -1, self._x.shape[1])
        # Dividing by a positive scale keeps the order, so these give every candidate's range.
        self._column_low, self._column_high = by_sample.min(axis=1), by_sample.max(axis=1)

    def quantized(self, smooth_scale: NDArray[np.float32]) -> Tensor:
        """`[B*T, K]`: smoothed, quantized per sample on the fly, and dequantized."""
        low = (self._column_low / smooth_scale).min(axis=1)
        high = (self._column_high / smooth_scale).max(axis=1)
        scale, offset = activation_parameters(low, high)
        by_sample = (self._x / smooth_scale).reshape(self._samples, -1)
        return Tensor(fake_quantize(by_sample, scale[:, None], offset[:, None]).reshape(self._x.shape))


def least_loss(
    candidates: Sequence[float], parts: int, loss: Callable[[float, int], float]
) -> tuple[float, float]:
    """Find the candidate with the least loss summed over all parts; the first one on a tie.

    Losses are never negative, so a candidate is given up as soon as its partial sum exceeds the best complete
    one. The result is that of an exhaustive search.

    Args:
        candidates: in ascending order.
        parts: how many the loss is the sum of.
        loss: of one candidate in one part.

    Returns:
        The candidate and its loss.
    """
    partial = {candidate: loss(candidate, 0) for candidate in candidates}
    best, least = candidates[0], math.inf
    for candidate in sorted(candidates, key=lambda c: (partial[c], c)):
        total = partial[candidate]
        for part in range(1, parts):
            if not total <= least:
                break
            total += loss(candidate, part)
        if total < least or (total == least and candidate < best):
            best, least = candidate, total
    return best, least
