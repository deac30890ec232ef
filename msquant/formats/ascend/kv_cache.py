"""The scales of an int8 key-value cache as msModelSlim writes them for vllm-ascend ("C8").

Read in msModelSlim (ascendv1.py: `on_dynamic_cache`; processor/quant/attention.py) and vllm-ascend 0.23.0 and
0.26.0rc1 (quantization/modelslim_config.py: `get_cache_scale_mapper`, `is_c8_quant_layer`; methods/kv_c8.py;
attention/attention_v1.py: `AscendC8AttentionBackendImpl`). The linears that make keys and values each have

    kv_cache_scale     float32 [groups * D], channels of a head side by side
    kv_cache_offset    likewise, of values zeros

which the engine loads in the model's dtype. Keys are those behind the rotary embedding:

    x_q = clamp(round(x * r + kv_cache_offset)),    x = kv_cache_scale * x_q

with r the reciprocal of the scale, rounded to that dtype. It adds the offset and never takes it off again.
Of values only zeros are right. Keys are all moved by one vector then, which moves the scores of a query by
one number, and no softmax sees that: every query reads either all of its keys from the cache, or none. So
channels of keys use their integers in full where they lie to one side of zero.

The tokens of a prompt that is computed at once attend to each other's keys and values before rounding; what
is generated, and a prompt in chunks, reads the cache.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.tensor_spec import TensorSpec
from msquant.checkpoint.weights import CacheScale
from msquant.errors import CheckpointError
from msquant.families import find_family
from msquant.formats.ascend import fa_quant
from msquant.formats.description import Description
from msquant.formats.dtypes import MODEL_DTYPES, model_dtype
from msquant.formats.folder_rules import FLOAT_CODES, Finding, Parts, check_parts
from msquant.formats.scales import all_positive, held_scales, reciprocable_scales, rounded_reciprocal
from msquant.schemes import C8, Scheme

WORD = "C8"
"""What the description has for each tensor, and for `ENTRIES`."""

ENTRIES = ("kv_cache_type", "kv_quant_type")
"""What the description says of the whole model; vllm-ascend reads the first."""

SCALE, OFFSET = PARTS = ("kv_cache_scale", "kv_cache_offset")
"""The tensors beside those of a linear layer."""

VALUES = ".v_proj"
"""The end of the names of linears that make values; the engine knows no other (`get_cache_scale_mapper`)."""

_ENDS = tuple(f".{part}" for part in PARTS)

BLOCK = 32
"""The cache is laid out in so many channels of a head at a time (`_nz_5d_view`)."""


def specs(module: str, rows: int) -> list[TensorSpec]:
    """The tensors of a linear with so many rows."""
    return [TensorSpec(f"{module}.{part}", "F32", (rows,)) for part in PARTS]


def encode(module: str, cache: CacheScale, dtype: str) -> dict[str, NDArray[Any]]:
    """The scales and offsets as the engine holds them in the model's dtype, by full tensor name.

    A scale that the dtype does not hold becomes the neighbour whose reciprocal survives the rounding best, as
    for the input scales of static layers; offsets follow it, so that the middle of a range stays where it is.

    Raises:
        CheckpointError: a scale, or in the model's dtype its reciprocal, is not positive and finite.
    """
    scale = reciprocable_scales(cache.scale, dtype)
    if not all_positive(scale) or not all_positive(rounded_reciprocal(scale, dtype)):
        worst = float(cache.scale[np.argmin(cache.scale)])
        raise CheckpointError(
            f"a scale of its cache is {worst:.4g}, which {dtype}, in which the engine keeps it, or its "
            "reciprocal does not hold",
            where=module,
            remedy="quantize the model in bfloat16, or with --cache none",
        )
    offset = np.zeros_like(scale)
    if cache.offset is not None:
        offset = np.rint(cache.offset * cache.scale * rounded_reciprocal(scale, dtype))
    return {f"{module}.{SCALE}": scale, f"{module}.{OFFSET}": held_scales(offset, dtype)}


def decode(checkpoint: Checkpoint, module: str, dtype: str | None) -> CacheScale | None:
    """The scales of a linear's keys or values as the engine computes with them; None where it has none.

    Args:
        checkpoint: the opened folder.
        module: the linear.
        dtype: the model's; None if config.json does not say: they are then exact.

    Raises:
        CheckpointError: what is stored is no such scale.
    """
    if not is_cached(checkpoint, module):
        return None
    for finding in check_tensors(checkpoint, module, dtype):
        raise CheckpointError(
            finding.problem,
            where=f"{checkpoint.folder}, {finding.where}",
            remedy=f"see everything that is wrong with it: msquant inspect {checkpoint.folder}",
        )
    scale, offset = (
        checkpoint.raw(name).astype(np.float32).reshape(-1) if name in checkpoint else np.zeros(1, np.float32)
        for name in (f"{module}.{SCALE}", f"{module}.{OFFSET}")
    )
    if dtype is None:
        return CacheScale.of(scale, offset=offset if offset.any() else None)
    offset = held_scales(offset, dtype)
    return CacheScale(
        held_scales(scale, dtype),
        rounded_reciprocal(scale, dtype),
        offset=offset if offset.any() else None,
    )


def is_cached(checkpoint: Checkpoint, module: str) -> bool:
    """Whether a linear's keys or values have scales in a folder."""
    return f"{module}.{SCALE}" in checkpoint


