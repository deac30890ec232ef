"""A mixture of experts: the router that chooses for each token, and the block that computes the choice."""

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from msquant.checkpoint.weights import WeightSource
from msquant.models.cells import StoredMatrix
from msquant.models.config import ModelConfig
from msquant.models.feed_forward import MLP
from msquant.models.reading import expert_sizes, read_tensor
from msquant.models.routing import Ids, Weights, margins, route, tokens_of


class Router(nn.Cell):
    """Chooses the experts of each token, as transformers 4.57.1 does for these families, in float32.

    Args:
        config: the model's shape.
        source: its weights.
        name: of the router, for example `model.layers.3.mlp.gate`.
        dtype: compute dtype of the model; the router itself is always in float32.

    Raises:
        CheckpointError: a tensor is missing or damaged, or does not fit the config.
        ModelError: the model has no experts.
    """

    def __init__(self, config: ModelConfig, source: WeightSource, name: str, dtype: Any) -> None:
        super().__init__()
        self.config, self.sizes = config, expert_sizes(config)
        self.weight = Parameter(Tensor(read_tensor(config, source, f"{name}.weight"), ms.float32))
        self._bias = config.family.names.correction_bias
        setattr(self, self._bias, None)
        if config.family.correction_bias:
            bias = read_tensor(config, source, f"{name}.{self._bias}")
            setattr(self, self._bias, Parameter(Tensor(bias, ms.float32)))
        self.matmul = ops.MatMul(transpose_b=True)

    def construct(self, x: Tensor) -> tuple[Ids, Weights]:
        """`[T, H]` to the chosen experts and their weights, int32 and float32 `[T, experts a token]`."""
        return route(self.config, self.sizes, self._logits(x), self._correction())

    def route(self, x: Tensor) -> tuple[Ids, Weights]:
        """The same as calling it."""
        return self(x)

    def margins(self, x: Tensor) -> Weights:
        """How near each expert is to each token, `[T, experts]`, -infinity for those that it goes to."""
        logits, bias = self._logits(x), self._correction()
        ids, _ = route(self.config, self.sizes, logits, bias)
        near = margins(self.config, logits, bias, ids)
        np.put_along_axis(near, ids, np.float32(-np.inf), axis=1)
        return near

    def _logits(self, x: Tensor) -> Weights:
        logits: Weights = self.matmul(x.astype(ms.float32), self.weight).asnumpy()
        return logits

    def _correction(self) -> Weights | None:
        bias = getattr(self, self._bias)
        return None if bias is None else bias.asnumpy()


class SharedGate(StoredMatrix):
    """Weighs the shared expert's output of each token by a sigmoid."""

    def construct(self, x: Tensor) -> Weights:
        """`[T, H]` to the factors, float32 `[T, 1]`."""
        factors: Weights = ops.sigmoid(super().construct(x)).asnumpy()
        return factors


class MoE(nn.Cell):
    """The feed-forward block of a layer with experts: those chosen, by their weights, plus the shared ones.

    Args:
        config: the model's shape.
        source: its weights.
        name: of the block, for example `model.layers.3.mlp`.
        dtype: compute dtype.
        resident: keep all experts in memory; otherwise each is read when tokens go to it, and let go.

    Raises:
        CheckpointError: a weight is missing or damaged, or does not fit the config.
        ModelError: the model has no experts.
    """

    def __init__(
        self, config: ModelConfig, source: WeightSource, name: str, dtype: Any, resident: bool
    ) -> None:
        super().__init__()
        sizes, names = expert_sizes(config), config.family.names
        self.dtype, self.count = dtype, sizes.count
        self.names = names
        setattr(self, names.router, Router(config, source, f"{name}.{names.router}", dtype))
        setattr(self, names.shared_experts, None)
        if sizes.shared:
            shared = MLP(config, source, f"{name}.{names.shared_experts}", dtype)
            setattr(self, names.shared_experts, shared)
        setattr(self, names.shared_gate, None)
        if config.family.shared_gate:
            setattr(self, names.shared_gate, SharedGate(config, source, f"{name}.{names.shared_gate}"))
        self._load = lambda expert: MLP(config, source, f"{name}.{names.experts}.{expert}", dtype)
        experts = nn.CellList([self._load(i) for i in range(self.count)]) if resident else None
        setattr(self, names.experts, experts)

    def expert(self, index: int) -> MLP:
        """The expert of that number, read anew unless all are resident."""
        experts = getattr(self, self.names.experts)
        return self._load(index) if experts is None else experts[index]

    def construct(self, x: Tensor) -> Tensor:
        """`[T, H]` to the same."""
        ids, weights = getattr(self, self.names.router)(x)
        # Gathering and adding rows on the host: on a CPU far faster than with operators.
        rows_in = x.astype(ms.float32).asnumpy()
        total = np.zeros(rows_in.shape, np.float32)
        for index in np.unique(ids).tolist():
            rows, weight = tokens_of(ids, weights, index)
            answer = self.expert(index)(Tensor(rows_in[rows], self.dtype))
            total[rows] += answer.astype(ms.float32).asnumpy() * weight[:, None]
        mixed = Tensor(total, self.dtype)
        shared, gate = (getattr(self, part) for part in (self.names.shared_experts, self.names.shared_gate))
        if shared is None:
            return mixed
        return mixed + (shared(x) if gate is None else shared(x) * Tensor(gate(x), self.dtype))
