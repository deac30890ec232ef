"""What an evaluation runs: models and texts, and whether they go together."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.weights import WeightSource
from msquant.errors import CalibrationError, ModelError
from msquant.models.config import ModelConfig
from msquant.models.rotation import Rotation

# What two models must have in common to go through the same tokens side by side.
_ALIKE = (
    *("family", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "rms_norm_eps", "latent", "experts"),
    "delta",
)


@dataclass(frozen=True)
class Model:
    """A model to evaluate.

    Attributes:
        name: what errors call it.
        config: its shape.
        source: its weights.
        rotation: that its residual stream is in; None where it is not rotated.
    """

    name: str
    config: ModelConfig
    source: WeightSource
    rotation: Rotation | None = None


@dataclass(frozen=True)
class Text:
    """Tokens to evaluate on.

    Attributes:
        name: of the text.
        tokens: int32 `[S, T]`, S sequences of T tokens; a sequence sees nothing of the others.
    """

    name: str
    tokens: NDArray[np.int32]


def check_alike(baseline: Model, other: Model) -> None:
    """Check that two models can go through the same tokens side by side.

    Raises:
        ModelError: their architectures differ; names the first value that does.
    """
    for name in _ALIKE:
        expected, found = getattr(baseline.config, name), getattr(other.config, name)
        if name == "family":
            expected, found = expected.model_type, found.model_type
        if expected != found:
            raise ModelError(
                f"{name} is {found}, but {expected} in {baseline.name}",
                where=other.name,
                remedy="only models of one architecture can be compared: "
                "name the float model that this one was quantized from with --baseline",
            )


def check_tokens(config: ModelConfig, text: Text) -> None:
    """Check that a model can compute a text.

    Raises:
        CalibrationError: there is no sequence, it is too short or too long, or it holds an id that is no
            token.
    """
    tokens, remedy = text.tokens, "give sequences of at least 2 tokens, made with this model's own tokenizer"
    if tokens.ndim != 2 or len(tokens) < 1 or tokens.shape[1] < 2:
        raise CalibrationError(
            f"tokens to evaluate on have shape {list(tokens.shape)}, [sequences, at least 2] is needed",
            where=text.name,
            remedy=remedy,
        )
    entry, longest = config.longest_by
    if tokens.shape[1] > longest:
        raise CalibrationError(
            f"sequences of {tokens.shape[1]} tokens are longer than what is computed of the model "
            f"({entry} = {longest})",
            where=text.name,
            remedy="use shorter sequences",
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= config.vocab_size:
        bad = low if low < 0 else high
        raise CalibrationError(
            f"token id {bad} is outside the model's vocabulary of {config.vocab_size}",
            where=text.name,
            remedy=remedy,
        )


def require_alike(models: Sequence[Model], texts: Sequence[Text]) -> None:
    """Check that all models go through the texts side by side. Raises as `check_alike`, `check_tokens`."""
    for model in models[1:]:
        check_alike(models[0], model)
    for text in texts:
        check_tokens(models[0].config, text)
