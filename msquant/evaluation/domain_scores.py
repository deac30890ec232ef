"""What an evaluation finds out about a model: by text, and by decoder layer."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msquant.errors import MsquantError
from msquant.evaluation.distributions import Distributions, Divergence

_DIGITS = 6


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts a text, and how far its predictions are from the baseline's.

    Attributes:
        text: the text's name.
        tokens: how many.
        perplexity: the exponential of the mean negative log-likelihood of every next token, over `T - 1`
            tokens of each sequence.
        baseline_perplexity: of the baseline; this and what follows are None without one.
        kl: KL(baseline || model) of the next-token distributions in nats, a mean over the tokens.
        top1: the part of the tokens after which both find the same token most likely.
        top5: the part of the baseline's five most likely tokens that the model has among its five.
        logit_error: `sum((model - baseline)^2) / sum(baseline^2)` of the logits.
    """

    text: str
    tokens: int
    perplexity: float
    baseline_perplexity: float | None = None
    kl: float | None = None
    top1: float | None = None
    top5: float | None = None
    logit_error: float | None = None


@dataclass(frozen=True)
class LayerScore:
    """Signal-to-noise of a decoder layer's output, in dB: `-10 log10(mean of |model - y|^2 / |y|^2)`.

    The mean is over tokens and y is the layer's output in the baseline, that is the residual stream. None is
    no noise at all.

    Attributes:
        index: of the layer.
        snr: with the inputs that the quantized layers before it make.
        own_snr: with the baseline's inputs: the layer's own share. Measured on the first sequences of every
            text.
    """

    index: int
    snr: float | None
    own_snr: float | None


@dataclass(frozen=True)
class ModelScore:
    """One model's scores.

    Attributes:
        texts: one each text.
        overall: all texts together, every token counting the same.
        layers: one each decoder layer; empty without a baseline.
        next_tokens: what it finds most likely after each token, one array a text in the shape of its tokens
            `[S, T]`.
    """

    texts: tuple[TextScore, ...]
    overall: TextScore
    layers: tuple[LayerScore, ...] = ()
    next_tokens: tuple[NDArray[np.integer], ...] = field(default=(), repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, in six significant digits, without the next tokens."""
        value: dict[str, Any] = _rounded(asdict(replace(self, next_tokens=())))
        del value["next_tokens"]
        return value


def text_score(
    name: str,
    rows: slice,
    found: Distributions,
    reference: Distributions | None,
    divergence: Divergence | None,
    where: str,
) -> TextScore:
    """Sum up the tokens `rows`; `where` is what errors call the model.

    Raises:
        MsquantError: the model computed NaN or infinity, or its perplexity is beyond float64.
    """
    tokens = rows.stop - rows.start
    perplexity = _perplexity(found, rows, where)
    if reference is None or divergence is None:
        return TextScore(name, tokens, perplexity)
    wrong, power = (float(squares[rows].sum()) for squares in divergence.squares)
    return TextScore(
        name,
        tokens,
        perplexity,
        baseline_perplexity=_perplexity(reference, rows, where),
        kl=float(divergence.kl[rows].mean()),
        top1=float(divergence.same_best[rows].mean()),
        top5=float(divergence.shared_best[rows].mean()),
        logit_error=wrong / power if power else 0.0,
    )


def _perplexity(found: Distributions, rows: slice, where: str) -> float:
    known = found.known[rows]
    with np.errstate(over="ignore", invalid="ignore"):
        result = float(np.exp(found.losses[rows].sum() / np.count_nonzero(known)))
    if not math.isfinite(result):
        raise MsquantError(
            "the model computed NaN or infinity",
            where=where,
            remedy="check the checkpoint with `msquant inspect`",
        )
    return result


class Noise:
    """A running mean of the relative squared error of tokens."""

    def __init__(self) -> None:
        self._sum, self._tokens = 0.0, 0

    def add(self, expected: NDArray[np.float32], found: NDArray[np.float32]) -> None:
        """Take some tokens, `[..., H]` both."""
        axis = expected.ndim - 1
        square = np.square(expected).sum(axis=axis, dtype=np.float64)
        wrong = np.square(found - expected).sum(axis=axis, dtype=np.float64)
        self._sum += float(np.divide(wrong, square, out=np.zeros_like(square), where=square > 0).sum())
        self._tokens += square.size

    @property
    def decibels(self) -> float | None:
        """Signal-to-noise in dB; None where there is no noise."""
        return -10 * math.log10(self._sum / self._tokens) if self._sum else None


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_rounded(item) for item in value]
    return value
