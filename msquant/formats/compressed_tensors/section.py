"""`quantization_config` of a compressed-tensors folder: made from the schemes of a model's layers, and read.

Read in vllm 0.11.0 and 0.32.0 (compressed_tensors.py, utils.py) and compressed-tensors 0.11 to 0.20
(`QuantizationConfig`, `QuantizationArgs`).
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from msquant.errors import CheckpointError
from msquant.families import fused_linears
from msquant.formats.compressed_tensors import packed
from msquant.formats.fused_layers import experts_parent, fused_layers
from msquant.schemes import FLOAT, MOST_COLUMNS, W8A8, W8A8_DYNAMIC, Quant, Scheme

QUANT_METHOD: Final = "compressed-tensors"
"""What `quant_method` is in `config.json`."""

FORMAT = "int-quantized"
MIXED = "mixed-precision"
"""The format of a folder whose groups are in several, each of which names its own."""

# `naive-quantized`, its older name, stores the same tensors.
_INT_FORMATS = (FORMAT, "naive-quantized")
_FORMATS = (*_INT_FORMATS, packed.FORMAT, MIXED)

_CLASS = "Linear"
_INT8: dict[str, Any] = {"num_bits": 8, "type": "int"}
_STATIC = {**_INT8, "symmetric": False, "strategy": "tensor", "dynamic": False}
_PER_TOKEN = {**_INT8, "symmetric": True, "strategy": "token", "dynamic": True}


_LAYER = re.compile(r"^((?:.*?\.)??(?:layers|blocks)\.\d+)\.")


@dataclass(frozen=True)
class ConfigGroup:
    """Layers that are quantized alike.

    Attributes:
        name: its key in `config_groups`.
        targets: names, patterns or classes of layers.
        scheme: `W8A8`, `W8A8_DYNAMIC` or `W4A8_DYNAMIC`, this in groups too, or one with weights alone that
            is packed.
        symmetric: whether activations have no zero point.
        per_channel: whether a row of a weight has scales of its own, or all have one.
        ordered: whether a tensor, `weight_g_idx`, says which column is in which group.
    """

    name: str
    targets: tuple[str, ...]
    scheme: Scheme
    symmetric: bool
    per_channel: bool
    ordered: bool = False


@dataclass(frozen=True)
class Section:
    """What `config.json` says of a model's quantization.

    Attributes:
        groups: in their order.
        ignore: names, patterns or classes of layers that are not quantized.
    """

    groups: tuple[ConfigGroup, ...]
    ignore: tuple[str, ...]

    def group(self, module: str) -> ConfigGroup | None:
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
    whole = format_of(counts)
    groups: dict[str, dict[str, Any]] = {}
    for number, scheme in enumerate(sorted(counts, key=lambda one: (one not in of_experts, -counts[one]))):
        mine = [module for module, its in schemes.items() if its == scheme]
        # What is ignored is looked for first: targets need not spare it.
        others = [module for module, its in schemes.items() if its not in (scheme, FLOAT)]
        groups[f"group_{number}"] = {
            "targets": patterns(mine, others, fused=True) if number else [_CLASS],
            "weights": _weights(scheme),
            "input_activations": _inputs(scheme),
            "output_activations": None,
        }
        # Without it, the format of the whole is a group's own.
        if whole != FORMAT:
            groups[f"group_{number}"]["format"] = format_of([scheme])
    ignored = [module for module, scheme in schemes.items() if scheme.is_float]
    others = [module for module, scheme in schemes.items() if not scheme.is_float]
    return {
        "quant_method": QUANT_METHOD,
        "format": whole,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": patterns(ignored, others, fused=False),
    }


def format_of(schemes: Iterable[Scheme]) -> str:
    """The value of `format` for layers in these schemes together."""
    found = {packed.FORMAT if packed.is_packed(s) else FORMAT for s in schemes if not s.is_float}
    return MIXED if len(found) > 1 else next(iter(found), FORMAT)


def _inputs(scheme: Scheme) -> dict[str, Any] | None:
    if scheme.inputs is None:
        return None
    return dict(_PER_TOKEN if scheme.is_dynamic else _STATIC)


def _weights(scheme: Scheme) -> dict[str, Any]:
    quant = scheme.weights
    assert quant is not None
    size = {} if quant.group_size is None else {"group_size": quant.group_size}
    strategy = {"strategy": quant.granularity, **size, "dynamic": False}
    return {"num_bits": quant.bits, "type": "int", "symmetric": quant.symmetric, **strategy}


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
        CheckpointError: there is no such section, or it names something that msquant cannot compute: floats
            of 8 bits, inputs in other widths than int8, int4 weights with static inputs, a quantized cache,
            sparsity, rotations.
    """
    section = find_section(config)
    if section is None:
        raise _refused(f"quantization_config of {QUANT_METHOD} is missing")
    if section.get("format") not in _FORMATS:
        only = f"only {FORMAT} and {packed.FORMAT} are read"
        raise _refused(f"its format is {section.get('format')!r}, {only}")
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
    found = tuple(_group(name, value, section["format"]) for name, value in groups.items())
    read = Section(found, _strings("ignore", ignore))
    for target in (*read.ignore, *(target for group in read.groups for target in group.targets)):
        if target.startswith("re:"):
            try:
                re.compile(target[3:])
            except re.error as error:
                raise _refused(f"{target!r} is not a regular expression: {error}") from error
    return read


