"""Gated delta rule attention in NumPy over a batch of sequences, each with a state of its own."""

from collections.abc import Sequence

import numpy as np

from msquant.checkpoint.weights import WeightSource
from msquant.families.base import DeltaSizes
from msquant.inference.cpu.cpu_attention import Places
from msquant.inference.cpu.norm import CpuRMSNorm
from msquant.kernels.cpu_linear import Array, linear_layer
from msquant.models.config import ModelConfig
from msquant.models.delta_rule import DeltaState, DeltaWeights, mix_tokens
from msquant.models.reading import read_linear, read_tensor


class CpuDeltaNet:
    """The block that mixes tokens by the gated delta rule; see `msquant.models.delta_net.GatedDeltaNet`."""

    def __init__(self, config: ModelConfig, sizes: DeltaSizes, source: WeightSource, name: str) -> None:
        self._sizes, names = sizes, config.family.names
        self._inputs = linear_layer(read_linear(config, source, f"{name}.{names.delta_inputs}"))
        self._gates = read_tensor(config, source, f"{name}.{names.delta_gates}.weight").T
        self._output = linear_layer(read_linear(config, source, f"{name}.{names.delta_output}"))
        self._weights = DeltaWeights(
            convolution=read_tensor(config, source, f"{name}.{names.delta_convolution}.weight")[:, 0],
            decay=read_tensor(config, source, f"{name}.{names.delta_decay}"),
            step=read_tensor(config, source, f"{name}.{names.delta_step}"),
        )
        self._norm = CpuRMSNorm.read(config, source, f"{name}.{names.delta_norm}")

    def __call__(self, x: Array, places: Places, states: Sequence[DeltaState]) -> Array:
        """`[T, H]` to the same."""
        inputs, gates = self._inputs(x), x @ self._gates
        out = np.empty((len(x), self._sizes.value_heads, self._sizes.value_dim), np.float32)
        for rows, state in zip(places.rows, states, strict=True):
            mixed, gate = mix_tokens(self._sizes, self._weights, inputs[rows], gates[rows], state)
            out[rows] = self._norm(mixed) * (gate / (1 + np.exp(-gate)))
        return self._output(out.reshape(len(x), -1))
