"""The value rows of multi-head latent attention, as a cell that golden-stick can fold a smooth scale into."""

from typing import Any

import numpy as np
from mindspore import Tensor
from mindspore_gs.ptq.quant_cells.quant_cell import QuantCell
from numpy.typing import NDArray


class ValueRows:
    """Those rows of `kv_b_proj` that make the values which `o_proj` reads.

    The weight is `[heads * (key_rows + value_rows), rank]`, keys before values in every head (transformers
    4.57.1, `models/deepseek_v3/modeling_deepseek_v3.py`). To golden-stick this is a linear with the values'
    rows alone; it is its own `weight`, because `weight` is read and replaced as a whole.

    Args:
        cell: `kv_b_proj`, as it is or wrapped for quantization.
        heads: attention heads.
        key_rows: rows of keys in a head.
        value_rows: rows of values in a head.
    """

    bias = None

    def __init__(self, cell: Any, heads: int, key_rows: int, value_rows: int) -> None:
        self._linear = cell.layer if isinstance(cell, QuantCell) else cell
        per_head = np.arange(heads)[:, None] * (key_rows + value_rows)
        self._rows: NDArray[np.integer] = (per_head + key_rows + np.arange(value_rows)).reshape(-1)

    @property
    def weight(self) -> "ValueRows":
        return self

    def clone(self) -> Tensor:
        """The rows, `[heads * value_rows, rank]`."""
        return Tensor(self._linear.weight.asnumpy()[self._rows])

    def set_data(self, rows: Tensor) -> None:
        """Replace the rows."""
        weight = self._linear.weight.asnumpy().copy()
        weight[self._rows] = rows.asnumpy()
        self._linear.weight.set_data(Tensor(weight, self._linear.weight.dtype))
