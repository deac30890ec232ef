"""`quantization_config` of a compressed-tensors folder: made from the schemes of a model's layers, and read.

Read in vllm 0.11.0 and 0.32.0 (compressed_tensors.py, utils.py) and compressed-tensors 0.11 to 0.20
(`QuantizationConfig`, `QuantizationArgs`).
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from msquant.errors import CheckpointError
from msquant.formats.compressed_tensors_layout import QUANT_METHOD
from msquant.formats.compressed_tensors_targets import patterns
from msquant.formats.fused_layers import experts_parent
from msquant.schemes import FLOAT, W8A8, W8A8_DYNAMIC, Scheme

FORMAT = "int-quantized"

# `naive-quantized`, its older name, stores the same tensors; groups may differ where the whole is mixed.
_FORMATS = (FORMAT, "naive-quantized", "mixed-precision")

_CLASS = "Linear"
_INT8: dict[str, Any] = {"num_bits": 8, "type": "int"}
_INPUTS: dict[Scheme, dict[str, Any]] = {
    W8A8: {**_INT8, "symmetric": False, "strategy": "tensor", "dynamic": False},
    W8A8_DYNAMIC: {**_INT8, "symmetric": True, "strategy": "token", "dynamic": True},
}


@dataclass(frozen=True)
class Group:
    """Layers that are quantized alike.

    Attributes:
        name: its key in `config_groups`.
        targets: names, patterns or classes of layers.
        scheme: `static` or `dynamic`.
        symmetric: whether activations have no zero point.
        per_channel: whether a weight has one scale a row, or one for all.
    """

    name: str
    targets: tuple[str, ...]
    scheme: Scheme
    symmetric: bool
    per_channel: bool


@dataclass(frozen=True)
class Section:
    """What `config.json` says of a model's quantization.

    Attributes:
        groups: in their order.
        ignore: names, patterns or classes of layers that are not quantized.
    """

    groups: tuple[Group, ...]
    ignore: tuple[str, ...]

    def group(self, module: str) -> Group | None:
        """The group that a linear layer is in; None if it is not quantized.

        A layer's name goes before its class, as in vLLM and compressed-tensors.
        """
        if _CLASS in self.ignore or any(_names(target, module) for target in self.ignore):
            return None
        for matches in (_names, _is_class):
            for group in self.groups:
                if any(matches(target, module) for target in group.targets):
                    return group
        return None


def make_section(linears: Mapping[str, Scheme], names: Iterable[str]) -> dict[str, Any]:
    """The content of `quantization_config`.

    The scheme of most layers, of the routed experts if they are quantized, is a group for the class `Linear`:
    vLLM 0.11 takes the scheme of experts from there and nowhere else.

    Args:
        linears: the scheme of each linear layer by module.
        names: every tensor that is stored.
    """
    schemes: dict[str, Scheme] = {"lm_head": FLOAT}
    for name in names:
        module, _, part = name.rpartition(".")
        if part == "weight" and not module.endswith(("norm", "embed_tokens")):
            schemes[module] = FLOAT
    schemes.update(linears)
    counts = Counter(scheme for scheme in schemes.values() if not scheme.is_float)
    of_experts = {scheme for module, scheme in schemes.items() if experts_parent(module)}
    groups = {}
    for number, scheme in enumerate(sorted(counts, key=lambda one: (one not in of_experts, -counts[one]))):
        mine = [module for module, its in schemes.items() if its == scheme]
        # What is ignored is looked for first: targets need not spare it.
        others = [module for module, its in schemes.items() if its not in (scheme, FLOAT)]
        groups[f"group_{number}"] = {
            "targets": patterns(mine, others, fused=True) if number else [_CLASS],
            "weights": {**_INT8, "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": dict(_INPUTS[scheme]),
            "output_activations": None,
        }
    ignored = [module for module, scheme in schemes.items() if scheme.is_float]
    others = [module for module, scheme in schemes.items() if not scheme.is_float]
    return {
        "quant_method": QUANT_METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": patterns(ignored, others, fused=False),
    }


def find_section(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The section of a `config.json` that is of this format; None if there is none."""
    for key in ("quantization_config", "compression_config"):
        found = config.get(key)
        if isinstance(found, dict) and found.get("quant_method") == QUANT_METHOD:
            return found
    return None


