"""A model of one layer of each kind, cut from the one that is planned for, to measure this machine with."""

from collections.abc import Mapping
from math import ceil, lcm, sqrt
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from msquant.algorithms.base import Algorithm
from msquant.checkpoint.checkpoint_reader import SINGLE_NAME, Checkpoint
from msquant.checkpoint.fp8 import SCALE_SUFFIX
from msquant.checkpoint.writer import write_json, write_shard
from msquant.formats.dtypes import MODEL_DTYPES, stored_dtype
from msquant.hub.published import stored_bytes
from msquant.models.config import ModelConfig
from msquant.models.config_json import parse_config
from msquant.planning.blocks import LayerBlocks, weights_of

MOST_WEIGHTS, MOST_EXPERT_WEIGHTS, MOST_VOCABULARY = 6_000_000, 100_000_000, 1024
"""Of a decoder layer without its experts; of all its routed experts; and of the two ends."""

# A width that is cut is a multiple of this, which is the size of an FP8 block, too.
_STEP = 128

_POOL = 1 << 20
_FP8_MAX = 448.0
_SMALL_HIDDEN = 256


def layer_kinds(config: ModelConfig) -> list[int]:
    """The first decoder layer of each kind, dense ones before those with experts.

    What makes kinds differ is whether there are experts, and what mixes tokens.
    """
    layers = reversed(range(config.num_hidden_layers))
    found = {(config.has_experts(index), config.mixer(index)): index for index in layers}
    return sorted(found.values(), key=lambda index: (config.has_experts(index), index))


