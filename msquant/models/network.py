"""The two ends of a model, and a whole model held in memory."""

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from numpy.typing import NDArray

from msquant.checkpoint.weights import WeightSource
from msquant.models.config import ModelConfig, check_shape
from msquant.models.families import EMBEDDING, FINAL_NORM, HEAD
from msquant.models.layers import DecoderLayer, KeyValueCache, RMSNorm, positions


class Embedding:
    """Token ids to hidden states."""

    def __init__(self, config: ModelConfig, source: WeightSource, dtype: Any) -> None:
        self._table = _table(config, source, EMBEDDING)
        self._dtype = dtype

    def __call__(self, tokens: NDArray[np.integer]) -> Tensor:
        """`[B, T]` to `[B, T, H]`; the rows are picked on the host."""
        return Tensor(self._table[tokens], self._dtype)


class Head:
    """Hidden states to logits: the final norm and the output projection."""

    def __init__(self, config: ModelConfig, source: WeightSource, dtype: Any) -> None:
        norm = source.tensor(FINAL_NORM)
        check_shape(config, FINAL_NORM, norm.shape)
        self._norm = RMSNorm(norm, config.rms_norm_eps, dtype)
        name = EMBEDDING if config.tie_word_embeddings else HEAD
        self._weight = Tensor(_table(config, source, name), dtype)
        self._matmul = ops.MatMul(transpose_b=True)

    def __call__(self, hidden: Tensor) -> Tensor:
        """`[..., H]` to float32 logits `[rows, V]`."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        return self._matmul(self._norm(flat), self._weight).astype(ms.float32)


class CausalLM:
    """A whole model in memory, in floating point or with quantized linears, as its source has them.

    Args:
        config: the model's shape.
        source: its weights.
        dtype: compute dtype, as `use_device` returned it.
    """

    def __init__(self, config: ModelConfig, source: WeightSource, dtype: Any) -> None:
        self.config = config
        self._dtype = dtype
        self._embedding = Embedding(config, source, dtype)
        self._layers = [
            DecoderLayer(config, source, config.family.layer_name(i), dtype)
            for i in range(config.num_hidden_layers)
        ]
        self._head = Head(config, source, dtype)

    def new_cache(self) -> list[KeyValueCache]:
        """An empty key-value cache for `logits`, one entry a layer."""
        return [KeyValueCache() for _ in self._layers]

    def logits(
        self,
        tokens: NDArray[np.integer],
        cache: list[KeyValueCache] | None = None,
        past: int = 0,
        last_only: bool = False,
    ) -> NDArray[np.float32]:
        """Logits of the token after each given one.

        Args:
            tokens: `[B, T]`.
            cache: keys and values of the `past` tokens before these; extended in place.
            past: how many tokens the cache holds.
            last_only: only for the last token of each sequence.

        Returns:
            float32 `[B, T, V]`, or `[B, 1, V]` with `last_only`.
        """
        batch, length = tokens.shape
        places = positions(self.config, length, self._dtype, past)
        hidden = self._embedding(tokens)
        for i, layer in enumerate(self._layers):
            hidden = layer(hidden, places, cache[i] if cache else None)
        if last_only:
            hidden = hidden[:, -1:]
        return self._head(hidden).asnumpy().reshape(batch, -1, self.config.vocab_size)


def _table(config: ModelConfig, source: WeightSource, name: str) -> NDArray[np.float32]:
    table = source.tensor(name)
    check_shape(config, name, table.shape)
    return table
