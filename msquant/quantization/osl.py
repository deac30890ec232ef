"""OutlierSuppressionLite: the search for each group's migration strength, as golden-stick modules.

The arithmetic is golden-stick's (`ptq/algo_modules/mindone/anti_outliers.py`): for every alpha, quantize one
group only and compare the decoder layer's output with the floating-point one; the least error wins, the
smaller alpha on a tie. `FastOSLSmoother` computes the same with samples in batches, with everything before the group
computed once, and without finishing candidates that have already lost.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mindspore import Tensor
from mindspore_gs.ptq.algo_modules.mindone import OSLSmoother
from mindspore_gs.ptq.quant_cells.mindone import OSLSmoothQuantLinearCell
from numpy.typing import NDArray

from msquant.errors import CalibrationError
from msquant.models.layers import DecoderLayer
from msquant.quantization.fake_quant import activation_parameters, fake_quantize, weight_scale
from msquant.quantization.report import GroupReport, LayerReport


@dataclass(eq=False)
class GroupCells:
    """A smooth group resolved to the cells of one decoder layer, in the form golden-stick asks for.

    Attributes:
        name: the group's name in its family.
        step: the decoder layer's step that holds its linears.
        prev_layer: the cell that the inverse of the smooth scale is folded into.
        curr_layer: the linears that share the scale.
        smooth_scale: set by golden-stick.
    """

    name: str
    step: int
    prev_layer: Any
    curr_layer: list[Any]
    smooth_scale: Any = None


class ReferenceOSLSmoother(OSLSmoother):
    """golden-stick's own search, which also reports what it chose."""

    def __init__(self, net_config: Any, layer_policies: Any, *, report: LayerReport) -> None:
        super().__init__(net_config, layer_policies)
        self.report = report
        self._losses: list[float] = []

    def _search_best_ratio(
        self, name: str, layer: Any, group: GroupCells, *args: Any
    ) -> tuple[Tensor, float]:
        self._losses = []
        scale, alpha = super()._search_best_ratio(name, layer, group, *args)
        self.report.groups.append(GroupReport(group.name, alpha, min(self._losses)))
        return scale, alpha

    def _loss(self, preds: Any, grounds: Any) -> float:
        loss = super()._loss(preds, grounds)
        self._losses.append(loss)
        return loss


class SearchLinearCell(OSLSmoothQuantLinearCell):
    """A linear whose weight can be replaced by a candidate for the time of a forward pass."""

    candidate: Tensor | None = None

    def construct(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`[T, K]` to `[T, N]`."""
        if self.candidate is None:
            return self.layer(x)
        return self.dense(x, self.candidate, self.layer.bias if self.layer.has_bias else None)


class FastOSLSmoother(OSLSmoother):
    """The same search, in a fraction of the time; its items are batches of samples of equal length."""

    def __init__(self, net_config: Any, layer_policies: Any, *, report: LayerReport) -> None:
        super().__init__(net_config, layer_policies)
        self.report = report

    def get_wrapper_layer(self, layer_type: Any, config: Any) -> type | None:
        """Wrap what golden-stick would wrap, in our cell."""
        return SearchLinearCell if super().get_wrapper_layer(layer_type, config) else None

    def _search_best_ratio(
        self, name: str, layer: DecoderLayer, group: GroupCells, search_inputs: Any, *heads: int
    ) -> tuple[Tensor, float]:
        alphas = self.get_layer_policy(name).algo_args["smooth_alpha"]
        scales = {
            alpha: self._calculate_smooth_scale(self.act_stats, self.weight_stats, alpha, *heads)
            for alpha in alphas
        }
        chunks = [_Chunk(layer, group.step, *args) for args in search_inputs.layer_args]
        alpha, loss = least_loss(alphas, len(chunks), _GroupLoss(layer, group, chunks, scales))
        if not math.isfinite(loss):
            raise CalibrationError(
                f"no alpha gives a finite error for group {group.name!r}",
                where=name,
                remedy="check the checkpoint for infinite or huge weights",
            )
        self.report.groups.append(GroupReport(group.name, alpha, loss))
        return scales[alpha], alpha


class _Chunk:
    """A batch of samples with all that does not depend on the group's weights computed once."""

    def __init__(self, layer: DecoderLayer, step: int, hidden: Tensor, places: Any) -> None:
        self.samples, length, size = hidden.shape
        self.places = places
        flat = hidden.reshape(self.samples * length, size)
        self.hidden, x = layer.run((flat,), self.samples, places, stop=step)
        self.output = layer.run((self.hidden, x), self.samples, places, start=step)[0].asnumpy()
        self.x = x.asnumpy()
        by_sample = self.x.reshape(self.samples, length, -1)
        # Dividing by a positive scale keeps the order, so these give every candidate's range.
        self.column_low, self.column_high = by_sample.min(axis=1), by_sample.max(axis=1)

    def quantized_input(self, smooth_scale: NDArray[np.float32]) -> Tensor:
        """The group's input, smoothed, quantized per sample on the fly, and dequantized."""
        low = (self.column_low / smooth_scale).min(axis=1)
        high = (self.column_high / smooth_scale).max(axis=1)
        scale, offset = activation_parameters(low, high)
        by_sample = (self.x / smooth_scale).reshape(self.samples, -1)
        return Tensor(fake_quantize(by_sample, scale[:, None], offset[:, None]).reshape(self.x.shape))


class _GroupLoss:
    """Sum over a range of chunks of the samples' squared errors, divided by the number of all samples."""

    def __init__(
        self, layer: DecoderLayer, group: GroupCells, chunks: list[_Chunk], scales: dict[float, Tensor]
    ) -> None:
        self.layer, self.group, self.chunks = layer, group, chunks
        self.scales = {alpha: scale.asnumpy() for alpha, scale in scales.items()}
        self.total = sum(chunk.output.size for chunk in chunks)
        self._alpha: float | None = None

    def __call__(self, alpha: float, index: int) -> float:
        chunk, scale = self.chunks[index], self.scales[alpha]
        self._set_candidate(alpha)
        try:
            state = (chunk.hidden, chunk.quantized_input(scale))
            output = self.layer.run(state, chunk.samples, chunk.places, start=self.group.step)[0]
        finally:
            for cell in self.group.curr_layer:
                cell.candidate = None
        difference = output.asnumpy() - chunk.output
        return float(np.vdot(difference, difference)) / self.total

    def _set_candidate(self, alpha: float) -> None:
        for cell in self.group.curr_layer:
            if alpha != self._alpha:
                scaled = cell.layer.weight.asnumpy() * self.scales[alpha]
                cell.kept = Tensor(fake_quantize(scaled, weight_scale(scaled)))
            cell.candidate = cell.kept
        self._alpha = alpha


def least_loss(candidates: Sequence[float], chunks: int, loss: Any) -> tuple[float, float]:
    """Find the candidate with the least loss summed over all chunks; the first one on a tie.

    Losses are never negative, so a candidate is given up as soon as its partial sum exceeds the best complete
    one. The result is that of an exhaustive search.

    Args:
        candidates: in ascending order.
        chunks: how many parts the loss is the sum of.
        loss: `(candidate, chunk) -> float`.

    Returns:
        The candidate and its loss.
    """
    partial = {candidate: loss(candidate, 0) for candidate in candidates}
    best, least = candidates[0], math.inf
    for candidate in sorted(candidates, key=lambda c: (partial[c], c)):
        total = partial[candidate]
        for chunk in range(1, chunks):
            if not total <= least:
                break
            total += loss(candidate, chunk)
        if total < least or (total == least and candidate < best):
            best, least = candidate, total
    return best, least
