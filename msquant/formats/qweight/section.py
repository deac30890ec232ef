"""`quantization_config` of the folders whose weights are in `qweight`, as their tools write it.

Read in GPTQModel 7.6.0 (quantization/config.py: `FORMAT`, `QuantizeConfig`; utils/model.py:
`convert_gptq_v1_to_v2_format_module`), AutoRound 0.16.1 (export/export_to_autogptq, export_to_autoround,
export_to_awq; inference/backend.py: `GPTQ_FORMAT`, `GPTQ_FORMAT_NO_ZP`, `AWQ_FORMAT`) and transformers 4.57.1
(utils/quantization_config.py: `GPTQConfig`, `AwqConfig`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from msquant.errors import CheckpointError
from msquant.schemes import MOST_COLUMNS, Granularity, Quant, Scheme

BITS = (2, 4, 8)
"""Widths that fill 32 bits; others go over their ends, each tool in its own way."""


@dataclass(frozen=True)
class Packing:
    """Where the integers of a layer lie.

    Attributes:
        along_inputs: whether one number of `qweight` holds neighbours of a column of `[K, N]`, and not of a
            row of it.
        order: which of neighbouring integers lies in each place of a number, the lowest bits first; empty for
            their own order.
        zero_less: what is missing from each zero point that `qzeros` holds.
    """

    along_inputs: bool
    order: tuple[int, ...] = ()
    zero_less: int = 0


GPTQ = Packing(along_inputs=True, zero_less=1)
"""`gptq`, the first version of AutoGPTQ's layout."""

GPTQ_V2 = Packing(along_inputs=True)
"""`gptq_v2`."""

AWQ = Packing(along_inputs=False, order=(0, 2, 4, 6, 1, 3, 5, 7))
"""AutoAWQ's `gemm`."""


@dataclass(frozen=True)
class Layer:
    """How a linear layer is quantized.

    Attributes:
        bits: of an integer.
        group_size: columns that share a scale; None for one scale an output.
        symmetric: whether all zero points are the middle of the range.
        packing: where its integers lie.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    packing: Packing

    @property
    def scheme(self) -> Scheme:
        """How it is computed: its inputs stay in floating point."""
        granularity: Granularity = "channel" if self.group_size is None else "group"
        return Scheme(Quant(self.bits, granularity, self.group_size, self.symmetric))


@dataclass(frozen=True)
class Section:
    """What `config.json` says of the layers that have a `qweight`.

    Attributes:
        layer: of all that nothing else is said of.
        own: what is said of some, by the pattern that their names match from the beginning; None for layers
            that stay in floating point. The first that matches counts.
        skipped: parts of the names of layers that stay in floating point.
    """

    layer: Layer
    own: tuple[tuple[re.Pattern[str], Layer | None], ...] = ()
    skipped: tuple[str, ...] = ()

    def of(self, module: str) -> Layer | None:
        """How a layer is quantized; None if it is not."""
        if any(part in module for part in self.skipped):
            return None
        for pattern, layer in self.own:
            if pattern.match(module):
                return layer
        return self.layer


def find_section(config: Mapping[str, Any], methods: tuple[str, ...]) -> dict[str, Any] | None:
    """The section of a `config.json` whose `quant_method` is one of these; None if there is none."""
    found = config.get("quantization_config")
    return found if isinstance(found, dict) and found.get("quant_method") in methods else None


def read_gptq(section: Mapping[str, Any]) -> Section:
    """What GPTQModel, AutoGPTQ and AutoRound's `auto_gptq` say. Raises CheckpointError as `read_layer`."""
    key = "checkpoint_format" if section.get("checkpoint_format") is not None else "format"
    packing = _one_of(section, key, {"gptq": GPTQ, "gptq_v2": GPTQ_V2}, "gptq")
    _expect(section, pack_dtype=("int32",), is_marlin_format=(False,), rotation=("",), adapter=({},))
    layer = read_layer(section, packing)
    own = []
    for pattern, changes in _mapping(section, "dynamic").items():
        keep = pattern.startswith("-:")
        mine = None if keep else _changed(f"dynamic[{pattern!r}]", layer, changes)
        own.append((_pattern("dynamic", pattern.removeprefix("-:").removeprefix("+:")), mine))
    return Section(layer, tuple(own))


