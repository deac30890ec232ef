"""KL of what several final hidden states predict, all through the same output head."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from mindspore import Tensor
from numpy.typing import NDArray

from msquant.checkpoint.weights import WeightSource
from msquant.evaluation.distributions import Distributions, Divergence
from msquant.evaluation.lockstep import LOGIT_ROWS, vocabulary_blocks
from msquant.interrupts import check_interrupt
from msquant.models.config import ModelConfig
from msquant.models.network import Head


def branch_divergences(
    config: ModelConfig, source: WeightSource, states: Sequence[NDArray[np.float32]], dtype: Any
) -> NDArray[np.float64]:
    """KL of the next-token distributions of every branch from those of the first.

    Args:
        config: the model's shape.
        source: its weights, of which the norm and the head behind the last layer are read.
        states: the outputs of the last decoder layer `[D, T, H]`, a branch each; the first is the float
            model's.
        dtype: compute dtype, as `use_device` returned it.

    Returns:
        float64 `[branches - 1, D]`: in nats, means over the T tokens of each of the D texts.
    """
    texts, tokens = states[0].shape[:2]
    count = texts * tokens
    unknown = np.full(count, -1)
    found = [Distributions(unknown) for _ in states]
    apart = [Divergence(found[0], other) for other in found[1:]]
    for block in vocabulary_blocks(config):
        head = Head(config, source, dtype, block)
        for start in range(0, count, LOGIT_ROWS):
            check_interrupt()
            rows = slice(start, min(start + LOGIT_ROWS, count))
            logits = (
                head(Tensor(state.reshape(count, -1)[rows], dtype)).asnumpy().astype(np.float32, copy=False)
                for state in states
            )
            expected = found[0].add(rows, block.start, next(logits))
            for other, divergence, values in zip(found[1:], apart, logits, strict=True):
                divergence.add(rows, expected, other.add(rows, block.start, values))
    return np.array([each.kl.reshape(texts, tokens).mean(axis=1) for each in apart])
