"""A whole model in memory, computed in NumPy and oneDNN for a batch of sequences at a time.

PyNative MindSpore takes about a millisecond for an operator on a CPU, however small it is, and a token of a
small model takes a thousand of them. The layers are tested against the MindSpore cells.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.weights import FloatLinear, WeightSource
from msquant.inference.cpu.attention import GroupedQueryAttention, LatentAttention, LayerCache, Places
from msquant.inference.cpu.feed_forward import MLP, MoE
from msquant.inference.cpu.linear import Array, linear_layer
from msquant.inference.cpu.norm import RMSNorm
from msquant.models.config import ModelConfig, check_shape
from msquant.models.reading import read_tensor


class SequenceCache:
    """Keys and values of one sequence.

    Attributes:
        length: how many tokens it holds.
        layers: of each decoder layer.
    """

    def __init__(self, layers: int) -> None:
        self.length = 0
        self.layers = [LayerCache() for _ in range(layers)]


class DecoderLayer:
    """One decoder layer; see `msquant.models.layers.DecoderLayer`."""

    def __init__(self, config: ModelConfig, source: WeightSource, index: int) -> None:
        name, names = config.family.layer_name(index), config.family.names
        self._input_norm = RMSNorm.read(config, source, f"{name}.{names.input_norm}")
        attention = f"{name}.{names.attention}"
        if config.latent is None:
            self._attention: GroupedQueryAttention | LatentAttention = GroupedQueryAttention(
                config, source, attention
            )
        else:
            self._attention = LatentAttention(config, config.latent, source, attention)
        self._norm = RMSNorm.read(config, source, f"{name}.{names.feed_forward_norm}")
        block = MoE if config.has_experts(index) else MLP
        self._mlp = block(config, source, f"{name}.{names.feed_forward}")

    def __call__(self, hidden: Array, places: Places, caches: Sequence[LayerCache]) -> Array:
        """`[T, H]` to the same."""
        hidden = hidden + self._attention(self._input_norm(hidden), places, caches)
        hidden += self._mlp(self._norm(hidden))
        return hidden


class CpuModel:
    """A model in floating point or with quantized linears, as its source has them.

    Args:
        config: the model's shape.
        source: its weights; all but an untied embedding are read here.

    Raises:
        CheckpointError: a weight is missing or damaged, or does not fit the config.
    """

    def __init__(self, config: ModelConfig, source: WeightSource) -> None:
        self._config, self._source = config, source
        self._layers = [DecoderLayer(config, source, i) for i in range(config.num_hidden_layers)]
        names, tied = config.family.names, config.tie_word_embeddings
        self._norm = RMSNorm.read(config, source, names.final_norm)
        table = read_tensor(config, source, f"{names.embedding if tied else names.head}.weight")
        self._embedding = table if tied else None
        if not tied:
            row = source.rows(f"{names.embedding}.weight", np.zeros(1, np.int64))
            check_shape(config, f"{names.embedding}.weight", (config.vocab_size, *row.shape[1:]))
        self._head = linear_layer(FloatLinear(table))

    def new_cache(self) -> SequenceCache:
        """The empty key-value cache of a sequence."""
        return SequenceCache(len(self._layers))

    def next_logits(self, batch: Sequence[tuple[SequenceCache, Sequence[int]]]) -> NDArray[np.float32]:
        """Logits of the token after each sequence's last.

        Args:
            batch: of each sequence, its cache, which is extended in place, and the tokens that follow. They
                may be at different places, and of different numbers of tokens.

        Returns:
            float32 `[sequences, V]`.
        """
        hidden, places = self._hidden(batch)
        last = [rows.stop - 1 for rows in places.rows]
        return self._predicted(hidden[last])

    def logits(self, cache: SequenceCache, tokens: Sequence[int], count: int) -> NDArray[np.float32]:
        """Logits of the token after each of the last `count` of a sequence's tokens, float32 `[count, V]`."""
        hidden, _ = self._hidden([(cache, tokens)])
        return self._predicted(hidden[len(hidden) - count :])

    def _predicted(self, hidden: Array) -> NDArray[np.float32]:
        # What is not finite is found in the logits.
        with np.errstate(over="ignore", invalid="ignore"):
            return self._head(self._norm(hidden))

    def _hidden(self, batch: Sequence[tuple[SequenceCache, Sequence[int]]]) -> tuple[Array, Places]:
        """The last layer's output for all tokens, and where they stand; extends the caches."""
        places = Places(self._config, [(cache.length, len(tokens)) for cache, tokens in batch])
        hidden = self._embed(np.concatenate([tokens for _, tokens in batch]))
        # A gate far below 0 overflows exp, and silu is then the right 0.
        with np.errstate(over="ignore", invalid="ignore"):
            for i, layer in enumerate(self._layers):
                hidden = layer(hidden, places, [cache.layers[i] for cache, _ in batch])
        for cache, tokens in batch:
            cache.length += len(tokens)
        return hidden, places

    def _embed(self, tokens: NDArray[np.integer]) -> Array:
        if self._embedding is not None:
            return self._embedding[tokens]
        return self._source.rows(f"{self._config.family.names.embedding}.weight", tokens)