def sample_config(config: ModelConfig, policy: Algorithm, *, small: bool = False) -> ModelConfig:
    """The shape of the sample: a layer of each kind in their order.

    The hidden size and every expert have their true size. Of attention there are fewer heads and narrower
    compressions, of a dense feed-forward block fewer channels, of the experts fewer, all only as far as the
    limits ask for it, and the policy's groups of columns divide what is left.

    Args:
        config: of the model.
        policy: what is done to it.
        small: all as small as it can be, so that next to nothing is measured but what depends on no size.
    """
    kinds = layer_kinds(config)
    blocks = [LayerBlocks(config, policy, index) for index in kinds]
    shared = max(
        weights_of([*block.searched, *block.streamed]) - _routed_weights(block, block.experts)
        for block in blocks
    )
    part = 0.0 if small else min(1.0, MOST_WEIGHTS / shared)

    groups = [s.weights.group_size for _, s in policy.schemes if s.weights is not None]
    group = lcm(*(size for size in groups if size is not None))
    step = lcm(_STEP, group)

    def cut(size: int) -> int:
        return size if part == 1 else min(size, max(step, int(size * part) // step * step))

    dense = sum(not config.has_experts(index) for index in kinds)
    raw = {key: value for key, value in config.raw.items() if key not in ("layer_types", "pad_token_id")}
    raw |= {
        "num_hidden_layers": len(kinds),
        "num_nextn_predict_layers": 0,
        "vocab_size": min(config.vocab_size, MOST_VOCABULARY),
        "bos_token_id": 0,
        "eos_token_id": 0,
        "intermediate_size": cut(config.intermediate_size),
        "first_k_dense_replace": dense,
        "mlp_only_layers": list(range(dense)),
        "decoder_sparse_step": 1,
        **config.family.mixers_as(config.raw, kinds),
    }
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    kept = max(1, int(kv_heads * part))
    if (delta := config.delta) is not None:
        fewer = max(1, int(delta.key_heads * part))
        while fewer < delta.key_heads and delta.repeat * fewer * delta.value_dim % group:
            fewer += 1
        raw |= {"linear_num_key_heads": fewer, "linear_num_value_heads": fewer * delta.repeat}
    values = config.head_dim if config.latent is None else config.latent.v_head_dim
    # Groups of columns divide what the output projection reads.
    while kept < kv_heads and heads // kv_heads * kept * values % group:
        kept += 1
    raw |= {"num_key_value_heads": kept, "num_attention_heads": heads // kv_heads * kept}
    if config.latent is None:
        raw["head_dim"] = config.head_dim
    else:
        rank = config.latent.q_lora_rank
        raw |= {"q_lora_rank": rank and cut(rank), "kv_lora_rank": cut(config.latent.kv_lora_rank)}
    if small:
        raw["hidden_size"] = min(config.hidden_size, ceil(_SMALL_HIDDEN / step) * step)
    if config.experts is not None:
        raw |= _fewer_experts(config, blocks[-1], small, step)
    return parse_config(raw, "the sample's config.json")


def _routed_weights(block: LayerBlocks, experts: int) -> int:
    """Of so many of a layer's routed experts."""
    each = next((weights_of(e) for name, e in block.inner.items() if ".experts." in name), 0)
    return each * experts


def _fewer_experts(config: ModelConfig, block: LayerBlocks, small: bool, step: int) -> dict[str, Any]:
    sizes, raw = config.experts, dict[str, Any]()
    assert sizes is not None
    count = min(sizes.count, max(2, MOST_EXPERT_WEIGHTS // max(1, _routed_weights(block, 1))))
    if small:
        raw["moe_intermediate_size"] = min(sizes.intermediate_size, step)
        count = min(count, 4)
    if count < sizes.count:
        raw |= {"n_group": 1, "topk_group": 1}
        # Each gets about as great a part of the tokens as it does in the model.
        raw["num_experts_per_tok"] = max(1, round(sizes.per_token * count / sizes.count))
    return raw | {str(config.family.expert_count): count}


def write_sample(folder: Path, config: ModelConfig, model: ModelConfig, weights: Checkpoint | None) -> None:
    """Write the sample as a model's folder, with a tokenizer whose tokens are bytes.

    Args:
        folder: to write into.
        config: the sample's shape.
        model: the model's.
        weights: the model's, of which the sample gets the first rows and columns; without them it gets random
            numbers.

    Raises:
        MsquantError: a tensor cannot be read; the disk is full or cannot be written.
    """
    generator = np.random.default_rng(0)
    pool = generator.standard_normal(_POOL, np.float32) / np.float32(sqrt(config.hidden_size))
    tensors: dict[str, NDArray[Any]] = {}
    for index, original in enumerate(layer_kinds(model)):
        old, new = (f"{model.family.layer_name(place)}." for place in (original, index))
        for name, shape in config.layer_shapes(index).items():
            values = _values(weights, name.replace(new, old, 1), shape, pool)
            tensors |= _stored(name, values, config)
    for name in config.end_names:
        tensors |= _stored(name, _values(weights, name, config.shapes[name], pool), config)
    write_shard(folder / SINGLE_NAME, tensors)
    write_json(folder / "config.json", config.raw)
    _write_tokenizer(folder)


def _values(
    weights: Checkpoint | None, name: str, shape: tuple[int, ...], pool: NDArray[np.float32]
) -> NDArray[np.float32]:
    if weights is not None:
        values = weights.rows(name, np.arange(shape[0]))
        return values[:, : shape[1]] if len(shape) > 1 else values
    return np.resize(pool, shape) if len(shape) > 1 else np.ones(shape, np.float32)


def _stored(name: str, values: NDArray[np.float32], config: ModelConfig) -> Mapping[str, NDArray[Any]]:
    """A tensor as the model's are stored, with one scale for all blocks of FP8."""
    block = config.fp8_block
    if block is None or stored_bytes(name, values.shape, block) == stored_bytes(name, values.shape, None):
        return {name: values.astype(MODEL_DTYPES[stored_dtype(name, config.dtype)])}
    scale = max(float(np.abs(values).max()), 1e-12) / _FP8_MAX
    scales = np.full([-(-n // size) for n, size in zip(values.shape, block, strict=True)], scale, np.float32)
    return {name: (values / scale).astype(ml_dtypes.float8_e4m3fn), f"{name}{SCALE_SUFFIX}": scales}


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
