"""The formats by name, and the one that a folder is in."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator

from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.results import MANIFEST_NAME
from msquant.errors import CheckpointError, RecipeError, choices
from msquant.formats.ascend.form import AscendFormat
from msquant.formats.base import Format
from msquant.formats.compressed_tensors.form import CompressedTensorsFormat
from msquant.formats.golden_stick.form import GoldenStickFormat
from msquant.formats.qweight.form import AutoRoundFormat, AwqFormat, GptqFormat

_REGISTERED: dict[str, type[Format]] = {}

DEFAULT_FORMAT = GoldenStickFormat.name
"""The format of a recipe that names none."""


def register(form: type[Format]) -> type[Format]:
    """Make a format known by its name; a decorator of its class."""
    _REGISTERED[form.name] = form
    return form


for _shipped in (
    GoldenStickFormat,
    CompressedTensorsFormat,
    AscendFormat,
    GptqFormat,
    AwqFormat,
    AutoRoundFormat,
):
    register(_shipped)


def format_names() -> tuple[str, ...]:
    """The names of all formats that msquant writes, the default one first."""
    return tuple(name for name, form in _REGISTERED.items() if form.written)


def readable_formats() -> tuple[str, ...]:
    """The names of all formats that msquant reads: those that it writes, then those of other tools."""
    return tuple(sorted(_REGISTERED, key=lambda name: not _REGISTERED[name].written))


def find_format(name: str, where: str = "format") -> type[Format]:
    """The format of that name.

    Args:
        name: one of `readable_formats()`.
        where: it was asked for, for the error.

    Raises:
        RecipeError: there is none.
    """
    if name not in _REGISTERED:
        raise RecipeError(f"{name!r} is not a format", where=where, remedy=choices(name, format_names()))
    return _REGISTERED[name]


def read_only_name(config: Mapping[str, Any]) -> str | None:
    """The format of another tool that a `config.json` says, where msquant reads it alone; else None."""
    alone = (form for form in _REGISTERED.values() if not form.written)
    return next((form.name for form in alone if form.is_in(Path(), config)), None)


def any_model_formats() -> tuple[str, ...]:
    """The formats that need no family of the model, that of vllm-ascend first."""
    return tuple(name for name in reversed(format_names()) if _REGISTERED[name].takes_any_model)


def marked_formats() -> dict[str, type[Format]]:
    """The formats that say in a file of their own how a folder is quantized, by the name of that file."""
    return {form.marker: form for form in _REGISTERED.values() if form.marker is not None}


def _known(value: Any) -> Any:
    names = list(value) if isinstance(value, list | tuple) else [value]
    if not names or any(name not in format_names() or names.count(name) > 1 for name in names):
        raise ValueError(f"one of {', '.join(format_names())} is expected, or a list of them, each once")
    return names[0] if len(names) == 1 else tuple(names)


FormatName: TypeAlias = str
"""A format by its name, as recipes and manifests have it: one of `format_names()`."""

FormatNames = Annotated[FormatName | tuple[FormatName, ...], BeforeValidator(_known)]
"""One format, or several in a list, as a recipe asks for them."""

FORMAT_DESCRIPTION = (
    f"The checkpoint format to write: {', '.join(format_names())}; or a list of them, each in its own folder."
)


def parse_formats(text: str) -> FormatName | tuple[FormatName, ...]:
    """The formats that an option names, with commas between them. Raises RecipeError."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        find_format(name, "--format")
    try:
        found: FormatName | tuple[FormatName, ...] = _known(names)
    except ValueError as error:
        raise RecipeError(f"is {text!r}: {error}", where="--format") from error
    return found


def names_of(formats: FormatName | tuple[FormatName, ...]) -> tuple[FormatName, ...]:
    """One format or several as a tuple."""
    return formats if isinstance(formats, tuple) else (formats,)


def model_format(name: str, config: Mapping[str, Any]) -> Format:
    """The format of that name for a model.

    Args:
        name: one of `format_names()`.
        config: the content of the model's `config.json`.

    Raises:
        RecipeError: there is no format of that name.
    """
    return find_format(name).of(config, {})


def folder_format(folder: Path) -> Format | None:
    """The format that a folder is in, by its manifest or else by its files; None if in none of these."""
    manifest, config = _content(folder / MANIFEST_NAME), _content(folder / "config.json")
    recorded = manifest.get("format")
    if isinstance(recorded, str) and recorded in _REGISTERED:
        return _REGISTERED[recorded].of(config, manifest)
    # vLLM reads a section of config.json before any file beside it. Of such files golden-stick takes
    # whatever no other format does.
    last_first = [*reversed(_REGISTERED.values())]
    for form in sorted(last_first, key=lambda form: form.marker is not None):
        if form.is_in(folder, config):
            return form.of(config, manifest)
    return None


def refuse_other_formats(folder: Path) -> None:
    """Raise CheckpointError if `config.json` says that a folder is quantized in a way not read here."""
    found = _content(folder / "config.json").get("quantization_config")
    if found is not None:
        known = ", ".join(readable_formats())
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise CheckpointError(
            f"quantized as {method!r}, which msquant cannot read",
            where=folder / "config.json",
            remedy=f"give a folder in one of the formats {known}, or one in floating point",
        )


def _content(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except CheckpointError:
        return {}
