"""The model families: one file a kind, found by `model_type` through one registry."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from msquant.families.base import Config, Family, Shapes
from msquant.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, KIMI_K2
from msquant.families.glm import GLM4, GLM4_MOE
from msquant.families.llama import LLAMA, MISTRAL
from msquant.families.qwen import QWEN2, QWEN3, QWEN3_MOE
from msquant.families.qwen3_next import QWEN3_NEXT
from msquant.families.row_orders import RopeRows
from msquant.families.sparse import DEEPSEEK_V32, GLM_MOE_DSA

_REGISTERED: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Make a family known by its `model_type`."""
    _REGISTERED[family.model_type] = family
    return family


for _family in (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    QWEN3_NEXT,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    DEEPSEEK_V32,
    KIMI_K2,
    GLM4,
    GLM4_MOE,
    GLM_MOE_DSA,
):
    register(_family)


def find_family(model_type: Any) -> Family | None:
    """The family of that `model_type`, as `config.json` has it; None for one that is not known here."""
    return _REGISTERED.get(model_type) if isinstance(model_type, str) else None


def model_types() -> list[str]:
    """The `model_type` of every family, sorted."""
    return sorted(_REGISTERED)


def expected_shapes(config: Config) -> Shapes | None:
    """See `Family.shapes`; None for a model of no known family."""
    family = find_family(config.get("model_type"))
    return family.shapes(config) if family else None


def extra_shapes(config: Config) -> Shapes:
    """See `Family.extra_shapes`; empty for a model of no known family."""
    family = find_family(config.get("model_type"))
    return family.extra_shapes(config) if family else {}


def row_orders(config: Config) -> RopeRows:
    """See `Family.row_orders`; none for a model of no known family."""
    family = find_family(config.get("model_type"))
    return family.row_orders(config) if family else RopeRows({}, 0)


def fused_linears() -> Mapping[str, tuple[str, ...]]:
    """What engines run as one layer, see `Family.fused`, of all families together."""
    return _together(tuple(_REGISTERED.values()))[0]


def float_only() -> Mapping[str, str]:
    """What no engine quantizes, see `Family.float_only`, of all families together."""
    return _together(tuple(_REGISTERED.values()))[1]


def folded_linears() -> tuple[str, ...]:
    """What engines multiply into the attention, see `Family.folded`, of all families together."""
    return _together(tuple(_REGISTERED.values()))[2]


@cache
def _together(
    known: tuple[Family, ...],
) -> tuple[dict[str, tuple[str, ...]], dict[str, str], tuple[str, ...]]:
    """Made once for the families that are known: rules look each of 90,000 tensors up."""
    return (
        {name: parts for family in known for name, parts in family.fused.items()},
        {end: what for family in known for end, what in family.float_only.items()},
        tuple(dict.fromkeys(name for family in known for name in family.folded)),
    )