def with_caches(checkpoint: Checkpoint, schemes: Mapping[str, Scheme]) -> dict[str, Scheme]:
    """The schemes of modules with the cache of those that have scales of one, latent or not."""
    return {
        module: replace(scheme, cache=C8)
        if is_cached(checkpoint, module) or fa_quant.is_cached(checkpoint, module)
        else scheme
        for module, scheme in schemes.items()
    }


def described(names: Iterable[str]) -> dict[str, str]:
    """What the description says of those of some tensors that are scales of a cache."""
    return {name: WORD for name in names if name.endswith(_ENDS)}


def check_schemes(linears: Mapping[str, Scheme], config: Mapping[str, Any]) -> Iterator[Finding]:
    """Check that vllm-ascend can lay out the caches of a model."""
    cached = [m for m, scheme in linears.items() if scheme.cache and not fa_quant.makes_latent(m)]
    if not cached:
        return
    heads, size = config.get("num_attention_heads"), config.get("head_dim")
    if size is None and type(heads) is int and type(hidden := config.get("hidden_size")) is int and heads:
        size = hidden // heads
    if type(size) is int and size % BLOCK:
        yield Finding(
            cached[0],
            f"is {linears[cached[0]]}: vllm-ascend lays int8 caches out in blocks of {BLOCK} channels of a "
            f"head, and heads have {size}",
        )


def check_folder(
    checkpoint: Checkpoint, description: Description, config: Mapping[str, Any]
) -> Iterator[Finding]:
    """Check that all layers have scales or none, that the description says so, and each of them.

    Args:
        checkpoint: the opened folder.
        description: of its tensors.
        config: the content of `config.json`; empty where it cannot be read.
    """
    stored = [name for name in checkpoint.names() if name.endswith(_ENDS)]
    said = description.entries.get(ENTRIES[0])
    if stored and said != WORD:
        yield Finding(
            ENTRIES[0],
            f"is {said!r} in the description, but {stored[0]} is there: vllm-ascend reads it with {WORD!r}",
        )
    elif said == WORD and not stored:
        yield Finding(ENTRIES[0], f"is {WORD!r} in the description, but no layer has a {SCALE}")
    if not stored:
        return
    dtype = model_dtype(config)
    expected = _expected(checkpoint, config)
    for module in dict.fromkeys(name.rpartition(".")[0] for name in stored):
        if module not in expected:
            yield Finding(f"{module}.{SCALE}", "is there, but the layer makes neither keys nor values")
    for module in expected:
        if not is_cached(checkpoint, module):
            yield Finding(
                f"{module}.{SCALE}",
                "missing: other layers have one, and the engine would take 1 or keep floating point here",
            )
        else:
            yield from check_tensors(checkpoint, module, dtype if dtype in MODEL_DTYPES else None)


def check_tensors(checkpoint: Checkpoint, module: str, dtype: str | None) -> list[Finding]:
    """Check the scales of one linear: their dtype and shape, and that the engine can compute with them.

    Args:
        checkpoint: the opened folder.
        module: the linear.
        dtype: the model's, in which the engine holds them; None if it is not known.
    """
    parts = [part for part in PARTS if f"{module}.{part}" in checkpoint]
    rows = checkpoint.shape(f"{module}.weight")[:1] if f"{module}.weight" in checkpoint else None
    if rows and f"{module}.scale_bias" in checkpoint:
        # One byte of the weight is two rows.
        rows = (2 * rows[0],)
    shapes = (rows,) if rows else (checkpoint.shape(f"{module}.{SCALE}"),)
    expected: Parts = {SCALE: (FLOAT_CODES, shapes)}
    if OFFSET in parts:
        expected[OFFSET] = (FLOAT_CODES | frozenset({"I32", "I8"}), shapes)
    if found := check_parts(checkpoint, module, expected):
        return found
    name = f"{module}.{SCALE}"
    scale = checkpoint.raw(name).astype(np.float32)
    if not all_positive(scale):
        found.append(Finding(name, "holds a scale that is not positive and finite"))
    elif dtype is not None and not (
        all_positive(held_scales(scale, dtype)) and all_positive(rounded_reciprocal(scale, dtype))
    ):
        found.append(Finding(name, f"holds a scale that is 0, or has an infinite reciprocal, in {dtype}"))
    if OFFSET in parts:
        offset, name = checkpoint.raw(f"{module}.{OFFSET}").astype(np.float32), f"{module}.{OFFSET}"
        if not np.isfinite(offset).all():
            found.append(Finding(name, "holds NaN or infinity"))
        elif offset.any() and module.endswith(VALUES):
            found.append(
                Finding(
                    name,
                    "is not zero everywhere: the engine adds it to the values that it caches and does not "
                    "take it off again",
                )
            )
    return found


def _expected(checkpoint: Checkpoint, config: Mapping[str, Any]) -> list[str]:
    """The linears of every layer that make keys and values, by the model's family or else by their names."""
    family = find_family(config.get("model_type"))
    if family is not None:
        ends = tuple(f".{linear}.weight" for linear in family.cached)
        return [name.removesuffix(".weight") for name in checkpoint.names() if name.endswith(ends)]
    stored = (name.rpartition(".") for name in checkpoint.names())
    return list(dict.fromkeys(module for module, _, part in stored if part == SCALE))
