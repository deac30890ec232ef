"""How every linear of a model is computed by a policy."""

from dataclasses import replace

from msquant.algorithms.base import Algorithm
from msquant.errors import RecipeError
from msquant.models.config import ModelConfig
from msquant.schemes import Scheme


def layer_linears(config: ModelConfig, index: int) -> list[str]:
    """The full names of the linears within a decoder layer that can be quantized, see `never_quantized`.

    Of a multi-token-prediction layer, those of the decoder layer in it.
    """
    layer, suffix = f"{config.family.layer_name(index)}.", ".weight"
    matrices = (name for name, shape in config.decoder_shapes(index).items() if len(shape) == 2)
    modules = (name.removesuffix(suffix) for name in matrices)
    return [name for name in modules if not config.family.never_quantized(name.removeprefix(layer))]


def layer_schemes(config: ModelConfig, policy: Algorithm, index: int) -> dict[str, Scheme]:
    """The scheme of every linear within a decoder layer, by full name, with the cache of keys and values.

    Raises:
        RecipeError: the policy asks for a quantized cache that the family's attention does not have.
    """
    schemes = {module: policy.scheme(module) for module in layer_linears(config, index)}
    if (cache := policy.cache_quant) is not None:
        if config.delta is not None:
            raise RecipeError(
                f"cache: {policy.cache} is for attention in every layer, and {config.family.model_type} has "
                "layers that keep a state in its place",
                where="quantization.cache",
                remedy="write cache: none",
            )
        for linear in config.family.cached:
            module = f"{config.family.layer_name(index)}.{linear}"
            schemes[module] = replace(schemes[module], cache=cache)
    return schemes


def model_schemes(config: ModelConfig, policy: Algorithm, predictions: int = 0) -> dict[str, Scheme]:
    """As `layer_schemes`, of all decoder layers and of so many multi-token-prediction layers after them."""
    return {
        module: scheme
        for index in range(config.num_hidden_layers + predictions)
        for module, scheme in layer_schemes(config, policy, index).items()
    }


def in_two_blocks(config: ModelConfig, policy: Algorithm, index: int) -> bool:
    """Whether a layer's attention and feed-forward blocks are quantized one after the other."""
    name = config.family.layer_name(index)
    linears = [linear for group in config.feed_forward_groups for linear in group.linears]
    if config.has_experts(index):
        return True
    schemes = [policy.scheme(f"{name}.{linear}") for linear in linears]
    return all(
        scheme.is_float or (scheme.is_dynamic and not policy.searches_feed_forward) for scheme in schemes
    )
