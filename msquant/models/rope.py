"""Rotary position embedding and its scaling variants (RoFormer, arXiv 2104.09864).

The variants follow transformers 4.57.1, `modeling_rope_utils.py`, which is the reference of their tests.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from msquant.errors import ModelError

if TYPE_CHECKING:
    from msquant.families.base import LatentSizes
    from msquant.models.config import ModelConfig

Frequencies = tuple[NDArray[np.float32], float]


def rotary_tables(
    config: "ModelConfig", start: int, length: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosine and sine of every position's angles.

    Args:
        config: gives the rotated channels, the base and the scaling variant.
        start: position of the first token.
        length: number of tokens.

    Returns:
        Two float32 arrays `[length, rotary_dim]`; the second half of each row repeats the first.

    Raises:
        ModelError: the scaling variant is unknown or lacks a parameter.
    """
    frequencies, attention_factor = _frequencies(config, start + length)
    positions = np.arange(start, start + length, dtype=np.float32)
    angles = np.outer(positions, frequencies)
    angles = np.concatenate([angles, angles], axis=1)
    factor = np.float32(attention_factor)
    return np.cos(angles) * factor, np.sin(angles) * factor


def softmax_scale(config: "ModelConfig", sizes: "LatentSizes") -> float:
    """The factor of attention scores: `qk_head_dim ** -0.5`, corrected where YaRN stretches positions.

    The correction `(0.1 mscale_all_dim ln(factor) + 1) ** 2` is DeepSeek's (`modeling_deepseek.py` of V2 and
    V3). transformers 4.57.1 makes it for V3 only.
    """
    scale = sizes.qk_head_dim**-0.5
    weight, factor = config.rope_scaling.get("mscale_all_dim"), config.rope_scaling.get("factor", 1.0)
    if weight and factor > 1:
        scale *= (0.1 * weight * math.log(factor) + 1) ** 2
    return scale


def _frequencies(config: "ModelConfig", sequence_length: int) -> Frequencies:
    """Inverse frequencies `[rotary_dim / 2]` and the factor on cosine and sine."""
    scaling = config.rope_scaling
    variant = scaling.get("rope_type") or scaling.get("type") or "default"
    compute = _VARIANTS.get(variant)
    if compute is None:
        raise ModelError(
            f"rope_scaling type {variant!r} is not supported",
            where="config.json",
            remedy=f"supported types: {', '.join(_VARIANTS)}",
        )
    try:
        return compute(config, sequence_length)
    except KeyError as error:
        raise ModelError(f"rope_scaling of type {variant!r} lacks {error}", where="config.json") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"rope_scaling {scaling} is not valid: {error}", where="config.json") from error


def _powers(config: "ModelConfig", base: float) -> NDArray[np.float32]:
    exponents = np.arange(0, config.rotary_dim, 2, dtype=np.float32) / np.float32(config.rotary_dim)
    return np.power(np.float32(base), exponents, dtype=np.float32)


def _default(config: "ModelConfig", sequence_length: int) -> Frequencies:
    return 1 / _powers(config, config.rope_theta), 1.0


def _linear(config: "ModelConfig", sequence_length: int) -> Frequencies:
    return 1 / _powers(config, config.rope_theta) / np.float32(config.rope_scaling["factor"]), 1.0


def _dynamic(config: "ModelConfig", sequence_length: int) -> Frequencies:
    """NTK-aware scaling: the base grows once the sequence is longer than the model was trained for."""
    factor, trained = config.rope_scaling["factor"], config.max_position_embeddings
    stretch = factor * max(sequence_length, trained) / trained - (factor - 1)
    base = config.rope_theta * stretch ** (config.rotary_dim / (config.rotary_dim - 2))
    return 1 / _powers(config, base), 1.0


def _yarn(config: "ModelConfig", sequence_length: int) -> Frequencies:
    """YaRN (arXiv 2309.00071): interpolate slow frequencies, keep fast ones, ramp between."""
    scaling = config.rope_scaling
    factor, dim = scaling["factor"], config.rotary_dim
    trained = scaling.get("original_max_position_embeddings") or config.max_position_embeddings

    def dimension_of(rotations: float) -> float:
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = dimension_of(scaling.get("beta_fast") or 32)
    high = dimension_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = high - low or 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(span), 0, 1)
    plain = 1 / _powers(config, config.rope_theta)
    return plain / np.float32(factor) * ramp + plain * (1 - ramp), _yarn_attention_factor(config)


def _yarn_attention_factor(config: "ModelConfig") -> float:
    scaling = config.rope_scaling

    def magnitude(weight: float) -> float:
        return 1.0 if scaling["factor"] <= 1 else 0.1 * weight * math.log(scaling["factor"]) + 1.0

    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return magnitude(scaling["mscale"]) / magnitude(scaling["mscale_all_dim"])
    return magnitude(1)


def _llama3(config: "ModelConfig", sequence_length: int) -> Frequencies:
    """Llama 3.1: divide slow frequencies by the factor, keep fast ones, blend between."""
    scaling = config.rope_scaling
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    trained = scaling["original_max_position_embeddings"]
    plain = 1 / _powers(config, config.rope_theta)
    wavelength = np.float32(2 * math.pi) / plain
    blend = np.clip((np.float32(trained) / wavelength - np.float32(low)) / np.float32(high - low), 0, 1)
    return (1 - blend) * plain / np.float32(scaling["factor"]) + blend * plain, 1.0


_VARIANTS: dict[str, Callable[["ModelConfig", int], Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
}
