"""The routed experts of a layer in one tensor `[E, ...]`, taken apart into the linear layers they are.

Read in transformers 4.57.1: gpt_oss, llama4 and qwen3_vl_moe multiply from the left, `x @ gate_up_proj`,
so an expert is `[K, N]`; what transformers 5 fuses (Qwen3.5 and whatever it converts) goes through
`F.linear`, so an expert is `[N, K]`, and so it is in MXFP4, which gpt-oss is published in. gate and up are
one behind the other, and in gpt_oss they alternate.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from msquant.checkpoint.mxfp4 import BLOCKS_SUFFIX, decoded_shape
from msquant.checkpoint.stored_matrix import StoredMatrix
from msquant.errors import ModelError
from msquant.families.base import Config

_FUSED = re.compile(r"^(.*\bexperts)\.(gate_up_proj|gate_proj|up_proj|down_proj)(\.weight|_blocks)?$")
_INPUTS_FIRST = ("gpt_oss", "llama4", "llama4_text", "qwen3_vl_moe", "qwen3_vl_moe_text")
_ALTERNATING = ("gpt_oss",)
_DOWN = "down_proj"

# The keys under which the config of a model with further parts has that of its language model.
_LANGUAGE = ("text_config", "llm_config", "language_config", "thinker_config")


@dataclass(frozen=True)
class ExpertLayout:
    """How the experts of a layer lie in their tensors, where shapes do not tell it.

    Attributes:
        transposed: whether an expert is `[K, N]`; None where it is not known.
        alternating: whether rows of gate and up alternate, and are not one half behind the other.
    """

    transposed: bool | None = None
    alternating: bool = False


def language_config(config: Config) -> Config:
    """The part of a `config.json` that describes the language model: all of it, or a section."""
    for key in _LANGUAGE:
        section = config.get(key)
        if isinstance(section, Mapping):
            return language_config(section)
    return config


def known_layout(config: Config) -> ExpertLayout:
    """The layout of a model by its `model_type`."""
    kinds = {config.get("model_type"), language_config(config).get("model_type")}
    transposed = True if kinds & set(_INPUTS_FIRST) else None
    return ExpertLayout(transposed, bool(kinds & set(_ALTERNATING)))


def is_fused(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor holds the same matrix of all experts of a layer, in MXFP4 or not."""
    return len(shape) == (4 if is_packed(name) else 3) and _FUSED.match(name) is not None


def is_packed(name: str) -> bool:
    """Whether a tensor holds the codes of a matrix of all experts in MXFP4, by its name."""
    return name.endswith(BLOCKS_SUFFIX) and _FUSED.match(name) is not None


def fused_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape `[E, ...]` of what a tensor that `is_fused` stands for."""
    return decoded_shape(shape) if is_packed(name) else shape


def experts_of(name: str) -> str:
    """What the names of a layer's experts begin with, by the name of a tensor that `is_fused`."""
    found = _FUSED.match(name)
    assert found is not None
    return found[1]


def bias_of(name: str) -> str:
    """The name that the biases beside such a tensor have, `[E, outputs]`."""
    return f"{_without_end(name)}_bias"


def _without_end(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(BLOCKS_SUFFIX)


def is_transposed(name: str, shape: tuple[int, ...], hidden: object) -> bool | None:
    """Whether an expert of a tensor is `[K, N]`, by the size of the residual stream.

    Args:
        name: of a tensor that `is_fused`.
        shape: its `fused_shape`.
        hidden: `hidden_size`.

    Returns:
        None where both of its sizes are that one, or neither.
    """
    if is_packed(name):
        return False
    first, second = (bool(size == hidden) for size in shape[1:])
    if first == second:
        return None
    # The residual stream is what `down_proj` makes, and what all others read.
    return second if _without_end(name).endswith(_DOWN) else first


def split_experts(name: str, shape: tuple[int, ...], layout: ExpertLayout) -> dict[str, StoredMatrix]:
    """The linear layers in a fused tensor, by the names that they have one by one.

    Args:
        name: of a tensor that `is_fused`.
        shape: its `fused_shape`.
        layout: of its experts; `transposed` is known.

    Returns:
        `model.layers.3.mlp.experts.0.gate_proj` and so on, expert by expert.

    Raises:
        ModelError: gate and up, which lie in one tensor, are not of one size.
    """
    found = _FUSED.match(name)
    assert found is not None
    parent, part = found[1], found[2]
    count, rows, columns = shape
    if layout.transposed:
        rows, columns = columns, rows
    names = ("gate_proj", "up_proj") if part == "gate_up_proj" else (part,)
    each, odd = divmod(rows, len(names))
    if odd:
        raise ModelError(
            f"{name} is {list(shape)}: its {rows} rows are not gate and up of one size",
            remedy="put experts into keep_float",
        )
    step = len(names) if layout.alternating else 1
    return {
        f"{parent}.{expert}.{single}": StoredMatrix(
            tensor=name,
            shape=(each, columns),
            expert=expert,
            first=place * (1 if layout.alternating else each),
            step=step,
            transposed=bool(layout.transposed),
            packed=is_packed(name),
        )
        for expert in range(count)
        for place, single in enumerate(names)
    }
