"""Root mean square normalization in NumPy."""

from typing import Self

import numpy as np

from msquant.checkpoint.weights import WeightSource
from msquant.kernels.cpu_linear import Array
from msquant.models.config import ModelConfig
from msquant.models.reading import read_norm


class CpuRMSNorm:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis (arXiv 1910.07467)."""

    def __init__(self, weight: Array, eps: float) -> None:
        self._weight, self._eps, self._size = weight, np.float32(eps), np.float32(len(weight))

    @classmethod
    def read(cls, config: ModelConfig, source: WeightSource, name: str, eps: float | None = None) -> Self:
        """Read the norm called `name`; its epsilon is that of the config if None is given.

        Raises:
            CheckpointError: it is missing or damaged, or its shape is not that of the config.
        """
        weight = read_norm(config, source, name)
        return cls(weight, config.rms_norm_eps if eps is None else eps)

    def __call__(self, x: Array) -> Array:
        """`[..., H]` to the same."""
        mean = np.square(x).sum(axis=-1, keepdims=True) / self._size
        # In the order of the MindSpore cell: other roundings put more activations on the other side of a tie.
        return x * ((1 / np.sqrt(mean + self._eps)) * self._weight)
