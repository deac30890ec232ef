"""Files that are either wholly there or not at all: a temporary name, a sync, a rename."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from msquant.checkpoint.disk import sync_folder, writing
from msquant.checkpoint.file_names import INDEX_NAME


def write_shard(path: Path, tensors: Mapping[str, NDArray[Any]]) -> str:
    """Write a safetensors file; the same tensors always give the same bytes.

    Args:
        path: the file, replaced if it exists.
        tensors: arrays by name, in any order; bfloat16 as `ml_dtypes.bfloat16`.

    Returns:
        sha256 of the file in hexadecimal, taken by reading it back: it vouches for what is
        in the file and not for what should have been written.

    Raises:
        OutputError: the disk is full or cannot be written.
    """
    # save_file writes the memory of an array as it lies, whatever its strides are.
    contiguous = {name: np.asarray(tensors[name], order="C") for name in sorted(tensors)}
    needed = sum(array.nbytes for array in contiguous.values())

    def save(temporary: Path) -> str:
        # transformers refuses a file without this format.
        save_file(contiguous, temporary, metadata={"format": "pt"})
        return file_sha256(temporary)

    return _write_atomically(path, save, needed)


def write_text(path: Path, text: str) -> str:
    """Write a UTF-8 text file; returns its sha256. Raises OutputError if it cannot be written."""
    data = text.encode("utf-8")

    def save(temporary: Path) -> str:
        temporary.write_bytes(data)
        return file_sha256(temporary)

    return _write_atomically(path, save, len(data))


def write_json(path: Path, value: Any) -> str:
    """Write indented JSON; returns its sha256. Raises OutputError if it cannot be written."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def shard_name(number: int, count: int) -> str:
    """The Hugging Face name of shard `number`, from 1, of `count`: `model-00001-of-00031.safetensors`."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, weight_map: Mapping[str, str], total_size: int) -> str:
    """Write `model.safetensors.index.json`; returns its sha256.

    Args:
        folder: where the shards are.
        weight_map: the file name of each tensor's shard, by tensor name.
        total_size: bytes of all tensors together.

    Raises:
        OutputError: the disk is full or cannot be written.
    """
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    return write_json(folder / INDEX_NAME, index)


def file_sha256(path: Path) -> str:
    """sha256 of a file in hexadecimal. Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def temporary_path(path: Path) -> Path:
    """Where a file is written before it is given its name."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def is_temporary(name: str) -> bool:
    """Whether a file name is one of `temporary_path`: what a killed process may leave."""
    return re.fullmatch(r"\..+\.\d+\.tmp", name) is not None


def publish(temporary: Path, path: Path) -> None:
    """Give a complete, closed or synced file its name, for good. Raises OSError."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    # The safetensors library creates files that only their owner may read.
    temporary.chmod(0o666 & ~_umask())
    os.replace(temporary, path)
    sync_folder(path.parent)


def _write_atomically(path: Path, save: Callable[[Path], str], needed_bytes: int) -> str:
    temporary = temporary_path(path)
    try:
        with writing(path, needed_bytes):
            digest = save(temporary)
            publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return digest


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
