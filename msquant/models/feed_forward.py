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
        self._inputs, self._down = names.feed_forward_inputs, names.down
        add_linears(self, config, source, name, dtype, *self._inputs, self._down)

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The cells of gate and up, or the one that is both, gate first; golden-stick replaces them."""
        return tuple(getattr(self, part) for part in self._inputs)

    @property
    def down(self) -> Any:
        """The cell behind them."""
        return getattr(self, self._down)

    def gated(self, x: Tensor) -> Tensor:
        """The input of the linear down: `[T, H]` to `[T, intermediate]`."""
        made = [linear(x) for linear in self.inputs]
        gate, up = made if len(made) > 1 else ops.split(made[0], made[0].shape[1] // 2, axis=1)
        return ops.silu(gate) * up

    def construct(self, x: Tensor) -> Tensor:
        """`[T, H]` to the same."""
        return self.down(self.gated(x))
