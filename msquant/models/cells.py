"""Linears, with exact integer arithmetic, and the other small cells that every block is made of."""

from itertools import pairwise
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.nn.utils import no_init_parameters
from numpy.typing import NDArray

from msquant.checkpoint.weights import (
    INT8_MAX,
    INT8_MIN,
    FloatLinear,
    Linear,
    QuantizedLinear,
    WeightSource,
    as_computed,
)
from msquant.kernels.cpu_linear import linear_layer
from msquant.kernels.integer_product import exact_parts
from msquant.models.config import ModelConfig
from msquant.models.reading import read_linear, read_norm, read_tensor


def linear_cell(linear: Linear, dtype: Any) -> nn.Cell:
    """Build the cell that computes `linear` on inputs `[T, K]`, in `dtype` outside the integer product."""
    linear = as_computed(linear)
    if isinstance(linear, FloatLinear):
        return dense(linear, dtype)
    # What integers stand for in groups is summed in float32, whose digits MindSpore keeps on any core count.
    if dtype == ms.float32 and linear.weight_scale.ndim == 1:
        return CpuLinear(linear)
    return Int8Linear(linear, dtype)


def dense(linear: FloatLinear, dtype: Any) -> nn.Dense:
    """Build the `nn.Dense` that golden-stick's registries know; in float32 it shares the array's memory."""
    n, k = linear.weight.shape
    bias = None if linear.bias is None else Tensor(linear.bias, dtype)
    weight = Tensor.from_numpy(np.ascontiguousarray(linear.weight))
    # Given to the constructor, the weight would be copied twice.
    with no_init_parameters():
        cell = nn.Dense(k, n, has_bias=bias is not None, dtype=dtype)
    cell.weight.set_data(weight if dtype == ms.float32 else weight.astype(dtype))
    if bias is not None:
        cell.bias.set_data(bias)
    for parameter in cell.get_parameters():
        # Otherwise a clone of it would be initialized at random.
        parameter.init_mode = None
        # Through this it refers to itself, and its memory would wait for the garbage collector.
        parameter.param_info.obj = None
    return cell


class CpuLinear(nn.Cell):
    """As `Int8Linear` on a CPU, where MindSpore divides, and multiplies by a row or column, 20 times slower.

    Its tensors share the memory of NumPy's arrays.
    """

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        self.layer = linear_layer(linear)

    def construct(self, x: Tensor) -> Tensor:
        """`[T, K]` to `[T, N]`."""
        return Tensor.from_numpy(self.layer(x.asnumpy()))


class Int8Linear(nn.Cell):
    """`y = weight_scale * s_x * sum_k W_q (x_q - z) + bias` with `x_q = clamp(round(x / s_x) + z)`.

    Static per tensor when the layer carries `input_scale`, with `x_q = clamp(round(x r + z))` where it has a
    reciprocal r too; otherwise `s_x = max|x| / 127` per token and `z = 0`, see `token_scales`. The sum is
    exact: it is added in float32 over as many channels as stay within float32's exact integers with these
    weights, and such parts in int32. With scales of groups the weights are what the integers stand for, and
    the sum is float32's.
    """

    def __init__(self, linear: QuantizedLinear, dtype: Any) -> None:
        super().__init__()
        self.dtype = dtype
        self.input_scale = self.input_reciprocal = None
        offset = np.zeros(1, np.float32)
        if linear.input_scale is not None and linear.input_offset is not None:
            self.input_scale = float(linear.input_scale[0])
            offset = linear.input_offset.astype(np.float32)
            if linear.input_reciprocal is not None:
                self.input_reciprocal = float(linear.input_reciprocal[0])
        # The offset is taken off before the product: x_q - z lies between these.
        lowest, highest = INT8_MIN - offset, INT8_MAX - offset
        self.offset, self.lowest, self.highest = map(_number_or_row, (offset, lowest, highest))
        weight, output_scale = linear.factors
        if weight.dtype == np.int8:
            bounds = exact_parts(linear.weight, float(max(-lowest.min(), highest.max())))
        else:
            bounds = [0, weight.shape[1]]
        self.parts = list(pairwise(bounds))
        self.weights = [
            Tensor.from_numpy(np.asarray(weight[:, start:stop], dtype=np.float32, order="C"))
            for start, stop in self.parts
        ]
        self.weight_scale = Tensor(output_scale, ms.float32)
        if self.input_scale is not None:
            self.output_scale = self.weight_scale * self.input_scale
        self.bias = None if linear.bias is None else Tensor(linear.bias, ms.float32)
        self.matmul = ops.MatMul(transpose_b=True)

    def construct(self, x: Tensor) -> Tensor:
        """`[T, K]` to `[T, N]`."""
        x = x.astype(ms.float32)
        if self.input_scale is None:
            scale = ops.amax(ops.abs(x), axis=-1, keepdims=True) / INT8_MAX
            # A token of zeros has no scale; any will do.
            scale = ops.where(scale == 0, ops.ones_like(scale), scale)
            output_scale = self.weight_scale * scale
        else:
            scale, output_scale = self.input_scale, self.output_scale
        if self.input_reciprocal is None:
            rounded = ops.round(x / scale)
        else:
            # The zero point is added before: it decides where ties go.
            rounded = ops.round(x * self.input_reciprocal + self.offset) - self.offset
        # Limits as floats: with integers clamp is 20 times slower.
        quantized = ops.clamp(rounded, self.lowest, self.highest)
        y = self._integer_product(quantized) * output_scale
        if self.bias is not None:
            y = y + self.bias
        return y.astype(self.dtype)

    def _integer_product(self, quantized: Tensor) -> Tensor:
        """Integers held in float32, `[T, K]`, to their exact products rounded to float32, `[T, N]`."""
        if len(self.parts) == 1:
            return self.matmul(quantized, self.weights[0])
        total: Any = 0
        for (start, stop), weight in zip(self.parts, self.weights, strict=True):
            total = total + self.matmul(quantized[:, start:stop], weight).astype(ms.int32)
        return total.astype(ms.float32)


