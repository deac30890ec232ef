"""The search for every weight row's clip ratio, as golden-stick modules.

The arithmetic is golden-stick's (`ptq/quant_cells/mindone/linear_clip_wrappers.py`): for every ratio, the
mean over tokens of `(X Q(clip W) - X W)^2` per output channel; the least error wins, the larger ratio on a
tie. `FastClipLinearCell` computes it as `sum((Q(clip W) - W) R^T)^2` with `R^T R = X^T X / T`: R is the
inputs themselves or, when there are more tokens than channels, the root of their Gram matrix.
"""

from typing import Any

import numpy as np
from mindspore import Tensor
from mindspore_gs.ptq.algo_modules.mindone import LinearClipper
from mindspore_gs.ptq.quant_cells.mindone import ClipLinearCell
from mindspore_gs.ptq.quant_cells.quant_cell import QuantCell
from numpy.typing import NDArray

from msquant.interrupts import check_interrupt
from msquant.kernels.fake_quant import row_maxima
from msquant.kernels.layer_report import LayerReport
from msquant.kernels.weight_rounding import clipping_change

# golden-stick's `n_sample_tokens`.
SEARCH_TOKENS = 512


class FastClipLinearCell(ClipLinearCell):  # type: ignore[misc]  # golden-stick has no types
    """golden-stick's cell with one matrix product a ratio; it keeps the ratios it chose."""

    clip_ratio: NDArray[np.float32]

    def _search_best_clip(self, weight_clip_ratio: list[float]) -> Tensor:
        """Return the value to clip each row at, `[N, 1, 1]`."""
        inputs = self.cat_samples.asnumpy()
        root = input_root(inputs[:: max(1, len(inputs) // SEARCH_TOKENS)])
        values = best_clip_values(self.layer.weight.asnumpy(), root, weight_clip_ratio)
        return Tensor(values.reshape(-1, 1, 1))

    def _apply_clip(self, clip_val: Tensor) -> None:
        """Clamp the weight to `clip_val`, `[N, 1, 1]`."""
        weight, limit = self.layer.weight.asnumpy(), clip_val.asnumpy().reshape(-1, 1)
        self.clip_ratio = chosen_ratios(weight, limit[:, 0])
        # On the host, as in the smoother: MindSpore would keep the memory of the old weight for itself.
        self.layer.weight.set_data(Tensor.from_numpy(np.clip(weight, -limit, limit)))


class FastClipper(LinearClipper):  # type: ignore[misc]
    """golden-stick's clipper with these cells, which also reports what they chose."""

    cell_type: type = FastClipLinearCell

    def __init__(self, net_config: Any, layer_policies: Any, *, report: LayerReport) -> None:
        super().__init__(net_config, layer_policies)
        self.report = report

    def get_wrapper_layer(self, layer_type: Any, config: Any) -> type | None:
        """Wrap what golden-stick would wrap, in our cell."""
        return self.cell_type if super().get_wrapper_layer(layer_type, config) else None

    def process(self, decoder_layer_name: str, decoder_layer: Any, **kwargs: Any) -> None:
        """Search and clip every wrapped linear of the decoder layer."""
        cells = {name: cell for name, cell in decoder_layer.cells_and_names() if isinstance(cell, QuantCell)}
        super().process(decoder_layer_name, decoder_layer, **kwargs)
        self.report.clip_ratios = {name: cell.clip_ratio for name, cell in cells.items()}


def chosen_ratios(weight: NDArray[np.float32], limit: NDArray[np.float32]) -> NDArray[np.float32]:
    """What part of its greatest magnitude each row is clipped at: `[N, K]`, `[N]` to `[N]`; 1 for zeros."""
    highest = row_maxima(weight)
    return np.divide(limit, highest, out=np.ones_like(limit), where=highest > 0)


def input_root(inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """A matrix R with `R^T R = X^T X / T`, of as few rows as possible.

    Args:
        inputs: X, float32 `[T, K]`.

    Returns:
        float32 `[min(T, K), K]`.
    """
    tokens, channels = inputs.shape
    if tokens <= channels:
        return inputs / np.float32(np.sqrt(tokens))
    gram = (inputs.T @ inputs).astype(np.float64) / tokens
    values, vectors = np.linalg.eigh(gram)
    root: NDArray[np.float32] = (np.sqrt(np.clip(values, 0, None))[:, None] * vectors.T).astype(np.float32)
    return root


def best_clip_values(
    weight: NDArray[np.float32], root: NDArray[np.float32], ratios: list[float]
) -> NDArray[np.float32]:
    """The value to clip each row of the weight at.

    Args:
        weight: `[N, K]`.
        root: of the inputs, `[R, K]`, from `input_root`.
        ratios: of the row's greatest magnitude, in the order in which ties are decided.

    Returns:
        float32 `[N]`.
    """
    highest = row_maxima(weight)[:, None]
    best = highest.copy()
    least = np.full_like(highest, 1e9)
    change = np.empty_like(weight)
    for ratio in ratios:
        check_interrupt()
        limit = highest * np.float32(ratio)
        error = np.square(clipping_change(weight, limit, change) @ root.T).sum(axis=1, keepdims=True)
        better = error < least
        best[better], least[better] = limit[better], error[better]
    return best.reshape(-1)
