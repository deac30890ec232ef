"""The feed-forward blocks in NumPy: gated, and a mixture of experts."""

import numpy as np

from msquant.checkpoint.weights import WeightSource
from msquant.inference.cpu.linear import Array, linear_layer
from msquant.models.config import ModelConfig
from msquant.models.reading import expert_sizes, read_linear, read_tensor
from msquant.models.routing import route, tokens_of


class MLP:
    """`down(silu(gate(x)) * up(x))` (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, source: WeightSource, name: str) -> None:
        names = config.family.names
        linears = (read_linear(config, source, f"{name}.{part}") for part in (names.gate, names.up))
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


class MoE:
    """The experts chosen for each token, by their weights, plus the shared ones; all are in memory."""

    def __init__(self, config: ModelConfig, source: WeightSource, name: str) -> None:
        self._config, self._sizes = config, expert_sizes(config)
        names = config.family.names
        router, experts = f"{name}.{names.router}", f"{name}.{names.experts}"
        self._router = read_tensor(config, source, f"{router}.weight").T
        self._bias: Array | None = None
        if config.family.correction_bias:
            self._bias = read_tensor(config, source, f"{router}.{names.correction_bias}")
        self._experts = [MLP(config, source, f"{experts}.{i}") for i in range(self._sizes.count)]
        shared = self._sizes.shared
        self._shared = MLP(config, source, f"{name}.{names.shared_experts}") if shared else None

    def __call__(self, x: Array) -> Array:
        """`[T, H]` to the same."""
        ids, weights = route(self._config, self._sizes, x @ self._router, self._bias)
        total = np.zeros_like(x) if self._shared is None else self._shared(x)
        for index in np.unique(ids).tolist():
            rows, weight = tokens_of(ids, weights, index)
            total[rows] += self._experts[index](x[rows]) * weight[:, None]
        return total
