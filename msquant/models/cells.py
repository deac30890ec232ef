"""The small cells that every block is made of, read from a source and checked against `config.json`."""

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from numpy.typing import NDArray

from msquant.checkpoint.weights import WeightSource
from msquant.models.config import ModelConfig
from msquant.models.linear import linear_cell
from msquant.models.reading import read_linear, read_tensor


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
    weight = read_tensor(config, source, f"{name}.weight")
    return RMSNorm(weight, config.rms_norm_eps if eps is None else eps, dtype)


def projection(config: ModelConfig, source: WeightSource, name: str, dtype: Any) -> nn.Cell:
    """Build the linear layer called `name`. Raises CheckpointError as `read_linear`."""
    return linear_cell(read_linear(config, source, name), dtype)


def add_linears(
    cell: nn.Cell, config: ModelConfig, source: WeightSource, name: str, dtype: Any, *parts: str
) -> None:
    """Give a block called `name` its linear layers, under the names that they have within it.

    Raises:
        CheckpointError: as `read_linear`.
    """
    for part in parts:
        setattr(cell, part, projection(config, source, f"{name}.{part}", dtype))
