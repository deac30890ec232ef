"""The value rows of latent attention as a cell of their own."""

import mindspore as ms
import numpy as np
from mindspore import nn

from msquant.quantization.layer_pass import ValueRows

HEADS, KEYS, VALUES, RANK = 3, 4, 2, 5


def test_only_the_value_rows_are_read_and_replaced() -> None:
    weight = np.arange(HEADS * (KEYS + VALUES) * RANK, dtype=np.float32).reshape(-1, RANK)
    cell = nn.Dense(RANK, len(weight), weight_init=ms.Tensor(weight), has_bias=False)
    rows = ValueRows(cell, HEADS, KEYS, VALUES)
    by_head = weight.reshape(HEADS, KEYS + VALUES, RANK)

    values = rows.weight.clone()
    np.testing.assert_array_equal(values.asnumpy().reshape(HEADS, VALUES, RANK), by_head[:, KEYS:])

    rows.weight.set_data(values * 2)
    changed = cell.weight.asnumpy().reshape(by_head.shape)
    np.testing.assert_array_equal(changed[:, :KEYS], by_head[:, :KEYS])
    np.testing.assert_array_equal(changed[:, KEYS:], by_head[:, KEYS:] * 2)