def _group(name: str, value: Any, whole: str) -> ConfigGroup:
    if not isinstance(value, dict):
        raise _refused(f"{name} is not a group")
    own = value.get("format") or (FORMAT if whole == MIXED else whole)
    if own not in (*_INT_FORMATS, packed.FORMAT):
        raise _refused(f"the format of {name} is {own!r}, only {FORMAT} and {packed.FORMAT} are read")
    if value.get("output_activations"):
        raise _refused(f"{name} quantizes outputs, which is not computed")
    weights, inputs = value.get("weights"), value.get("input_activations")
    if own == packed.FORMAT:
        return _packed_group(name, value, weights, inputs)
    if not isinstance(weights, dict) or not isinstance(inputs, dict):
        raise _refused(f"{name} quantizes weights or inputs alone: only both (W8A8, W4A8) are read in {own}")
    dynamic = bool(inputs.get("dynamic"))
    quant = _int_weights(name, weights, dynamic=dynamic)
    _expect(
        name,
        "input_activations",
        inputs,
        symmetric=(True,) if dynamic else (True, False),
        strategy=("token",) if dynamic else ("tensor",),
        dynamic=(dynamic,),
    )
    return ConfigGroup(
        name=name,
        targets=_strings(f"targets of {name}", value.get("targets")),
        scheme=replace(W8A8_DYNAMIC if dynamic else W8A8, weights=quant),
        symmetric=_value(inputs, "symmetric"),
        per_channel=_value(weights, "strategy") != "tensor",
    )


def _int_weights(name: str, weights: Mapping[str, Any], *, dynamic: bool) -> Quant:
    """The integers of weights that are stored one in a byte: int8, or with per-token inputs int4 as well."""
    four = dynamic and _value(weights, "num_bits") == 4
    _expect(
        name,
        "weights",
        weights,
        num_bits=(8, 4) if dynamic else (8,),
        symmetric=(True,),
        strategy=("channel", "group") if four else ("channel", "tensor"),
        dynamic=(False,),
        group_size=(weights.get("group_size"),) if four else (None,),
    )
    bits = 4 if four else 8
    return _grouped(name, weights, bits) if _value(weights, "strategy") == "group" else Quant(bits, "channel")


def _grouped(name: str, weights: Mapping[str, Any], bits: int, symmetric: bool = True) -> Quant:
    size = weights.get("group_size")
    if type(size) is not int or not 0 < size <= MOST_COLUMNS:
        raise _refused(f"group_size of the weights of {name} is {size!r}, a number of columns is expected")
    return Quant(bits, "group", size, symmetric)


def _packed_group(name: str, value: Mapping[str, Any], weights: Any, inputs: Any) -> ConfigGroup:
    if not isinstance(weights, dict) or inputs:
        raise _refused(f"{name} is {packed.FORMAT}, which is read with weights alone that are quantized")
    _expect(
        name,
        "weights",
        weights,
        num_bits=(2, 4, 8),
        symmetric=(True, False),
        strategy=("channel", "group"),
        dynamic=(False,),
        group_size=(weights.get("group_size"),),
        actorder=(None, "weight", "static", "group"),
    )
    symmetric, bits = _value(weights, "symmetric"), _value(weights, "num_bits")
    grouped = _value(weights, "strategy") == "group"
    quant = _grouped(name, weights, bits, symmetric) if grouped else Quant(bits, "channel", None, symmetric)
    return ConfigGroup(
        name=name,
        targets=_strings(f"targets of {name}", value.get("targets")),
        scheme=Scheme(quant),
        symmetric=True,
        per_channel=not grouped,
        ordered=grouped and weights.get("actorder") == "group",
    )


