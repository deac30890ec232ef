"""The gated feed-forward block: a dense layer's, a shared expert's or a routed expert's."""

from typing import Any

from mindspore import Tensor, nn, ops

from msquant.checkpoint.weights import WeightSource
from msquant.models.cells import projection
from msquant.models.config import ModelConfig


class MLP(nn.Cell):
    """`down(silu(gate(x)) * up(x))` (arXiv 2002.05202).

    Args:
        config: the model's shape.
        source: its weights.
        name: of the block, for example `model.layers.3.mlp.experts.7`.
        dtype: compute dtype.

    Raises:
        CheckpointError: a weight is missing or damaged, or does not fit the config.
    """

    def __init__(self, config: ModelConfig, source: WeightSource, name: str, dtype: Any) -> None:
        super().__init__()
        self.gate_proj = projection(config, source, f"{name}.gate_proj", dtype)
        self.up_proj = projection(config, source, f"{name}.up_proj", dtype)
        self.down_proj = projection(config, source, f"{name}.down_proj", dtype)

    def gated(self, x: Tensor) -> Tensor:
        """The input of `down_proj`: `[T, H]` to `[T, intermediate]`."""
        return ops.silu(self.gate_proj(x)) * self.up_proj(x)

    def construct(self, x: Tensor) -> Tensor:
        """`[T, H]` to the same."""
        return self.down_proj(self.gated(x))
