"""The rules that a folder must keep in any format: its index, its shapes, its manifest."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from msquant.checkpoint.decoder_layout import expected_shapes, extra_shapes
from msquant.checkpoint.file_names import is_file_name
from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.reader import INDEX_NAME, Checkpoint
from msquant.checkpoint.results import MANIFEST_NAME
from msquant.checkpoint.writer import file_sha256
from msquant.errors import CheckpointError
from msquant.formats.format import Finding

_T = TypeVar("_T")


def attempt(findings: list[Finding], action: Callable[[], _T]) -> _T | None:
    """What an action returns; None if it raises CheckpointError, which is added to the findings."""
    try:
        return action()
    except CheckpointError as error:
        findings.append(_finding(error))
        return None


def open_folder(
    folder: Path, findings: list[Finding], *, verify_hashes: bool
) -> tuple[dict[str, Any] | None, Checkpoint | None]:
    """Open a folder to check it, and check what is the same in every format.

    Args:
        folder: the checkpoint.
        findings: takes the broken rules.
        verify_hashes: also compare every file's sha256 with the manifest, which reads everything.

    Returns:
        The content of `config.json` and the tensors, each None where it cannot be read.
    """
    config = attempt(findings, lambda: read_json(folder / "config.json"))
    checkpoint = attempt(findings, lambda: Checkpoint.open(folder))
    findings.extend(check_manifest(folder, verify_hashes))
    if checkpoint is not None:
        findings.extend(_check_index(checkpoint))
        if config is not None:
            findings.extend(_check_shapes(checkpoint, config))
    return config, checkpoint


def _check_shapes(checkpoint: Checkpoint, config: dict[str, Any]) -> Iterator[Finding]:
    """Check that every tensor that `config.json` implies is there with its shape.

    Multi-token-prediction layers are there as a whole or not at all. A model of an unknown type has no rules.
    """
    try:
        extra = extra_shapes(config)
        predicts = any(name in checkpoint for name in extra)
        expected = {**(expected_shapes(config) or {}), **(extra if predicts else {})}
    except CheckpointError as error:
        yield _finding(error)
        return
    for name, shape in expected.items():
        if name not in checkpoint:
            yield Finding(name, "missing: config.json says the model has it")
        elif checkpoint.shape(name) != shape:
            yield Finding(name, f"has shape {list(checkpoint.shape(name))}, config.json says {list(shape)}")


def _check_index(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Check that the index knows every tensor that is stored."""
    for file_name, shard in checkpoint.shards.items():
        for name in shard.entries:
            if checkpoint.weight_map.get(name) != file_name:
                yield Finding(name, f"stored in {file_name}, but {INDEX_NAME} does not say so")


def check_manifest(folder: Path, verify_hashes: bool, suffix: str = "") -> Iterator[Finding]:
    """Check that every file that `msquant.json` lists is there with its size.

    A folder of another tool has no such file, and is not worse for it.

    Args:
        folder: the checkpoint.
        verify_hashes: also compare every file's sha256.
        suffix: only of files whose names end so.
    """
    if not (folder / MANIFEST_NAME).exists():
        return
    try:
        files = read_json(folder / MANIFEST_NAME).get("files", {})
        entries = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except CheckpointError as error:
        yield Finding(MANIFEST_NAME, error.what)
        return
    except (AttributeError, TypeError, KeyError):
        yield Finding(MANIFEST_NAME, "files is not a map from names to size and sha256")
        return
    for name, (size, sha256) in entries.items():
        path = folder / name
        if not name.endswith(suffix):
            continue
        if not is_file_name(name):
            yield Finding(MANIFEST_NAME, f"lists {name!r}, which is not the name of a file in this folder")
        elif not path.is_file():
            yield Finding(name, f"missing: {MANIFEST_NAME} lists it")
        elif path.stat().st_size != size:
            yield Finding(name, f"has {path.stat().st_size} bytes, {MANIFEST_NAME} says {size}")
        elif verify_hashes and file_sha256(path) != sha256:
            yield Finding(name, f"was changed: its sha256 is not the one in {MANIFEST_NAME}")


def _finding(error: CheckpointError) -> Finding:
    return Finding(Path(error.where).name if error.where else "", error.what)