def _number_or_row(values: NDArray[np.float32]) -> float | Tensor:
    """One number for all columns, or one for each."""
    return float(values[0]) if len(values) == 1 else Tensor(values)


class RMSNorm(nn.Cell):
    """`x / sqrt(mean(x^2) + eps) * weight`, the mean in float32 (arXiv 1910.07467)."""

    def __init__(self, weight: NDArray[np.float32], eps: float, dtype: Any) -> None:
        super().__init__()
        self.weight = Parameter(Tensor(weight, dtype))
        self.eps = eps
        self.mean = ops.ReduceMean(keep_dims=True)
        self.outer = ops.MatMul()

    def construct(self, x: Tensor) -> Tensor:
        """`[T, H]` to the same."""
        wide = x.astype(ms.float32)
        scale = ops.rsqrt(self.mean(ops.square(wide), -1) + self.eps)
        # An outer product, because on a CPU an operator that broadcasts takes 20 times longer.
        factors = self.outer(scale, self.weight.astype(ms.float32).reshape(1, -1))
        return (wide * factors).astype(x.dtype)


def norm_cell(
    config: ModelConfig, source: WeightSource, name: str, dtype: Any, eps: float | None = None
) -> RMSNorm:
    """Build the norm called `name`, for example `model.layers.0.input_layernorm`.

    Args:
        config: the model's shape.
        source: its weights.
        name: of the norm, without `.weight`.
        dtype: compute dtype.
        eps: added to the mean square; that of the config if None.

    Raises:
        CheckpointError: it is missing or damaged, or its shape is not that of the config.
    """
    weight = read_norm(config, source, name)
    return RMSNorm(weight, config.rms_norm_eps if eps is None else eps, dtype)


class StoredMatrix(nn.Cell):
    """A matrix, or a convolution's kernels, that no engine quantizes, in float32; golden-stick passes it by.

    Args:
        config: the model's shape.
        source: its weights.
        name: of the tensor, without `.weight`.

    Raises:
        CheckpointError: it is missing or damaged, or does not fit the config.
    """

    def __init__(self, config: ModelConfig, source: WeightSource, name: str) -> None:
        super().__init__()
        self.weight = Parameter(Tensor(read_tensor(config, source, f"{name}.weight"), ms.float32))
        self.matmul = ops.MatMul(transpose_b=True)

    def construct(self, x: Tensor) -> Tensor:
        """`[T, K]` to `[T, N]` for a matrix."""
        return self.matmul(x.astype(ms.float32), self.weight)


def projection(config: ModelConfig, source: WeightSource, name: str, dtype: Any) -> nn.Cell:
    """Build the linear layer called `name`. Raises CheckpointError as `read_linear`."""
    return linear_cell(read_linear(config, source, name), dtype)


def add_linears(
    cell: nn.Cell, config: ModelConfig, source: WeightSource, name: str, dtype: Any, *parts: str
) -> dict[str, Linear]:
    """Give a block called `name` its linear layers, under the names that they have within it.

    Returns:
        What they were made of, by these names.

    Raises:
        CheckpointError: as `read_linear`.
    """
    made = {}
    for part in parts:
        made[part] = read_linear(config, source, f"{name}.{part}")
        setattr(cell, part, linear_cell(made[part], dtype))
    return made
