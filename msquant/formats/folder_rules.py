"""The rules that formats have in common: of a folder's index, shapes and manifest, and of single tensors."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from msquant.checkpoint.checkpoint_reader import INDEX_NAME, Checkpoint
from msquant.checkpoint.disk import shown_sizes
from msquant.checkpoint.file_names import path_problem
from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.results import MANIFEST_NAME
from msquant.checkpoint.writer import file_sha256
from msquant.errors import CheckpointError
from msquant.families import expected_shapes, extra_shapes
from msquant.formats.dtypes import DTYPE_CODES
from msquant.formats.scales import all_positive, all_signed
from msquant.schemes import Quant

_T = TypeVar("_T")

Shape = tuple[int, ...]
Parts = dict[str, tuple[frozenset[str], tuple[Shape, ...]]]
"""The accepted dtypes and shapes of a layer's tensors, by the last part of their names."""

FLOAT_CODES = frozenset(DTYPE_CODES.values())
"""The safetensors dtypes of floating-point tensors."""

_TABLES = frozenset({"I64", "I32", "BOOL"})

# Bytes of a floating-point tensor that are looked at in one piece: embeddings are never in memory whole.
_PIECE_BYTES = 2**26


@dataclass(frozen=True)
class Finding:
    """One broken rule.

    Attributes:
        where: the tensor, layer or file.
        problem: what is wrong with it.
    """

    where: str
    problem: str

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


@dataclass(frozen=True)
class StoredTensor:
    """What holds a tensor of the model.

    Attributes:
        name: of the tensor that is stored.
        shape: of the model's, which differs from the stored one's where one number holds several.
    """

    name: str
    shape: tuple[int, ...]


Stored = Callable[[Checkpoint, str], StoredTensor | None]
"""Finds what holds a tensor of the model in a folder; None where nothing does."""


def attempt(findings: list[Finding], action: Callable[[], _T]) -> _T | None:
    """What an action returns; None if it raises CheckpointError, which is added to the findings."""
    try:
        return action()
    except CheckpointError as error:
        findings.append(_finding(error))
        return None


def open_folder(
    folder: Path, findings: list[Finding], stored: Stored, *, verify_hashes: bool
) -> tuple[dict[str, Any] | None, Checkpoint | None]:
    """Open a folder to check it, and check what is the same in every format.

    Args:
        folder: the checkpoint.
        findings: takes the broken rules.
        stored: finds what holds a tensor of the model.
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
            findings.extend(_check_shapes(checkpoint, config, stored))
    return config, checkpoint


def _check_shapes(checkpoint: Checkpoint, config: dict[str, Any], stored: Stored) -> Iterator[Finding]:
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
        try:
            found = stored(checkpoint, name)
        except CheckpointError as error:
            yield _finding(error)
            continue
        if found is None:
            yield Finding(name, "missing: config.json says the model has it")
        elif found.shape != shape:
            yield Finding(found.name, f"has shape {list(found.shape)}, config.json says {list(shape)}")


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
        if path_problem(name) is not None:
            yield Finding(MANIFEST_NAME, f"lists {name!r}, which is not the name of a file in this folder")
        elif not path.is_file():
            yield Finding(name, f"missing: {MANIFEST_NAME} lists it")
        elif path.stat().st_size != size:
            here, written = shown_sizes(path.stat().st_size, size)
            yield Finding(name, f"has {here}, {MANIFEST_NAME} says {written}")
        elif verify_hashes and file_sha256(path) != sha256:
            yield Finding(name, f"was changed: its sha256 is not the one in {MANIFEST_NAME}")


def _finding(error: CheckpointError) -> Finding:
    return Finding(Path(error.where).name if error.where else "", error.what)


def check_float(checkpoint: Checkpoint, name: str) -> Iterator[Finding]:
    """Check that a tensor is stored in floating point and holds neither NaN nor infinity.

    A table of integers, which some models have beside their weights, is none of a linear layer.
    """
    if checkpoint.dtype(name) in _TABLES and not name.endswith((".weight", ".bias")):
        return
    if checkpoint.dtype(name) not in FLOAT_CODES:
        yield Finding(name, f"stored as {checkpoint.dtype(name)}, but described as FLOAT")
        return
    try:
        for _ in checkpoint.row_blocks(name, _PIECE_BYTES):
            pass
    except CheckpointError as error:
        yield Finding(name, error.what.removeprefix(f"{name} "))


def check_parts(checkpoint: Checkpoint, module: str, parts: Parts) -> list[Finding]:
    """Check the dtypes and shapes of a quantized layer's tensors, from the headers alone.

    Args:
        checkpoint: the opened folder.
        module: the layer, for example `model.layers.0.mlp.up_proj`.
        parts: what they must be; all are there.
    """
    found = []
    for part, (codes, shapes) in parts.items():
        name = f"{module}.{part}"
        if (stored := checkpoint.dtype(name)) not in codes:
            wanted = "a floating-point dtype" if codes == FLOAT_CODES else " or ".join(sorted(codes))
            bits = ", the form of float32 bits" if part == "deq_scale" and stored == "I64" else ""
            found.append(Finding(name, f"stored as {stored}{bits}, {wanted} is expected"))
        if checkpoint.shape(name) not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            found.append(Finding(name, f"has shape {list(checkpoint.shape(name))}, {wanted} is expected"))
    return found


def layer_shape(checkpoint: Checkpoint, module: str, parts: Iterable[str]) -> tuple[int, int] | list[Finding]:
    """The shape `(N, K)` of a quantized layer, or what keeps it from having one.

    Args:
        checkpoint: the opened folder.
        module: the layer.
        parts: the tensors that it consists of.
    """
    missing = [f"{module}.{part}" for part in parts if f"{module}.{part}" not in checkpoint]
    if missing:
        return [Finding(name, "missing from a quantized layer") for name in missing]
    shape = checkpoint.shape(f"{module}.weight")
    if len(shape) != 2:
        return [Finding(f"{module}.weight", f"has shape {list(shape)}, a matrix [N, K] is expected")]
    return shape[0], shape[1]


def check_integers(checkpoint: Checkpoint, name: str, quant: Quant) -> Iterator[Finding]:
    """Check that a tensor of integers, one in a byte, holds none that its number of bits does not."""
    values = checkpoint.raw(name)
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    if low < quant.low or high > quant.high:
        yield Finding(
            name, f"holds {low} to {high}, integers of {quant.bits} bits are {quant.low} to {quant.high}"
        )


def check_signed(checkpoint: Checkpoint, name: str) -> Iterator[Finding]:
    """Check a tensor of scales of weights alone, which may have either sign."""
    if not all_signed(checkpoint.raw(name).astype(np.float32)):
        yield Finding(name, "holds a scale that is 0 or not finite")


def check_positive(checkpoint: Checkpoint, name: str) -> Iterator[Finding]:
    """Check that a tensor of scales in floating point is positive and finite."""
    if not all_positive(checkpoint.raw(name).astype(np.float32)):
        yield Finding(name, "holds a scale that is not positive and finite")