def read_awq(section: Mapping[str, Any]) -> Section:
    """What AutoAWQ, GPTQModel and AutoRound's `auto_awq` say. Raises CheckpointError as `read_layer`."""
    key = next((key for key in ("version", "checkpoint_format", "format") if section.get(key)), "version")
    packing = _one_of(section, key, {"gemm": AWQ}, "gemm")
    named = {"bits": section.get("bits", section.get("w_bit")), "sym": not section.get("zero_point", True)}
    size = section.get("group_size", section.get("q_group_size"))
    skipped = section.get("modules_to_not_convert") or []
    if not isinstance(skipped, list) or not all(isinstance(part, str) for part in skipped):
        raise _refused("modules_to_not_convert is not a list of names")
    return Section(read_layer({**named, "group_size": size}, packing), (), tuple(skipped))


def read_auto_round(section: Mapping[str, Any]) -> Section:
    """What AutoRound's own format says, `auto_round`. Raises CheckpointError as `read_layer`."""
    packings = {
        "auto_round:auto_gptq": GPTQ,
        "auto_round:gptq": GPTQ,
        "auto_round:auto_awq": AWQ,
        "auto_round:awq": AWQ,
        "auto_round:gptqmodel": GPTQ_V2,
        "auto_round": GPTQ_V2,
    }
    packing = _one_of(section, "packing_format", packings, "auto_round:auto_gptq")
    _expect(section, data_type=("int",), act_bits=(16, 32), super_bits=(), rotation_config=({},))
    layer = read_layer(section, packing)
    own = []
    for name, changes in _mapping(section, "extra_config").items():
        bits = changes.get("bits") if isinstance(changes, dict) else None
        mine = None if bits in (16, 32) else _changed(f"extra_config[{name!r}]", layer, changes)
        own.append((_pattern("extra_config", name, "$"), mine))
    return Section(layer, tuple(own))


def read_layer(said: Mapping[str, Any], packing: Packing, where: str = "") -> Layer:
    """The layer of `bits`, `group_size` and `sym`.

    Args:
        said: the section, or what it says of one layer.
        packing: where integers lie.
        where: what to call it in errors.

    Raises:
        CheckpointError: one of them is missing or of no value that is read.
    """
    bits, size, symmetric = said.get("bits"), said.get("group_size"), said.get("sym", True)
    of = f" of {where}" if where else ""
    allowed = (4,) if packing.order else BITS
    if type(bits) is not int or bits not in allowed:
        raise _refused(f"bits{of} is {bits!r}, {' or '.join(map(str, allowed))} is read")
    if type(size) is not int or not (size in (-1, 0) or 0 < size <= MOST_COLUMNS):
        raise _refused(f"group_size{of} is {size!r}, a number of columns or -1 is expected")
    if not isinstance(symmetric, bool):
        raise _refused(f"sym{of} is {symmetric!r}, true or false is expected")
    return Layer(bits, size if size > 0 else None, symmetric, packing)


def _changed(where: str, layer: Layer, changes: Any) -> Layer:
    """A layer with what is said of it alone."""
    if not isinstance(changes, dict):
        raise _refused(f"{where} is not a map")
    for key, allowed in (("data_type", ("int",)), ("act_bits", (16, 32))):
        if changes.get(key) is not None and changes[key] not in allowed:
            raise _refused(f"{key} of {where} is {changes[key]!r}, {allowed[0]!r} is read")
    said = {"bits": layer.bits, "group_size": layer.group_size or -1, "sym": layer.symmetric}
    return read_layer({**said, **changes}, layer.packing, where)


def _one_of(section: Mapping[str, Any], key: str, known: Mapping[str, Packing], default: str) -> Packing:
    value = section.get(key)
    found = known.get(value.lower() if isinstance(value, str) else default)
    if found is None or not isinstance(value, str | None):
        raise _refused(f"{key} is {value!r}, {' or '.join(known)} is read")
    return found


def _mapping(section: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = section.get(key) or {}
    if not isinstance(found, dict):
        raise _refused(f"{key} is not a map")
    return found


def _pattern(key: str, text: str, end: str = "") -> re.Pattern[str]:
    """A regular expression, and what is put behind it."""
    try:
        re.compile(text)
        return re.compile(text + end)
    except re.error as error:
        raise _refused(f"{key} has {text!r}, which is not a regular expression: {error}") from error


def _expect(section: Mapping[str, Any], **allowed: tuple[Any, ...]) -> None:
    for key, values in allowed.items():
        found = section.get(key)
        if found is not None and found not in values:
            only = f", {values[0]!r} is read" if values and values[0] else ": that is not computed"
            raise _refused(f"{key} is {found!r}{only}")


def _refused(what: str) -> CheckpointError:
    return CheckpointError(
        f"quantization_config: {what}",
        where="config.json",
        remedy="msquant reads GPTQ's, AWQ's and AutoRound's integers of 2, 4 or 8 bits with inputs in "
        "floating point; export the model with one of these again",
    )
