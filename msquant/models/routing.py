"""Which experts compute a token, and with what weight, from the router's logits."""

import numpy as np
from numpy.typing import NDArray

from msquant.families.base import ExpertSizes
from msquant.models.config import ModelConfig

Ids = NDArray[np.int32]
Weights = NDArray[np.float32]


def route(
    config: ModelConfig, sizes: ExpertSizes, logits: Weights, bias: Weights | None
) -> tuple[Ids, Weights]:
    """Choose the experts of each token, as the servers do.

    Args:
        config: the model's shape; its family says how scores are made of logits.
        sizes: how many experts are chosen, and how.
        logits: of the router, float32 `[T, experts]`.
        bias: the correction added to the scores for the choice only, float32 `[experts]`, or None.

    Returns:
        The chosen experts and their weights, int32 and float32 `[T, experts a token]`.
    """
    scores = _scores(config, logits, None)
    ids = choose(scores if bias is None else scores + bias, sizes)
    weights = np.take_along_axis(scores, ids, axis=1)
    if sizes.normalize:
        weights = weights / (weights.sum(axis=1, keepdims=True) + np.float32(1e-20))
    return ids.astype(np.int32), weights * np.float32(sizes.scaling_factor)


def choose(scores: Weights, sizes: ExpertSizes) -> NDArray[np.intp]:
    """The experts with the highest scores among those of the best groups, `[T, per_token]`, best first.

    A group is worth the sum of its `group_score` best. Experts of other groups are never chosen, as in
    DeepSeek's own code (`inference/model.py`) and in the servers'; transformers counts them as 0, and so
    takes them before experts whose score is negative. Of equal scores the lower number wins.

    Args:
        scores: `[T, experts]`.
        sizes: how many, and how they are grouped.
    """
    if sizes.groups > 1:
        grouped = scores.reshape(len(scores), sizes.groups, -1)
        worth = np.sort(grouped, axis=2)[:, :, -sizes.group_score :].sum(axis=2)
        kept = np.zeros(worth.shape, dtype=bool)
        np.put_along_axis(kept, _top(worth, sizes.groups_per_token), True, axis=1)
        scores = np.where(kept[:, :, None], grouped, np.float32(-np.inf)).reshape(scores.shape)
    return _top(scores, sizes.per_token)


def margins(config: ModelConfig, logits: Weights, bias: Weights | None, ids: Ids) -> NDArray[np.float32]:
    """How near each expert was to being chosen, `[T, experts]`: its score less the lowest one chosen.

    Groups are not looked at: an expert of a group that was left out may lie above 0.

    Args:
        config: the model's shape.
        logits: of the router, float32 `[T, experts]`.
        bias: as for `route`.
        ids: the chosen ones, int32 `[T, k]`.
    """
    scores = _scores(config, logits, bias)
    return scores - np.take_along_axis(scores, ids, axis=1).min(axis=1, keepdims=True)


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


def _scores(config: ModelConfig, logits: Weights, bias: Weights | None) -> Weights:
    scores = _softmax(logits) if config.family.router == "softmax" else _sigmoid(logits)
    return scores if bias is None else scores + bias


def _top(scores: Weights, count: int) -> NDArray[np.intp]:
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


def _softmax(logits: Weights) -> Weights:
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)


def _sigmoid(logits: Weights) -> Weights:
    # exp of a large number is infinite, and its inverse then the right answer.
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-logits))
