"""The gated feed-forward block: a dense layer's, a shared expert's or a routed expert's."""

from typing import Any

from mindspore import Tensor, nn, ops

from msquant.checkpoint.weights import WeightSource
from msquant.models.cells import add_linears
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
        names = config.family.names
        self._parts = names.gate, names.up, names.down
        add_linears(self, config, source, name, dtype, *self._parts)

    @property
    def linears(self) -> tuple[Any, Any, Any]:
        """The cells of gate, up and down, which golden-stick replaces."""
        gate, up, down = (getattr(self, part) for part in self._parts)
        return gate, up, down

    def gated(self, x: Tensor) -> Tensor:
        """The input of the linear down: `[T, H]` to `[T, intermediate]`."""
        gate, up, _ = self.linears
        return ops.silu(gate(x)) * up(x)

    def construct(self, x: Tensor) -> Tensor:
        """`[T, H]` to the same."""
        return self.linears[2](self.gated(x))
