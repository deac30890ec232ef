"""Perplexity, one decoder layer in memory at a time."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.weights import WeightSource
from msquant.errors import CalibrationError, MsquantError
from msquant.models.config import ModelConfig

# Tokens that go through a decoder layer together, and rows that have their logits in memory together.
LAYER_TOKENS = 2048
HEAD_ROWS = 128


def perplexity(
    config: ModelConfig,
    source: WeightSource,
    tokens: NDArray[np.int32],
    dtype: Any,
    on_layer: Callable[[int, int], None] | None = None,
) -> float:
    """The exponential of the mean negative log-likelihood of every next token, given those before it.

    The mean is over `T - 1` tokens of each sequence, in float64; a sequence sees nothing of the others.

    Args:
        config: the model's shape.
        source: its weights; each decoder layer's are read once and let go.
        tokens: `[S, T]`, S sequences of T token ids, T at least 2.
        dtype: compute dtype, as `use_device` returned it.
        on_layer: called with the number of decoder layers done and their total.

    Raises:
        CalibrationError: there is no sequence, it is too short, or it holds an id that is no token.
        CheckpointError: a weight is missing, damaged or does not fit the config.
        MsquantError: the model computed NaN or infinity.
    """
    _check_tokens(config, tokens)
    from msquant.models.layers import DecoderLayer, positions
    from msquant.models.network import Embedding, Head

    length = tokens.shape[1]
    step = max(1, LAYER_TOKENS // length)
    embedding = Embedding(config, source, dtype)
    batches = [embedding(tokens[i : i + step]) for i in range(0, len(tokens), step)]
    del embedding
    places = positions(config, length, dtype)
    for i in range(config.num_hidden_layers):
        layer = DecoderLayer(config, source, config.family.layer_name(i), dtype)
        for j, hidden in enumerate(batches):
            batches[j] = layer(hidden, places)
        del layer
        if on_layer is not None:
            on_layer(i + 1, config.num_hidden_layers)
    head = Head(config, source, dtype)
    total = 0.0
    for j, hidden in enumerate(batches):
        targets = tokens[j * step : (j + 1) * step, 1:].reshape(-1)
        rows = hidden[:, :-1].reshape(-1, config.hidden_size)
        for i in range(0, len(targets), HEAD_ROWS):
            logits = head(rows[i : i + HEAD_ROWS]).asnumpy()
            total += negative_log_likelihood(logits, targets[i : i + HEAD_ROWS])
    with np.errstate(over="ignore"):
        result = float(np.exp(total / (len(tokens) * (length - 1))))
    if not math.isfinite(result):
        raise MsquantError(
            "the model computed NaN or infinity", remedy="check the checkpoint with `msquant inspect`"
        )
    return result


def negative_log_likelihood(logits: NDArray[np.float32], targets: NDArray[np.integer]) -> float:
    """The sum over rows of `logsumexp(logits) - logits[target]`, natural logarithm, in float64.

    Args:
        logits: `[R, V]`.
        targets: `[R]`, the token that came next.
    """
    wide = logits.astype(np.float64)
    chosen = wide[np.arange(len(targets)), targets]
    top = wide.max(axis=1)
    # Infinite logits become NaN, which the caller reports.
    with np.errstate(invalid="ignore"):
        np.exp(wide - top[:, None], out=wide)
        return float((top + np.log(wide.sum(axis=1)) - chosen).sum())


def _check_tokens(config: ModelConfig, tokens: NDArray[np.int32]) -> None:
    remedy = "give sequences of at least 2 tokens, made with this model's own tokenizer"
    if tokens.ndim != 2 or len(tokens) < 1 or tokens.shape[1] < 2:
        raise CalibrationError(
            f"tokens to evaluate on have shape {list(tokens.shape)}, [sequences, at least 2] is needed",
            remedy=remedy,
        )
    if tokens.shape[1] > config.max_position_embeddings:
        raise CalibrationError(
            f"sequences of {tokens.shape[1]} tokens are longer than the model takes "
            f"({config.max_position_embeddings})",
            remedy="use shorter sequences",
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= config.vocab_size:
        bad = low if low < 0 else high
        raise CalibrationError(
            f"token id {bad} is outside the model's vocabulary of {config.vocab_size}", remedy=remedy
        )
