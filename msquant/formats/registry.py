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
from msquant.formats.format import Format, FormatName
from msquant.formats.golden_stick_format import GoldenStickFormat
from msquant.formats.golden_stick_rules import description_files
from msquant.formats.golden_stick_schemes import variant_of

_MAKERS: dict[FormatName, Callable[[Mapping[str, Any]], Format]] = {
    "golden-stick": lambda config: GoldenStickFormat(variant_of(config)),
    "compressed-tensors": lambda config: CompressedTensorsFormat(),
    "ascend": lambda config: AscendFormat(),
}


def model_format(name: FormatName, config: Mapping[str, Any]) -> Format:
    """The format of that name for a model.

    Args:
        name: one of `FORMAT_NAMES`.
        config: the content of the model's `config.json`.
    """
    return _MAKERS[name](config)


def folder_format(folder: Path) -> Format | None:
    """The format that a folder is in, by its manifest or else by its files; None if in none of these.

    A file `quant_model_description.json` is msModelSlim's if it says its `version` or `model_quant_type`, and
    otherwise golden-stick's, which vLLM-MindSpore reads under that name too.
    """
    manifest, config = _content(folder / MANIFEST_NAME), _content(folder / "config.json")
    for name in _MAKERS:
        if manifest.get("format") == name:
            return model_format(name, config)
    if find_section(config):
        return model_format("compressed-tensors", config)
    described = _content(folder / DESCRIPTION_NAME)
    if "version" in described or "model_quant_type" in described:
        return model_format("ascend", config)
    return model_format("golden-stick", config) if description_files(folder) else None


def _content(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except CheckpointError:
        return {}
