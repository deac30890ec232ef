"""A whole model in memory, computed in NumPy and oneDNN for a batch of sequences at a time.

PyNative MindSpore takes about a millisecond for an operator on a CPU, however small it is, and a token of a
small model takes a thousand of them. The layers are tested against the MindSpore cells.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.weights import FloatLinear, WeightSource
from msquant.inference.cpu.cpu_attention import CpuLatentAttention, GroupedQueryAttention, LayerCache, Places
from msquant.inference.cpu.cpu_delta_net import CpuDeltaNet
from msquant.inference.cpu.norm import CpuRMSNorm
from msquant.kernels.cpu_linear import Array, linear_layer
from msquant.models.config import ModelConfig, check_shape
from msquant.models.delta_rule import DeltaState
from msquant.models.reading import expert_sizes, read_linear, read_tensor
from msquant.models.routing import route, tokens_of


class CpuMLP:
    """`down(silu(gate(x)) * up(x))` (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, source: WeightSource, name: str) -> None:
        names = config.family.names
        linears = (read_linear(config, source, f"{name}.{part}") for part in names.feed_forward_inputs)
        self._gate_up = linear_layer(*linears)
        self._down = linear_layer(read_linear(config, source, f"{name}.{names.down}"))

    def __call__(self, x: Array) -> Array:
        """`[T, H]` to the same."""
        both = self._gate_up(x)
        half = both.shape[1] // 2
        gate, up = both[:, :half], both[:, half:]
        denominator = np.exp(-gate)
        denominator += 1
        gated = gate / denominator
        gated *= up
        return self._down(gated)


class CpuMoE:
    """The experts chosen for each token, by their weights, plus the shared ones; all are in memory."""

    def __init__(self, config: ModelConfig, source: WeightSource, name: str) -> None:
        self._config, self._sizes = config, expert_sizes(config)
        names = config.family.names
        router, experts = f"{name}.{names.router}", f"{name}.{names.experts}"
        self._router = read_tensor(config, source, f"{router}.weight").T
        self._bias: Array | None = None
        if config.family.correction_bias:
            self._bias = read_tensor(config, source, f"{router}.{names.correction_bias}")
        self._experts = [CpuMLP(config, source, f"{experts}.{i}") for i in range(self._sizes.count)]
        self._shared_gate: Array | None = None
        if config.family.shared_gate:
            self._shared_gate = read_tensor(config, source, f"{name}.{names.shared_gate}.weight").T
        shared = self._sizes.shared
        self._shared = CpuMLP(config, source, f"{name}.{names.shared_experts}") if shared else None

    def __call__(self, x: Array) -> Array:
        """`[T, H]` to the same."""
        ids, weights = route(self._config, self._sizes, x @ self._router, self._bias)
        total = np.zeros_like(x) if self._shared is None else self._shared(x)
        if self._shared_gate is not None:
            total /= 1 + np.exp(-(x @ self._shared_gate))
        for index in np.unique(ids).tolist():
            rows, weight = tokens_of(ids, weights, index)
            total[rows] += self._experts[index](x[rows]) * weight[:, None]
        return total


class CpuSequenceCache:
    """What one sequence leaves behind.

    Attributes:
        length: how many tokens it holds.
        layers: of each decoder layer, its keys and values, or its state where it mixes by the delta rule.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.length = 0
        kinds = map(config.delta_rule, range(config.num_hidden_layers))
        self.layers: list[Any] = [LayerCache() if delta is None else DeltaState(delta) for delta in kinds]


class CpuDecoderLayer:
    """One decoder layer; see `msquant.models.layers.DecoderLayer`."""

    def __init__(self, config: ModelConfig, source: WeightSource, index: int) -> None:
        name, names = config.family.layer_name(index), config.family.names
        self._input_norm = CpuRMSNorm.read(config, source, f"{name}.{names.input_norm}")
        mixer = f"{name}.{config.mixer(index)}"
        self._mixer: Callable[[Array, Places, Sequence[Any]], Array]
        if (delta := config.delta_rule(index)) is not None:
            self._mixer = CpuDeltaNet(config, delta, source, mixer)
        elif config.latent is None:
            self._mixer = GroupedQueryAttention(config, source, mixer)
        else:
            self._mixer = CpuLatentAttention(config, config.latent, source, mixer)
        self._norm = CpuRMSNorm.read(config, source, f"{name}.{names.feed_forward_norm}")
        self._output_norms = [
            None if norm is None else CpuRMSNorm.read(config, source, f"{name}.{norm}")
            for norm in (names.attention_output_norm, names.feed_forward_output_norm)
        ]
        block = CpuMoE if config.has_experts(index) else CpuMLP
        self._mlp = block(config, source, f"{name}.{names.feed_forward}")

    def __call__(self, hidden: Array, places: Places, caches: Sequence[Any]) -> Array:
        """`[T, H]` to the same."""
        mixer_norm, mlp_norm = self._output_norms
        output = self._mixer(self._input_norm(hidden), places, caches)
        hidden = hidden + (output if mixer_norm is None else mixer_norm(output))
        output = self._mlp(self._norm(hidden))
        hidden += output if mlp_norm is None else mlp_norm(output)
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
        self._layers = [CpuDecoderLayer(config, source, i) for i in range(config.num_hidden_layers)]
        names, tied = config.family.names, config.tie_word_embeddings
        self._norm = CpuRMSNorm.read(config, source, names.final_norm)
        table = read_tensor(config, source, f"{names.embedding if tied else names.head}.weight")
        self._embedding = table if tied else None
        if not tied:
            row = source.rows(f"{names.embedding}.weight", np.zeros(1, np.int64))
            check_shape(config, f"{names.embedding}.weight", (config.vocab_size, *row.shape[1:]))
        self._head = linear_layer(FloatLinear(table))

    def new_cache(self) -> CpuSequenceCache:
        """The empty cache of a sequence."""
        return CpuSequenceCache(self._config)

    def next_logits(self, batch: Sequence[tuple[CpuSequenceCache, Sequence[int]]]) -> NDArray[np.float32]:
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

    def logits(self, cache: CpuSequenceCache, tokens: Sequence[int], count: int) -> NDArray[np.float32]:
        """Logits of the token after each of the last `count` of a sequence's tokens, float32 `[count, V]`."""
        hidden, _ = self._hidden([(cache, tokens)])
        return self._predicted(hidden[len(hidden) - count :])

    def _predicted(self, hidden: Array) -> NDArray[np.float32]:
        # What is not finite is found in the logits.
        with np.errstate(over="ignore", invalid="ignore"):
            return self._head(self._norm(hidden))

    def _hidden(self, batch: Sequence[tuple[CpuSequenceCache, Sequence[int]]]) -> tuple[Array, Places]:
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
