"""The two ends of a model, and a whole model held in memory."""

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from numpy.typing import NDArray

from msquant.checkpoint.weights import WeightSource
from msquant.models.attention import KeyValueCache
from msquant.models.cells import norm_cell
from msquant.models.config import ModelConfig, check_shape
from msquant.models.layers import DecoderLayer
from msquant.models.positions import positions


class Embedding:
    """Token ids to hidden states, reading the rows of the tokens at hand and no others."""

    def __init__(self, config: ModelConfig, source: WeightSource, dtype: Any) -> None:
        self._config, self._source, self._dtype = config, source, dtype

    def __call__(self, tokens: NDArray[np.integer]) -> Tensor:
        """`[B, T]` to `[B, T, H]`.

        Raises:
            CheckpointError: the table is missing or damaged, or its rows are not of the hidden size.
        """
        unique, places = np.unique(tokens, return_inverse=True)
        table = f"{self._config.family.names.embedding}.weight"
        rows = self._source.rows(table, unique)
        check_shape(self._config, table, (self._config.vocab_size, *rows.shape[1:]))
        return Tensor(rows[places].reshape(*tokens.shape, -1), self._dtype)


class Head:
    """Hidden states to logits: the final norm and the output projection.

    Args:
        config: the model's shape.
        source: its weights.
        dtype: compute dtype, as `use_device` returned it.
        vocabulary: the tokens to compute logits of, a run `range(first, end)`; all of them if None.

    Raises:
        CheckpointError: a weight is missing or damaged, or does not fit the config.
    """

    def __init__(
        self, config: ModelConfig, source: WeightSource, dtype: Any, vocabulary: range | None = None
    ) -> None:
        names = config.family.names
        self._norm = norm_cell(config, source, names.final_norm, dtype)
        name = f"{names.embedding if config.tie_word_embeddings else names.head}.weight"
        if vocabulary is None:
            table = source.tensor(name)
            check_shape(config, name, table.shape)
        else:
            table = source.rows(name, np.arange(vocabulary.start, vocabulary.stop))
            check_shape(config, name, (config.vocab_size, *table.shape[1:]))
        self._weight = Tensor(table, dtype)
        self._matmul = ops.MatMul(transpose_b=True)

    def __call__(self, hidden: Tensor) -> Tensor:
        """`[..., H]` to float32 logits `[rows, V]`, V the tokens of the vocabulary asked for."""
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
            DecoderLayer(config, source, i, dtype, resident=True) for i in range(config.num_hidden_layers)
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
