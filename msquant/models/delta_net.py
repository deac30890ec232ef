"""Gated delta rule attention as a MindSpore cell; what lies between its linears is `delta_rule`'s."""

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from numpy.typing import NDArray

from msquant.checkpoint.weights import WeightSource
from msquant.families.base import DeltaSizes
from msquant.models.cells import RMSNorm, StoredMatrix, add_linears, norm_cell
from msquant.models.config import ModelConfig
from msquant.models.delta_rule import DeltaState, DeltaWeights, mix_tokens
from msquant.models.reading import read_tensor


class DeltaCache:
    """What tokens leave behind in one layer, for a batch of sequences of equal length."""

    def __init__(self) -> None:
        self._state: DeltaState | None = None

    def state(self, sizes: DeltaSizes, batch: int) -> DeltaState:
        """That of the tokens so far."""
        if self._state is None:
            self._state = DeltaState(sizes, batch)
        return self._state


class GatedDeltaNet(nn.Cell):
    """The block that mixes tokens by the gated delta rule.

    Args:
        config: the model's shape.
        sizes: of the block.
        source: its weights.
        name: of the block, for example `model.layers.0.linear_attn`.
        dtype: compute dtype of its linears.

    Raises:
        CheckpointError: a weight is missing or damaged, or does not fit the config.
    """

    def __init__(
        self, config: ModelConfig, sizes: DeltaSizes, source: WeightSource, name: str, dtype: Any
    ) -> None:
        super().__init__()
        self.sizes, self.dtype = sizes, dtype
        self.names = names = config.family.names
        add_linears(self, config, source, name, dtype, names.delta_inputs, names.delta_output)
        for matrix in (names.delta_gates, names.delta_convolution):
            setattr(self, matrix, StoredMatrix(config, source, f"{name}.{matrix}"))
        for vector in (names.delta_decay, names.delta_step):
            values = read_tensor(config, source, f"{name}.{vector}")
            setattr(self, vector, Parameter(Tensor(values, ms.float32)))
        setattr(self, names.delta_norm, norm_cell(config, source, f"{name}.{names.delta_norm}", dtype))

    def gates(self, x: Tensor) -> Tensor:
        """What step sizes and decays are made of, `[B*T, H]` to `[B*T, 2 * value heads]`."""
        return getattr(self, self.names.delta_gates)(x)

    def context(self, x: Tensor, gates: Tensor, batch: int, cache: DeltaCache | None) -> Tensor:
        """The input of the output projection, `[B*T, H]` to `[B*T, value heads * value_dim]`.

        Args:
            x: the block's input.
            gates: see `gates`.
            batch: B.
            cache: of the tokens before these; brought up to date in place.
        """
        names, sizes = self.names, self.sizes
        weights = DeltaWeights(
            convolution=getattr(self, names.delta_convolution).weight.asnumpy()[:, 0],
            decay=getattr(self, names.delta_decay).asnumpy(),
            step=getattr(self, names.delta_step).asnumpy(),
        )
        inputs, made = (_host(each, batch) for each in (getattr(self, names.delta_inputs)(x), gates))
        state = DeltaState(sizes, batch) if cache is None else cache.state(sizes, batch)
        mixed, gate = mix_tokens(sizes, weights, inputs, made, state)
        norm: RMSNorm = getattr(self, names.delta_norm)
        mixed, gate = (np.ascontiguousarray(each).reshape(-1, sizes.value_dim) for each in (mixed, gate))
        normed = norm(Tensor(mixed, self.dtype)).astype(ms.float32)
        gated = (normed * ops.silu(Tensor(gate, ms.float32))).astype(self.dtype)
        return gated.reshape(x.shape[0], sizes.values)


def _host(x: Tensor, batch: int) -> NDArray[np.float32]:
    """`[B*T, C]` to `[B, T, C]` in float32."""
    values: NDArray[np.float32] = x.astype(ms.float32).asnumpy()
    return values.reshape(batch, -1, values.shape[1])
