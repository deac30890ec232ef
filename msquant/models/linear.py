"""Linear layers as MindSpore cells: floating point, and W8A8 with exact integer arithmetic."""

from typing import Any

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops

from msquant.checkpoint.weights import FloatLinear, Linear, QuantizedLinear

INT8_MIN, INT8_MAX = -128, 127
# float32 holds integers exactly up to 2**24 = 1024 * 128 * 128.
EXACT_CHANNELS = 1024


def linear_cell(linear: Linear, dtype: Any) -> nn.Cell:
    """Build the cell that computes `linear` on inputs `[T, K]`, in `dtype` outside the integer product."""
    if isinstance(linear, FloatLinear):
        return dense(linear, dtype)
    return Int8Linear(linear, dtype)


def dense(linear: FloatLinear, dtype: Any) -> nn.Dense:
    """Build the `nn.Dense` that golden-stick's registries know."""
    n, k = linear.weight.shape
    bias = None if linear.bias is None else Tensor(linear.bias, dtype)
    return nn.Dense(
        k, n, weight_init=Tensor(linear.weight, dtype), bias_init=bias, has_bias=bias is not None, dtype=dtype
    )


class Int8Linear(nn.Cell):
    """`y = weight_scale * s_x * sum_k W_q (x_q - z) + bias` with `x_q = clamp(round(x / s_x) + z)`.

    Static per tensor when the layer carries `input_scale`; otherwise `s_x = 2 max|x| / 255` per token and
    `z = 0`. The sum is exact: products of int8 are added in float32 over at most 1024 channels, and the
    parts in int32 (golden-stick 1.4.1, `quant_cells/mindone/fake_quant_base.py`, states the same quantizer).
    """

    def __init__(self, linear: QuantizedLinear, dtype: Any) -> None:
        super().__init__()
        self.dtype = dtype
        k = linear.weight.shape[1]
        self.parts = [(start, min(start + EXACT_CHANNELS, k)) for start in range(0, k, EXACT_CHANNELS)]
        self.weight = Parameter(Tensor(linear.weight, ms.float32), requires_grad=False)
        self.weight_scale = Tensor(linear.weight_scale, ms.float32)
        self.bias = None if linear.bias is None else Tensor(linear.bias, ms.float32)
        self.input_scale = self.input_offset = None
        if linear.input_scale is not None and linear.input_offset is not None:
            self.input_scale = float(linear.input_scale[0])
            self.input_offset = int(linear.input_offset[0])
            self.offset_sum = Tensor(linear.weight.sum(axis=1, dtype="int32") * self.input_offset, ms.int32)
        self.matmul = ops.MatMul(transpose_b=True)

    def construct(self, x: Tensor) -> Tensor:
        """`[T, K]` to `[T, N]`."""
        x = x.astype(ms.float32)
        if self.input_scale is None:
            scale = ops.amax(ops.abs(x), axis=-1, keepdims=True) * 2 / (INT8_MAX - INT8_MIN)
            # A token of zeros has no scale; any will do.
            scale = ops.where(scale == 0, ops.ones_like(scale), scale)
            quantized = ops.clamp(ops.round(x / scale), INT8_MIN, INT8_MAX)
            total = self._integer_product(quantized)
        else:
            scale = self.input_scale
            quantized = ops.clamp(ops.round(x / scale) + self.input_offset, INT8_MIN, INT8_MAX)
            total = self._integer_product(quantized) - self.offset_sum
        y = total.astype(ms.float32) * (self.weight_scale * scale)
        if self.bias is not None:
            y = y + self.bias
        return y.astype(self.dtype)

    def _integer_product(self, quantized: Tensor) -> Tensor:
        """Integers held in float32, `[T, K]`, to int32 `[T, N]`."""
        total = None
        for start, stop in self.parts:
            part = self.matmul(quantized[:, start:stop], self.weight[:, start:stop]).astype(ms.int32)
            total = part if total is None else total + part
        return total
