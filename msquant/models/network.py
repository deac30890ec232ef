"""The two ends of a model, and a whole model held in memory."""

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from numpy.typing import NDArray

from msquant.checkpoint.weights import WeightSource
from msquant.models.cells import norm_cell, projection
from msquant.models.config import ModelConfig, check_shape
from msquant.models.layers import Cache, DecoderLayer
from msquant.models.positions import positions


class Embedding:
    """Token ids to hidden states, reading the rows of the tokens at hand and no others.

    Args:
        config: the model's shape.
        source: its weights.
        dtype: compute dtype, as `use_device` returned it.
        name: of the table, without `.weight`; None for the model's own.
    """

    def __init__(
        self, config: ModelConfig, source: WeightSource, dtype: Any, name: str | None = None
    ) -> None:
        self._config, self._source, self._dtype = config, source, dtype
        self._name = name or config.family.names.embedding

    def __call__(self, tokens: NDArray[np.integer]) -> Tensor:
        """`[B, T]` to `[B, T, H]`.

        Raises:
            CheckpointError: the table is missing or damaged, or its rows are not of the hidden size.
        """
        unique, places = np.unique(tokens, return_inverse=True)
        table = f"{self._name}.weight"
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


class PredictionInput:
    """What the decoder layer of a multi-token-prediction layer reads (DeepSeek-V3, arXiv 2412.19437, 2.2).

    `eh_proj([enorm(embedding of token i + 1), hnorm(hidden state of token i)])`. The hidden state is taken
    behind the last norm of the model, and for a further layer behind that of the one before, as vllm 0.32.0
    (models/deepseek_mtp.py) does. vLLM hides the embedding at position 0, which only decides over a token
    that is never predicted for; here it is computed like all others.

    Args:
        config: the model's shape.
        source: its weights.
        index: number of the layer, `num_hidden_layers` for the first.
        dtype: compute dtype, as `use_device` returned it.

    Raises:
        CheckpointError: a weight is missing or damaged, or does not fit the config.
    """

    def __init__(self, config: ModelConfig, source: WeightSource, index: int, dtype: Any) -> None:
        names, first = config.family.names, config.num_hidden_layers
        layer, before = config.family.layer_name(index), config.family.layer_name(index - 1)
        self._ahead, self._dtype = index - first + 1, dtype
        self._embedding = Embedding(config, source, dtype, f"{layer}.{names.prediction_embedding}")
        last = names.final_norm if index == first else f"{before}.{names.prediction_norm}"
        self._last_norm = norm_cell(config, source, last, dtype)
        self._embedding_norm = norm_cell(config, source, f"{layer}.{names.prediction_embedding_norm}", dtype)
        self._hidden_norm = norm_cell(config, source, f"{layer}.{names.prediction_hidden_norm}", dtype)
        self._project = projection(config, source, f"{layer}.{names.prediction_projection}", dtype)

    def __call__(self, hidden: NDArray[np.float32], tokens: NDArray[np.integer]) -> NDArray[np.float32]:
        """The layer's input.

        Args:
            hidden: what the layer before gives, float32 `[B, T, H]`: of all tokens if that is the last
                decoder layer, and of one less for every multi-token-prediction layer in between.
            tokens: all tokens, `[B, T]` for the first such layer.

        Returns:
            float32 `[B, T - 1, H]`: the last hidden state has no next token.
        """
        batch, length, size = hidden.shape
        states = Tensor(hidden[:, :-1].reshape(-1, size), self._dtype)
        embedded = self._embedding(tokens[:, self._ahead :]).reshape(-1, size)
        joined = ops.cat((self._embedding_norm(embedded), self._hidden_norm(self._last_norm(states))), axis=1)
        made: NDArray[np.float32] = self._project(joined).asnumpy().astype(np.float32, copy=False)
        return made.reshape(batch, length - 1, size)


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

    def new_cache(self) -> list[Cache]:
        """An empty cache for `logits`, one entry a layer."""
        return [layer.new_cache() for layer in self._layers]

    def logits(
        self,
        tokens: NDArray[np.integer],
        cache: list[Cache] | None = None,
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
