"""On how many NPUs a folder can be served, by sizes alone: nothing here was measured on one.

Every matrix is taken as split evenly, by tensor or expert parallelism. What servers hold more than once
(norms, routers, what compresses in latent attention) is a hundredth of a model at most, and counts as none.
"""

from dataclasses import dataclass
from math import ceil

from msquant.models.config import ModelConfig
from msquant.schemes import Quant

NPU_BYTES = 64 << 30
"""Memory of an Ascend 910B, of which an Atlas 800 A2 has eight."""

USED = 0.9
"""Part of it for weights and cache, as `gpu_memory_utilization` has it by default."""

RESERVED_BYTES = 2_000_000_000
"""Of that part for activations and the runtime: an assumption."""

LEAST_TOKENS = 32_768
"""That the cache is to hold: one request as long as the guides of R1 have it."""

_MOST_NPUS = 64
_BITS_OF_A_NUMBER = 16


@dataclass(frozen=True)
class ServingNeed:
    """What serving takes on the fewest NPUs.

    Attributes:
        npus: how many, a power of two that divides the attention's heads.
        npu_bytes: memory of each.
        weight_bytes: on each.
        cache_bytes: left on each for keys and values.
        cache_tokens: of all requests together that this holds.
        token_bytes: that a token takes in each NPU's cache.
        float_token_bytes: the same in 16 bits, as the model in floating point is served.
    """

    npus: int
    npu_bytes: int
    weight_bytes: int
    cache_bytes: int
    cache_tokens: int
    token_bytes: int
    float_token_bytes: int


def serving_need(config: ModelConfig, weight_bytes: int, cache: Quant | None = None) -> ServingNeed | None:
    """The fewest NPUs that hold a model and a cache of `LEAST_TOKENS`; None if 64 of them do not.

    None too where no layer keeps keys and values, as the delta rule does not: then tokens take nothing.

    Args:
        config: the model's shape.
        weight_bytes: of all its tensors as they are served.
        cache: how keys and values are kept; None in 16 bits.
    """
    usable, npus = int(USED * NPU_BYTES) - RESERVED_BYTES, 1
    while npus <= _MOST_NPUS and config.num_attention_heads % npus == 0:
        each = ceil(weight_bytes / npus)
        token, whole = _token_bytes(config, npus, cache), _token_bytes(config, npus)
        if not whole:
            return None
        tokens = (usable - each) // token
        if tokens >= LEAST_TOKENS:
            return ServingNeed(npus, NPU_BYTES, each, usable - each, tokens, token, whole)
        npus *= 2
    return None


def _token_bytes(config: ModelConfig, npus: int, cache: Quant | None = None) -> int:
    """Bytes that a token takes in each NPU's cache: all of latent attention's, a share of the heads'.

    Of latent attention the rotated channels stay in 16 bits. Layers that mix tokens by the delta rule keep a
    state that does not grow.
    """
    bits = _BITS_OF_A_NUMBER if cache is None else cache.bits
    if config.latent is not None:
        total = config.latent.kv_lora_rank * bits + config.latent.qk_rope_head_dim * _BITS_OF_A_NUMBER
    else:
        total = 2 * ceil(config.num_key_value_heads / npus) * config.head_dim * bits
    layers = sum(config.delta_rule(index) is None for index in range(config.num_hidden_layers))
    return layers * total // 8
