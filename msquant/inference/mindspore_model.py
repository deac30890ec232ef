"""The model of the embedded engine on Ascend: the MindSpore cells that quantization works with."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.weights import WeightSource
from msquant.models.config import ModelConfig
from msquant.models.device import use_device
from msquant.models.layers import Cache
from msquant.models.network import CausalLM


class SequenceCache:
    """Keys and values of one sequence.

    Attributes:
        length: how many tokens it holds.
        layers: of each decoder layer.
    """

    def __init__(self, layers: list[Cache]) -> None:
        self.length = 0
        self.layers = layers


class MindSporeModel:
    """A `BatchModel` that computes one sequence after another.

    Args:
        config: the model's shape.
        source: its weights.
        device: `ascend`, or `cpu` to compare.

    Raises:
        EngineError: the device is unknown or not there.
        CheckpointError: a weight is missing or damaged, or does not fit the config.
    """

    def __init__(self, config: ModelConfig, source: WeightSource, device: str) -> None:
        self._model = CausalLM(config, source, use_device(device))

    def new_cache(self) -> SequenceCache:
        """The empty key-value cache of a sequence."""
        return SequenceCache(self._model.new_cache())

    def next_logits(self, batch: Sequence[tuple[SequenceCache, Sequence[int]]]) -> NDArray[np.float32]:
        """Logits of the token after each sequence's last; see `BatchModel.next_logits`."""
        rows = []
        for cache, tokens in batch:
            logits = self._model.logits(np.array([tokens]), cache.layers, cache.length, last_only=True)
            cache.length += len(tokens)
            rows.append(logits[0, -1])
        return np.stack(rows)

    def logits(self, cache: SequenceCache, tokens: Sequence[int], count: int) -> NDArray[np.float32]:
        """Logits after each of the last `count` of a sequence's tokens; see `BatchModel.logits`."""
        logits = self._model.logits(np.array([tokens]), cache.layers, cache.length)
        cache.length += len(tokens)
        return logits[0, len(tokens) - count :]
