"""The rotation that msModelSlim's QuaRot has folded into a model's weights, as its folders hold it.

Read in msModelSlim (save/ascendv1.py: `on_quarot_extra_info_wrapper`; processor/quarot/offline_quarot/
quarot.py: `export_extra_info`) and vllm-ascend 0.23.0 and 0.26.0rc1 (patch/worker/patch_draft_quarot.py). The
entry `optional` of a description names a file with the matrix Q, `[H, H]`: hidden states h of the model are
h Q in the folder's basis. No server needs it for the model itself; vllm-ascend turns an EAGLE-3 draft with
it.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.file_names import path_problem
from msquant.checkpoint.shard import Shard
from msquant.errors import CheckpointError

ENTRY = "optional"
"""The entry of a description."""

_TENSOR, _PATH = "global_rotation", "optional/quarot.safetensors"

ENTRIES: Mapping[str, Any] = {ENTRY: {"quarot": {"rotation_map": {_TENSOR: _PATH}}}}
"""What the description says of a folder that has the matrix."""

# How far from 0 and 1 the products of its columns may be: another tool stores it in bfloat16.
_TOLERANCE = 2e-2


def shards(matrix: NDArray[np.float32]) -> dict[str, dict[str, NDArray[Any]]]:
    """The file with the matrix, `[H, H]`, by its path in the folder."""
    return {_PATH: {_TENSOR: matrix}}


def global_rotation(folder: Path, entries: Mapping[str, Any], hidden_size: Any) -> NDArray[np.float32] | None:
    """The matrix Q of a folder, float32 `[H, H]`; None where its description names none.

    Args:
        folder: the checkpoint.
        entries: of its description.
        hidden_size: H, as `config.json` says; anything but a number is named, and no matrix read.

    Raises:
        CheckpointError: the entry is no path of a file in the folder, or the file holds no orthogonal matrix
            of the model's size.
    """
    found: Any = entries
    for key in (ENTRY, "quarot", "rotation_map", _TENSOR):
        found = found.get(key) if isinstance(found, Mapping) else None
    if found is None:
        return None
    if not isinstance(found, str) or (problem := path_problem(found)):
        problem = problem if isinstance(found, str) else "it is no path"
        raise CheckpointError(f"{_TENSOR} in {ENTRY} is {found!r}: {problem}", where=folder)
    path = folder / found
    # Unlike `Path.resolve`, this takes links that lead in a circle.
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise CheckpointError(f"{_TENSOR} in {ENTRY} is {found!r}, which is not in the folder", where=folder)
    shard = Shard.open(path)
    if _TENSOR not in shard.entries:
        raise CheckpointError(f"holds no {_TENSOR}", where=path)
    shape = shard.entries[_TENSOR].shape
    if len(shape) != 2 or shape[0] != shape[1]:
        raise CheckpointError(f"{_TENSOR} has shape {list(shape)}, a square is expected", where=path)
    wrong = CheckpointError(
        f"{_TENSOR} is of {shape[0]} channels, config.json says {hidden_size}", where=path
    )
    # Before it is read: a file may claim any size.
    if type(hidden_size) is not int or shape[0] > hidden_size:
        raise wrong
    matrix = shard.read(_TENSOR).astype(np.float32)
    away = np.abs(matrix.T @ matrix - np.eye(len(matrix), dtype=np.float32)).max(initial=0)
    if not away <= _TOLERANCE:
        raise CheckpointError(f"{_TENSOR} is not orthogonal (by {away:.2g})", where=path)
    if len(matrix) != hidden_size:
        raise wrong
    return matrix