def _expect(group: str, part: str, values: Mapping[str, Any], **accepted: tuple[Any, ...]) -> None:
    left_out = dict.fromkeys(("group_size", "actorder", "block_structure"), (None,))
    wanted: dict[str, tuple[Any, ...]] = {"num_bits": (8,), "type": ("int",), **left_out, **accepted}
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
        remedy="msquant reads W8A8 with int8 weights and static or per-token int8 activations, W4A8 with "
        "int4 weights and per-token ones, and packed weights with inputs in floating point",
    )


def patterns(chosen: Iterable[str], others: Collection[str], *, fused: bool) -> list[str]:
    """Few patterns that match the chosen layers and none of the others, as `targets` and `ignore` take them.

    A name that begins with `re:` is a regular expression for the beginning of a layer's name; any other is
    the whole name, or the class of a layer (vllm 0.11.0, compressed_tensors/utils.py: `find_matched_target`).

    A layer is named by its kind where all of that kind are chosen, `re:.*\\.mlp\\.down_proj$`; else by its
    decoder layer where all in that are, `re:model\\.layers\\.61\\..*`; and else by its own name.

    Args:
        chosen: names of layers.
        others: names of all other linear layers.
        fused: whether to name the layers too that vLLM makes of the chosen ones. It looks for a fused layer's
            own name and class before it looks for its parts: with a target for `q_proj` alone, `qkv_proj`
            would go to a group for the class `Linear`.
    """
    modules = set(chosen)
    if fused:
        modules.update(fused_layers(module for module in modules if not experts_parent(module)))
    other_kinds, other_layers = {_kind(module) for module in others}, {_layer(module) for module in others}
    mixed = {module for module in modules if _kind(_unfused(module)) in other_kinds}
    whole = {_layer(module) for module in mixed} - other_layers - {""}
    names = {module for module in modules if _layer(module) not in whole}
    kinds: dict[str, set[str]] = defaultdict(set)
    for module in names - mixed:
        parent, name = _kind(module)
        kinds[parent].add(name)
    found = ["re:" + layer.replace(".", r"\.") + r"\..*" for layer in sorted(whole, key=_natural)]
    for parent, parts in sorted(kinds.items()):
        alternatives = f"({'|'.join(sorted(parts))})" if len(parts) > 1 else "".join(parts)
        # A name outside of the decoder layers, such as lm_head, is no pattern.
        found += [f"re:.*\\.{parent}{alternatives}$"] if parent else sorted(parts)
    return found + sorted({_name(module) for module in names & mixed}, key=_natural)


def _layer(module: str) -> str:
    found = _LAYER.match(module)
    return found[1] if found else ""


def _kind(module: str) -> tuple[str, str]:
    """The pattern of what a layer's name has between its decoder layer and its last part, and that part."""
    parent, _, name = module.rpartition(".")
    if not _LAYER.match(module):
        return "", module
    parts = _LAYER.sub("", f"{parent}.").split(".")
    # What lies in a decoder layer itself is told by the layer's number before it.
    return r"\.".join(r"\d+" if part.isdecimal() else part for part in parts) or r"\d+\.", name


def _unfused(module: str) -> str:
    """A part of a fused layer; all have one scheme. Any other layer as it is."""
    parent, _, name = module.rpartition(".")
    parts = fused_linears().get(name)
    return f"{parent}.{parts[0]}" if parts else module


def _name(module: str) -> str:
    """A layer's own name; all experts of a layer, which have one scheme, by one pattern."""
    parent = experts_parent(module)
    if parent is None:
        return module
    rest = module.removeprefix(f"{parent}.").partition(".")[2]
    return "re:" + f"{parent}.".replace(".", r"\.") + r"\d+\." + rest.replace(".", r"\.") + "$"


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
