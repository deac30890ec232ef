"""The formats by name, and the one that a folder is in."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.results import MANIFEST_NAME
from msquant.errors import CheckpointError
from msquant.formats.ascend_format import AscendFormat
from msquant.formats.ascend_schemes import DESCRIPTION_NAME
from msquant.formats.compressed_tensors_format import CompressedTensorsFormat
from msquant.formats.compressed_tensors_section import find_section
from msquant.formats.format import FORMAT_NAMES, Format, FormatName
from msquant.formats.golden_stick_format import GoldenStickFormat
from msquant.formats.golden_stick_rules import description_files
from msquant.formats.golden_stick_schemes import folder_variant, variant_of

_Json = Mapping[str, Any]


def _golden_stick(config: _Json, manifest: _Json) -> Format:
    try:
        return GoldenStickFormat(folder_variant(config, manifest))
    except CheckpointError:
        # The rules report it.
        return GoldenStickFormat(variant_of(config))


_MAKERS: dict[FormatName, Callable[[_Json, _Json], Format]] = {
    "golden-stick": _golden_stick,
    "compressed-tensors": lambda config, manifest: CompressedTensorsFormat(),
    "ascend": lambda config, manifest: AscendFormat(),
}


def model_format(name: FormatName, config: _Json) -> Format:
    """The format of that name for a model.

    Args:
        name: one of `FORMAT_NAMES`.
        config: the content of the model's `config.json`.
    """
    return _MAKERS[name](config, {})


def folder_format(folder: Path) -> Format | None:
    """The format that a folder is in, by its manifest or else by its files; None if in none of these.

    A file `quant_model_description.json` is msModelSlim's if it says its `version` or `model_quant_type`, and
    otherwise golden-stick's, which vLLM-MindSpore reads under that name too.
    """
    manifest, config = _content(folder / MANIFEST_NAME), _content(folder / "config.json")
    name = _name(folder, manifest, config)
    return None if name is None else _MAKERS[name](config, manifest)


def _name(folder: Path, manifest: _Json, config: _Json) -> FormatName | None:
    for name in FORMAT_NAMES:
        if manifest.get("format") == name:
            return name
    if find_section(config):
        return "compressed-tensors"
    described = _content(folder / DESCRIPTION_NAME)
    if "version" in described or "model_quant_type" in described:
        return "ascend"
    return "golden-stick" if description_files(folder) else None


def refuse_other_formats(folder: Path) -> None:
    """Raise CheckpointError if `config.json` says that a folder is quantized in a way not read here."""
    found = _content(folder / "config.json").get("quantization_config")
    if found is not None:
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise CheckpointError(
            f"quantized as {method!r}, which msquant cannot read",
            where=folder / "config.json",
            remedy=f"give a folder in one of the formats {', '.join(FORMAT_NAMES)}, or one in floating point",
        )


def _content(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except CheckpointError:
        return {}
