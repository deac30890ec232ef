"""The scale of latent attention's int8 cache as msModelSlim writes it for vllm-ascend ("FAKQuant").

Read in msModelSlim (ascendv1.py: `_save_activation_per_head`; processor/quant/fa3/processor.py;
model/deepseek_v3/model_adapter.py) and vllm-ascend 0.23.0 and 0.26.0rc1 (quantization/modelslim_config.py:
`is_fa_quant_layer`, `enabling_fa_quant`; methods/kv_c8.py: `AscendFAQuantAttentionMethod`;
attention/mla_v1.py: `_process_weights_for_fused_fa_quant`, `_forward_decode`). An attention block has

    fa_k.scale, fa_v.scale      float32 [1, 1], of the latent state behind its norm, which is keys and values
    fa_q.scale                  float32 [heads, 1], of the queries in the latent's channels
    fa_q|fa_k|fa_v.offset       int8 in the shape of the scale, zeros

of which the engine computes with `fa_k.scale` alone, held in the model's dtype. A decode instance keeps

    c_q = clamp(round(c / fa_k.scale)),    c = fa_k.scale * c_q

and rounds each token's query of each head by its own range (npu_mla_prolog_v2: `dequant_scale_q_nope`); the
rotated channels of both stay in the model's dtype. Its operator takes inputs per token, so the linears in
front are W8A8_DYNAMIC. An instance that takes no other one's cache keeps the latent state in floating point,
but on Atlas 950, which keeps it in float8 with the same scale.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.tensor_spec import TensorSpec
from msquant.checkpoint.weights import CacheScale
from msquant.errors import CheckpointError
from msquant.families.base import Names
from msquant.formats.description import Description
from msquant.formats.folder_rules import FLOAT_CODES, Finding
from msquant.formats.scales import all_positive, held_scales, reciprocable_scales
from msquant.schemes import W8A8_DYNAMIC, Scheme

WORD = "FAQuant"
"""What the description has for each tensor."""

ENTRY, KIND = "fa_quant_type", "FAKQuant"
"""What the description says of the whole model."""

LAYER_ENTRY, LAYER_KIND = "quant_type", "INT8"
"""What it says of an attention block: queries, keys and values alike, with fixed scales."""

QUERIES, KEYS, VALUES = "fa_q", "fa_k", "fa_v"
PARTS = tuple(f"{part}.{what}" for part in (QUERIES, KEYS, VALUES) for what in ("scale", "offset"))
"""The tensors within an attention block."""

BLOCK, ROTATED_BLOCK = 32, 16
"""The cache is laid out in so many channels of the latent state, and of the rotated ones, at a time."""

_NAMES = Names()
_MAKES = f".{_NAMES.latent_down}"
# What runs in the one operator that fills the cache.
_IN_FRONT = (_NAMES.queries_down, _NAMES.latent_down, _NAMES.queries_up)
_ENDS = tuple(f".{part}" for part in PARTS)


def is_part(name: str) -> bool:
    """Whether a tensor is one of `PARTS`."""
    return name.endswith(_ENDS)


def makes_latent(module: str) -> bool:
    """Whether a linear makes the latent state, which is what its cache is of."""
    return module.endswith(_MAKES)


def owner(name: str) -> str:
    """The linear that makes what a tensor of `PARTS` scales."""
    return f"{_block(name.rpartition('.')[0])}{_MAKES}"


def is_cached(checkpoint: Checkpoint, module: str) -> bool:
    """Whether a linear makes a latent state that has a scale in a folder."""
    return makes_latent(module) and f"{_block(module)}.{KEYS}.scale" in checkpoint


def specs(module: str, heads: int) -> list[TensorSpec]:
    """The tensors for a linear that makes the latent state of so many heads."""
    rows = {QUERIES: heads, KEYS: 1, VALUES: 1}
    return [
        TensorSpec(f"{_block(module)}.{part}.{what}", code, (count, 1))
        for part, count in rows.items()
        for what, code in (("scale", "F32"), ("offset", "I8"))
    ]


def encode(module: str, cache: CacheScale, dtype: str) -> dict[str, NDArray[Any]]:
    """The tensors by full name, with scales as the engine holds them in the model's dtype.

    Raises:
        CheckpointError: a scale, or its reciprocal, is not positive and finite in the model's dtype.
    """
    assert cache.queries is not None, "of latent attention"
    scale = reciprocable_scales(cache.scale, dtype)
    scales = {QUERIES: held_scales(cache.queries, dtype), KEYS: scale, VALUES: scale}
    if not all(map(all_positive, scales.values())):
        raise CheckpointError(
            f"the scale of its cache is {cache.scale.item():.4g}, which {dtype}, in which the engine keeps "
            "it, does not hold",
            where=module,
            remedy="quantize the model in bfloat16, or with --cache none",
        )
    return {
        f"{_block(module)}.{part}.{what}": values
        for part, held in scales.items()
        for what, values in (("scale", held.reshape(-1, 1)), ("offset", np.zeros((len(held), 1), np.int8)))
    }


def decode(checkpoint: Checkpoint, module: str, dtype: str | None) -> CacheScale:
    """The scale of what a linear makes, as the engine computes with it.

    Args:
        checkpoint: the opened folder.
        module: the linear, see `is_cached`.
        dtype: the model's; None if config.json does not say: the scale is then exact.

    Raises:
        CheckpointError: what is stored is no such scale.
    """
    for finding in check_tensors(checkpoint, module):
        raise CheckpointError(
            finding.problem,
            where=f"{checkpoint.folder}, {finding.where}",
            remedy=f"see everything that is wrong with it: msquant inspect {checkpoint.folder}",
        )
    scale, queries = (
        checkpoint.raw(f"{_block(module)}.{part}.scale").astype(np.float32).reshape(-1)
        for part in (KEYS, QUERIES)
    )
    return CacheScale.of(scale if dtype is None else held_scales(scale, dtype), queries)


def described(names: Iterable[str]) -> dict[str, str]:
    """What the description says of those of some tensors that are scales, and of their attention blocks."""
    words: dict[str, str] = {}
    for name in filter(is_part, names):
        words[name] = WORD
        words[f"{_block(name.rpartition('.')[0])}.{LAYER_ENTRY}"] = LAYER_KIND
    return words


def check_schemes(linears: Mapping[str, Scheme], config: Mapping[str, Any]) -> Iterator[Finding]:
    """Check that vllm-ascend can fill the cache of a model and lay it out."""
    cached = [module for module, scheme in linears.items() if scheme.cache and makes_latent(module)]
    if not cached:
        return
    if config.get("index_topk") is not None:
        yield Finding(
            cached[0],
            f"is {linears[cached[0]]}: vllm-ascend computes attention with an indexer (index_topk) by other "
            "code, which keeps no latent state in int8",
        )
    for key, block in (("kv_lora_rank", BLOCK), ("qk_rope_head_dim", ROTATED_BLOCK)):
        if type(size := config.get(key)) is int and size % block:
            problem = f"lays such a cache out in blocks of {block} channels, and {key} is {size}"
            yield Finding(cached[0], f"is {linears[cached[0]]}: vllm-ascend {problem}")
    for module in cached:
        if f"{_block(module)}.{_NAMES.queries}" in linears:
            yield Finding(
                module,
                f"is {linears[module]}: vllm-ascend fills an int8 cache from queries that are compressed "
                "(q_lora_rank), and those of this model are not",
            )
            return
        for part in _IN_FRONT:
            scheme = linears.get(linear := f"{_block(module)}.{part}")
            if scheme is not None and scheme.without_cache != W8A8_DYNAMIC:
                yield Finding(
                    linear,
                    f"is {scheme}: vllm-ascend fills an int8 latent cache with an operator that takes "
                    f"{', '.join(_IN_FRONT)} in {W8A8_DYNAMIC} alone; write that scheme for these",
                )
                return


def check_folder(checkpoint: Checkpoint, description: Description) -> Iterator[Finding]:
    """Check that the description says that there are scales, and each of them."""
    stored = list(filter(is_part, checkpoint.names()))
    said = description.entries.get(ENTRY)
    if stored and said != KIND:
        yield Finding(
            ENTRY,
            f"is {said!r} in the description, but {stored[0]} is there: vllm-ascend reads it with {KIND!r}",
        )
    elif said == KIND and not stored:
        yield Finding(ENTRY, f"is {KIND!r} in the description, but no layer has a {KEYS}.scale")
    for module in dict.fromkeys(map(owner, stored)):
        yield from check_tensors(checkpoint, module)


def check_tensors(checkpoint: Checkpoint, module: str) -> list[Finding]:
    """Check the scales of one attention block: dtype, shape, and that the engine can compute with them."""
    found: list[Finding] = []
    for part in PARTS:
        name = f"{_block(module)}.{part}"
        if name not in checkpoint:
            found.append(Finding(name, "missing: other scales of this attention block are there"))
            continue
        code, shape = checkpoint.dtype(name), checkpoint.shape(name)
        scale = part.endswith("scale")
        if code not in (FLOAT_CODES if scale else {"I8"}):
            problem = f"is stored as {code}, {'a floating-point number' if scale else 'I8'} is expected"
            if not scale and code in FLOAT_CODES:
                problem += ": float8 caches are for Atlas 950, and msquant reads those of int8"
            found.append(Finding(name, problem))
        elif len(shape) != 2 or shape[1] != 1 or (shape[0] != 1 and not part.startswith(QUERIES)):
            wanted = "[heads, 1]" if part.startswith(QUERIES) else "[1, 1]"
            found.append(Finding(name, f"has shape {list(shape)}, {wanted} is expected"))
        elif scale and not all_positive(checkpoint.raw(name).astype(np.float32)):
            found.append(Finding(name, "holds a scale that is not positive and finite"))
        elif not scale and checkpoint.raw(name).any():
            found.append(Finding(name, "is not zero: the engine takes a latent cache as symmetric"))
    return found


def _block(module: str) -> str:
    """The attention block that a module is in."""
    return module.rpartition(".")[0]
