"""A mixture of experts: the router that chooses for each token, and the block that computes the choice."""

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from numpy.typing import NDArray

from msquant.checkpoint.weights import WeightSource
from msquant.errors import ModelError
from msquant.models.config import ExpertSizes, ModelConfig, check_shape
from msquant.models.feed_forward import MLP

Ids = NDArray[np.int32]
Weights = NDArray[np.float32]


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
        self.sizes = _sizes(config)
        self.kind = config.family.router
        self.weight = Parameter(Tensor(_tensor(config, source, f"{name}.weight"), ms.float32))
        self.e_score_correction_bias: Parameter | None = None
        if config.family.correction_bias:
            bias = _tensor(config, source, f"{name}.e_score_correction_bias")
            self.e_score_correction_bias = Parameter(Tensor(bias, ms.float32))
        self.matmul = ops.MatMul(transpose_b=True)

    def construct(self, x: Tensor) -> tuple[Ids, Weights]:
        """`[T, H]` to the chosen experts and their weights, int32 and float32 `[T, experts a token]`."""
        logits = self.matmul(x.astype(ms.float32), self.weight).asnumpy()
        scores = _softmax(logits) if self.kind == "softmax" else _sigmoid(logits)
        ranked = scores
        if self.e_score_correction_bias is not None:
            ranked = scores + self.e_score_correction_bias.asnumpy()
        ids = choose(ranked, self.sizes)
        weights = np.take_along_axis(scores, ids, axis=1)
        if self.sizes.normalize:
            weights = weights / (weights.sum(axis=1, keepdims=True) + np.float32(1e-20))
        return ids.astype(np.int32), weights * np.float32(self.sizes.scaling_factor)

    def route(self, x: Tensor) -> tuple[Ids, Weights]:
        """The same as calling it."""
        return self(x)


def choose(scores: Weights, sizes: ExpertSizes) -> NDArray[np.intp]:
    """The experts with the highest scores among those of the best groups, `[T, per_token]`, best first.

    A group is worth the sum of its `group_score` best. Experts of other groups count as 0, so with negative
    scores they may be chosen still, as in transformers. Of equal scores the lower number wins.

    Args:
        scores: `[T, experts]`.
        sizes: how many, and how they are grouped.
    """
    if sizes.groups > 1:
        grouped = scores.reshape(len(scores), sizes.groups, -1)
        worth = np.sort(grouped, axis=2)[:, :, -sizes.group_score :].sum(axis=2)
        kept = np.zeros(worth.shape, dtype=bool)
        np.put_along_axis(kept, _top(worth, sizes.groups_per_token), True, axis=1)
        scores = np.where(kept[:, :, None], grouped, np.float32(0)).reshape(scores.shape)
    return _top(scores, sizes.per_token)


def tokens_of(ids: Ids, weights: Weights, expert: int) -> tuple[NDArray[np.int64], Weights]:
    """The tokens that go to an expert, in ascending order, and its weight in each.

    Args:
        ids: int32 `[T, k]`, as `Router` returns them.
        weights: float32 `[T, k]`.
        expert: its number.

    Returns:
        Rows, int64 `[n]`, and weights, float32 `[n]`.
    """
    rows, places = np.nonzero(ids == expert)
    return rows, weights[rows, places]


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
        sizes = _sizes(config)
        self.dtype, self.count = dtype, sizes.count
        self.gate = Router(config, source, f"{name}.gate", dtype)
        self.shared_experts: MLP | None = None
        if sizes.shared:
            self.shared_experts = MLP(config, source, f"{name}.shared_experts", dtype)
        self._load = lambda expert: MLP(config, source, f"{name}.experts.{expert}", dtype)
        self.experts = nn.CellList([self._load(i) for i in range(self.count)]) if resident else None

    def expert(self, index: int) -> MLP:
        """The expert of that number, read anew unless all are resident."""
        return self._load(index) if self.experts is None else self.experts[index]

    def construct(self, x: Tensor) -> Tensor:
        """`[T, H]` to the same."""
        ids, weights = self.gate(x)
        # Gathering and adding rows on the host: on a CPU far faster than with operators.
        rows_in = x.astype(ms.float32).asnumpy()
        total = np.zeros(rows_in.shape, np.float32)
        for index in np.unique(ids).tolist():
            rows, weight = tokens_of(ids, weights, index)
            answer = self.expert(index)(Tensor(rows_in[rows], self.dtype))
            total[rows] += answer.astype(ms.float32).asnumpy() * weight[:, None]
        mixed = Tensor(total, self.dtype)
        return mixed if self.shared_experts is None else mixed + self.shared_experts(x)


def _sizes(config: ModelConfig) -> ExpertSizes:
    if config.experts is None:
        raise ModelError(f"a model of type {config.family.model_type} has no experts")
    return config.experts


def _tensor(config: ModelConfig, source: WeightSource, name: str) -> NDArray[np.float32]:
    tensor = source.tensor(name)
    check_shape(config, name, tensor.shape)
    return tensor


def _top(scores: Weights, count: int) -> NDArray[np.intp]:
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


def _softmax(logits: Weights) -> Weights:
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)


def _sigmoid(logits: Weights) -> Weights:
    # exp of a large number is infinite, and its inverse then the right answer.
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-logits))
