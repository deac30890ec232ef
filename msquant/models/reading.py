"""What a model is built from: read from a source, and checked against `config.json`."""

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.weights import Linear, WeightSource
from msquant.errors import CheckpointError, ModelError
from msquant.families.base import ExpertSizes
from msquant.models.config import ModelConfig, check_shape


def read_tensor(config: ModelConfig, source: WeightSource, name: str) -> NDArray[np.float32]:
    """Read a floating-point tensor.

    Raises:
        CheckpointError: it is missing or damaged, or its shape is not that of the config.
    """
    tensor = source.tensor(name)
    check_shape(config, name, tensor.shape)
    return tensor


def read_norm(config: ModelConfig, source: WeightSource, name: str) -> NDArray[np.float32]:
    """What the norm called `name` multiplies by, which may be more than the weight it is stored as.

    Raises:
        CheckpointError: as `read_tensor`.
    """
    weight = read_tensor(config, source, f"{name}.weight")
    offset = np.float32(config.family.norm_offset(name))
    return weight + offset if offset else weight


def stored_norm(config: ModelConfig, name: str, factors: NDArray[np.float32]) -> NDArray[np.float32]:
    """The weight that a norm is stored as, by what it multiplies by; the inverse of `read_norm`."""
    offset = np.float32(config.family.norm_offset(name))
    return factors - offset if offset else factors


def read_linear(config: ModelConfig, source: WeightSource, name: str) -> Linear:
    """Read the linear layer called `name`, in floating point or in W8A8 as the source has it.

    Raises:
        CheckpointError: it is missing or damaged, or its shape or bias is not that of the config.
    """
    linear = source.linear(name)
    check_shape(config, f"{name}.weight", linear.weight.shape)
    channels = (1,) if config.latent is not None else linear.weight.shape[:1]
    if linear.cache is not None and linear.cache.scale.shape != channels:
        raise CheckpointError(
            f"{name} has {linear.cache.scale.size} scales of a cache, and {channels[0]} are expected",
            remedy="use the config.json that belongs to these weights",
        )
    if (linear.bias is not None) != (config.shape(f"{name}.bias") is not None):
        found, asked = ("has a", "none") if linear.bias is not None else ("has no", "one")
        raise CheckpointError(
            f"{name} {found} bias, config.json asks for {asked}",
            remedy="use the config.json that belongs to these weights",
        )
    return linear


def expert_sizes(config: ModelConfig) -> ExpertSizes:
    """The sizes of a model's experts. Raises ModelError if it has none."""
    if config.experts is None:
        raise ModelError(f"a model of type {config.family.model_type} has no experts")
    return config.experts
