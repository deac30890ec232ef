"""The formats by name, and the one that a folder is in."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.results import MANIFEST_NAME
from msquant.errors import CheckpointError, RecipeError
from msquant.formats.format import Format, FormatName
from msquant.formats.golden_stick_format import GoldenStickFormat
from msquant.formats.golden_stick_rules import description_files
from msquant.formats.golden_stick_schemes import variant_of

_MAKERS: dict[FormatName, Callable[[Mapping[str, Any]], Format]] = {
    "golden-stick": lambda config: GoldenStickFormat(variant_of(config)),
}


def model_format(name: FormatName, config: Mapping[str, Any]) -> Format:
    """The format of that name for a model.

    Args:
        name: one of `FORMAT_NAMES`.
        config: the content of the model's `config.json`.

    Raises:
        RecipeError: it cannot be written yet.
    """
    if name not in _MAKERS:
        raise RecipeError(
            f"{name} cannot be written yet", where="format", remedy=f"use one of {', '.join(_MAKERS)}"
        )
    return _MAKERS[name](config)


def folder_format(folder: Path) -> Format | None:
    """The format that a folder is in, by its manifest or else by its files; None if in none of ours."""
    manifest, config = _content(folder / MANIFEST_NAME), _content(folder / "config.json")
    for name in _MAKERS:
        if manifest.get("format") == name:
            return model_format(name, config)
    return model_format("golden-stick", config) if description_files(folder) else None


def _content(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except CheckpointError:
        return {}
