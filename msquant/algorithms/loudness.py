"""The search of `awq`: how far columns that meet loud channels are enlarged before their weight is rounded.

A column's rounding error counts by the square of what its channel brings. Multiplied by more, and the channel
divided by as much, it is rounded more finely beside its neighbours under one scale. As AWQ (arXiv 2306.00978)
and golden-stick 1.4.1 (`ptq/algo_modules/mindone/anti_outliers.py`, `AWQSmoother` without `duo_scaling`), the
factor is a power of the channel's mean magnitude.

Unlike theirs, a candidate's loss is that of the group's own linears with scales searched as they will be, and
by inputs whose correlations are shrunk, as `kernels/gptq.py` shrinks them: an exponent that fits how
calibration's channels happen to go together wins nothing.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from mindspore import Tensor
from mindspore_gs.ptq.algo_modules.mindone import AWQSmoother
from numpy.typing import NDArray

from msquant.algorithms.held_out import HeldOutSmoother
from msquant.algorithms.smoothers import GroupCells, SearchLinearCell, nothing_finite
from msquant.checkpoint.weights import QuantizedLinear, token_scales
from msquant.interrupts import check_interrupt
from msquant.kernels.gptq import gram_matrix, nearest_by_loudness, shrunk
from msquant.kernels.layer_report import GroupReport
from msquant.models.layers import DecoderLayer
from msquant.schemes import Scheme, parse_scheme

Floats = NDArray[np.float32]

SMALLEST = 1e-4
"""Of a factor, before it is normalized; golden-stick's."""

SHRINKAGE = 0.3
"""Of the correlations between channels by which candidates are compared."""

SEARCH_RATIOS = (1.0, 0.85, 0.7)
"""The scales that are tried for a candidate; fewer than in the end."""

SEARCH_ROWS = 128
"""Of each weight, evenly spread, by which candidates are compared: an exponent is shared by all rows."""


class LoudnessSearch:
    """The exponents of one group, compared.

    Args:
        x: what its linears read, batches `[T, K]`.
        weights: of its linears, float32 `[N, K]` each, of which `SEARCH_ROWS` rows or a few more are used.
        scheme: of its linears; not a static one.
        query_groups: key-value heads and query heads of each, where the scale is shared by the query heads.
    """

    def __init__(
        self,
        x: Sequence[Floats],
        weights: Sequence[Floats],
        scheme: Scheme,
        query_groups: tuple[int, int] | None = None,
    ) -> None:
        assert scheme.weights is not None
        self._x, self._scheme, self._quant = x, scheme, scheme.weights
        self._weights = [weight[:: max(1, len(weight) // SEARCH_ROWS)] for weight in weights]
        gram = gram_matrix(x)
        self._squares = gram.diagonal().copy()
        self._hessian = shrunk(gram, SHRINKAGE, 0.0)
        power = sum(float(np.vdot(weight @ self._hessian, weight)) for weight in self._weights)
        self._power = power or 1.0
        tokens = sum(map(len, x))
        self._magnitudes = np.sum([np.abs(batch).sum(axis=0) for batch in x], axis=0) / np.float32(tokens)
        if query_groups is not None:
            heads = self._magnitudes.reshape(*query_groups, -1)
            mean = heads.mean(axis=1, keepdims=True)
            self._magnitudes = np.broadcast_to(mean, heads.shape).reshape(-1)

    @np.errstate(over="ignore", invalid="ignore")
    def best(self, alphas: Sequence[float]) -> tuple[float, float]:
        """The exponent with the least loss and that loss; the first one wins a tie."""
        losses = [self.loss(alpha) for alpha in alphas]
        least = int(np.nanargmin([loss if math.isfinite(loss) else math.inf for loss in losses]))
        return alphas[least], losses[least]

    def loss(self, alpha: float) -> float:
        """The mean squared error of the outputs over their mean square, both by the shrunk inputs.

        Per token, the inputs' own error comes on top: that of evenly spread values, a twelfth of the squared
        step, for which no input has to be rounded.
        """
        check_interrupt()
        scale = self.scale(alpha)
        step = 0.0
        if self._scheme.is_dynamic:
            squares = [np.square(token_scales(batch / scale)).sum(dtype=np.float64) for batch in self._x]
            step = float(np.sum(squares)) / sum(map(len, self._x)) / 12
        loudness, error = self._squares / np.square(scale), 0.0
        for weight in self._weights:
            enlarged = weight * scale
            rounded, scales, zeros = nearest_by_loudness(
                enlarged, loudness, "float32", self._quant, SEARCH_RATIOS
            )
            kept = QuantizedLinear(rounded, scales, self._scheme, weight_offset=zeros).float_weight
            change = (kept - enlarged) / scale
            error += float(np.vdot(change @ self._hessian, change))
            error += step * float(np.vdot(enlarged, enlarged))
        return error / self._power

    def scale(self, alpha: float) -> Floats:
        """The factor of each column, `[K]`."""
        return loudness_scale(self._magnitudes, alpha)


class LoudnessSmoother(HeldOutSmoother):
    """Where inputs are static, what leaves its range counts most: there it is `osl`'s search.

    golden-stick's AWQ is for weights alone and its OutlierSuppressionLite for quantized inputs; this takes
    the linears of both.
    """

    def replace(self, decoder_layer_name: str, decoder_layer: Any, **kwargs: Any) -> None:
        """Wrap the linears of a decoder layer."""
        super().replace(decoder_layer_name, decoder_layer, **kwargs)
        AWQSmoother.replace(self, decoder_layer_name, decoder_layer, **kwargs)

    def get_wrapper_layer(self, layer_type: Any, config: Any) -> type | None:
        """Wrap what golden-stick would wrap, in our cell."""
        awq = AWQSmoother.get_wrapper_layer(self, layer_type, config)
        return SearchLinearCell if awq else super().get_wrapper_layer(layer_type, config)

    def _search_best_ratio(
        self, name: str, layer: DecoderLayer, group: GroupCells, search_inputs: Any, *heads: int
    ) -> tuple[Tensor, float]:
        policy = self.get_layer_policy(group.curr_layer[0].layer_name)
        scheme = parse_scheme(policy.algo_args["scheme"])
        if scheme.is_static:
            return super()._search_best_ratio(name, layer, group, search_inputs, *heads)
        query, key_value = heads
        batches = self.batches_of(layer, search_inputs)
        search = LoudnessSearch(
            [batch.states[group.step][1].asnumpy() for batch in batches],
            [cell.layer.weight.asnumpy() for cell in group.curr_layer],
            scheme,
            (key_value, query // key_value) if self.is_gqa_wo_layer else None,
        )
        alpha, loss = search.best(policy.algo_args["loudness_alpha"])
        if not math.isfinite(loss):
            raise nothing_finite(group.name, self.report.name)
        scale = Tensor(search.scale(alpha))
        self.report_group(GroupReport(group.name, alpha, loss), scale, heads[-1])
        return scale, alpha


def loudness_scale(magnitudes: Floats, alpha: float) -> Floats:
    """`max(1e-4, a^alpha)` over the root of the product of its greatest and least; 1 where a is 0.

    Args:
        magnitudes: a, the mean magnitude of each channel, `[K]`.
        alpha: the exponent; 0 gives ones.
    """
    scale = np.maximum(np.power(magnitudes, np.float32(alpha)), np.float32(SMALLEST))
    scale /= np.sqrt(scale.max() * scale.min())
    return np.where(magnitudes > 0, scale, np.float32(1)).astype(np.float32)