def read_section(config: Mapping[str, Any]) -> Section:
    """What a `config.json` says, of msquant or of another tool.

    Raises:
        CheckpointError: there is no such section, or it names something that msquant cannot compute: other
            widths and types than int8, groups of columns, a quantized cache, sparsity, rotations.
    """
    section = find_section(config)
    if section is None:
        raise _refused(f"quantization_config of {QUANT_METHOD} is missing")
    if section.get("format") not in _FORMATS:
        raise _refused(f"its format is {section.get('format')!r}, only {FORMAT} is read")
    if section.get("quantization_status", "compressed") != "compressed":
        raise _refused(f"its quantization_status is {section['quantization_status']!r}: it is not compressed")
    for key, what in (("kv_cache_scheme", "a quantized cache"), ("transform_config", "rotated weights")):
        if section.get(key):
            raise _refused(f"{key} is there: {what} cannot be computed")
    if (section.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise _refused("sparsity_config is there: sparse weights are not read")
    groups, ignore = section.get("config_groups"), section.get("ignore") or []
    if not isinstance(groups, dict) or not groups:
        raise _refused("config_groups is missing or empty")
    read = Section(tuple(_group(name, value) for name, value in groups.items()), _strings("ignore", ignore))
    for target in (*read.ignore, *(target for group in read.groups for target in group.targets)):
        if target.startswith("re:"):
            try:
                re.compile(target[3:])
            except re.error as error:
                raise _refused(f"{target!r} is not a regular expression: {error}") from error
    return read


def _group(name: str, value: Any) -> Group:
    if not isinstance(value, dict):
        raise _refused(f"{name} is not a group")
    if value.get("format") not in (None, *_FORMATS):
        raise _refused(f"the format of {name} is {value['format']!r}, only {FORMAT} is read")
    if value.get("output_activations"):
        raise _refused(f"{name} quantizes outputs, which is not computed")
    weights, inputs = value.get("weights"), value.get("input_activations")
    if not isinstance(weights, dict) or not isinstance(inputs, dict):
        raise _refused(f"{name} quantizes weights or inputs alone: only both in int8 (W8A8) are read")
    _expect(name, "weights", weights, symmetric=(True,), strategy=("channel", "tensor"), dynamic=(False,))
    dynamic = bool(inputs.get("dynamic"))
    _expect(
        name,
        "input_activations",
        inputs,
        symmetric=(True,) if dynamic else (True, False),
        strategy=("token",) if dynamic else ("tensor",),
        dynamic=(dynamic,),
    )
    return Group(
        name=name,
        targets=_strings(f"targets of {name}", value.get("targets")),
        scheme=W8A8_DYNAMIC if dynamic else W8A8,
        symmetric=_value(inputs, "symmetric"),
        per_channel=_value(weights, "strategy") == "channel",
    )


def _expect(group: str, part: str, values: Mapping[str, Any], **accepted: tuple[Any, ...]) -> None:
    wanted = {"num_bits": (8,), "type": ("int",), **accepted}
    wanted.update(dict.fromkeys(("group_size", "actorder", "block_structure"), (None,)))
    for key, allowed in wanted.items():
        if _value(values, key) not in allowed:
            text = " or ".join(repr(one) for one in allowed)
            raise _refused(f"{key} of the {part} of {group} is {values.get(key)!r}, only {text} is read")


def _value(values: Mapping[str, Any], key: str) -> Any:
    """An entry of quantization arguments, with what compressed-tensors takes for one that is left out."""
    defaults = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "strategy": "tensor"}
    found = values.get(key)
    return defaults.get(key) if found is None else found


def _strings(what: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise _refused(f"{what} is not a list of names")
    return tuple(value)


def _names(target: str, module: str) -> bool:
    return bool(re.match(target[3:], module)) if target.startswith("re:") else target == module


def _is_class(target: str, module: str) -> bool:
    return target.lower() == _CLASS.lower()


def _refused(what: str) -> CheckpointError:
    return CheckpointError(
        what,
        where="config.json",
        remedy="msquant reads W8A8 with int8 weights and static or per-token int8 activations",
    )
