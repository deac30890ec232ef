"""A local Hugging Face folder of safetensors, read lazily: headers at once, tensors one at a time."""

import math
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.shard import Shard
from msquant.checkpoint.weights import FloatLinear
from msquant.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_FLOAT_DTYPES = {"F16", "BF16", "F32", "F64"}
_PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Checkpoint:
    """The tensors of a folder by name; a `WeightSource` when they are in floating point.

    Attributes:
        folder: where it lies.
        shards: the files the index names, by file name.
        weight_map: the file name of each tensor's shard, by tensor name.
    """

    def __init__(self, folder: Path, shards: dict[str, Shard], weight_map: dict[str, str]) -> None:
        self.folder = folder
        self.shards = shards
        self.weight_map = weight_map

    @classmethod
    def open(cls, folder: Path | str) -> "Checkpoint":
        """Read the index and every shard's header, and check one against the other.

        Raises:
            CheckpointError: there is no checkpoint; a shard is missing, truncated or damaged; the index
                names a tensor that its shard does not hold, or a file outside the folder.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError("there is no such folder", where=folder, remedy="check the path")
        if (folder / INDEX_NAME).is_file():
            weight_map = _read_weight_map(folder / INDEX_NAME)
            shards = {name: Shard.open(folder / name) for name in sorted(set(weight_map.values()))}
            for tensor, name in weight_map.items():
                if tensor not in shards[name].entries:
                    raise CheckpointError(
                        f"{INDEX_NAME} places {tensor} in this shard, which does not hold it",
                        where=folder / name,
                        remedy="download the shard and the index again: they are of different versions",
                    )
        elif (folder / SINGLE_NAME).is_file():
            shard = Shard.open(folder / SINGLE_NAME)
            shards = {SINGLE_NAME: shard}
            weight_map = dict.fromkeys(shard.entries, SINGLE_NAME)
        else:
            raise _no_checkpoint(folder)
        return cls(folder, shards, weight_map)

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self.weight_map)

    def __contains__(self, name: str) -> bool:
        return name in self.weight_map

    def shard_path(self, name: str) -> Path:
        """The file that holds a tensor. Raises CheckpointError if there is no such tensor."""
        return self._shard(name).path

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape. Raises CheckpointError if there is no such tensor."""
        return self._shard(name).entries[name].shape

    def dtype(self, name: str) -> str:
        """A tensor's safetensors dtype, such as `BF16`. Raises CheckpointError if there is no such tensor."""
        return self._shard(name).entries[name].dtype

    def nbytes(self, name: str) -> int:
        """Bytes a tensor takes on disk. Raises CheckpointError if there is no such tensor."""
        return self._shard(name).entries[name].nbytes

    def expect(self, name: str, shape: tuple[int, ...]) -> None:
        """Check a tensor's shape against what the configuration says.

        Raises:
            CheckpointError: there is no such tensor, or its shape differs; names the tensor and both shapes.
        """
        found = self.shape(name)
        if found != tuple(shape):
            raise CheckpointError(
                f"{name} has shape {list(found)}, config.json says {list(shape)}",
                where=self.shard_path(name),
                remedy="use the config.json that belongs to these weights",
            )

    def raw(self, name: str) -> NDArray[Any]:
        """Return a tensor in the dtype it is stored in (bfloat16 and float8 as `ml_dtypes`), unchecked.

        Raises:
            CheckpointError: there is no such tensor, or its shard was changed since it was opened.
        """
        return self._shard(name).read(name)

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Return a floating-point tensor as float32.

        Raises:
            CheckpointError: there is no such tensor, it is stored as integers or float8 (which mean nothing
                without their scales), or it holds NaN or infinity.
        """
        dtype = self.dtype(name)
        if dtype not in _FLOAT_DTYPES:
            raise CheckpointError(
                f"{name} is stored as {dtype}, a floating-point tensor is expected",
                where=self.shard_path(name),
                remedy="start from the unquantized checkpoint (bfloat16, float16 or float32)",
            )
        with np.errstate(over="ignore"):
            values = self.raw(name).astype(np.float32, copy=False)
        # A float64 sum of finite float32 numbers cannot overflow: it is finite exactly when they all are.
        if not math.isfinite(float(values.sum(dtype=np.float64))):
            bad = values.size - int(np.count_nonzero(np.isfinite(values)))
            raise CheckpointError(
                f"{name} holds NaN or infinity in {bad} of {values.size} places",
                where=self.shard_path(name),
                remedy="download this shard again; if the published file holds them too, it cannot be used",
            )
        return values

    def rows(self, name: str, indices: NDArray[np.integer]) -> NDArray[np.float32]:
        """Return some rows of a floating-point tensor, `[len(indices), ...]`. Raises as `tensor`."""
        return self.tensor(name)[indices]

    def linear(self, module: str) -> FloatLinear:
        """Return the linear layer `module`, with its bias if one is stored.

        Raises:
            CheckpointError: as for `tensor`; or the weight is not a matrix, or the bias does not fit it.
        """
        weight_name, bias_name = f"{module}.weight", f"{module}.bias"
        shape = self.shape(weight_name)
        if len(shape) != 2:
            raise CheckpointError(
                f"{weight_name} has shape {list(shape)}, a matrix [N, K] is expected",
                where=self.shard_path(weight_name),
            )
        if bias_name not in self:
            return FloatLinear(self.tensor(weight_name))
        if self.shape(bias_name) != shape[:1]:
            raise CheckpointError(
                f"{bias_name} has shape {list(self.shape(bias_name))}, {weight_name} has {list(shape)}",
                where=self.shard_path(bias_name),
            )
        return FloatLinear(self.tensor(weight_name), self.tensor(bias_name))

    def _shard(self, name: str) -> Shard:
        if name not in self.weight_map:
            raise CheckpointError(
                f"there is no tensor {name}",
                where=self.folder,
                remedy="check that config.json and the weights are of the same model",
            )
        return self.shards[self.weight_map[name]]


def _read_weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("weight_map, from tensor names to shards, is missing or empty", where=path)
    for tensor, name in weight_map.items():
        # Shards themselves may be links out of the folder: the Hugging Face cache is made of them.
        if not isinstance(name, str) or not _is_file_name(name):
            raise CheckpointError(
                f"{tensor} is said to be in {name!r}, which is not the name of a file in this folder",
                where=path,
                remedy="do not use this checkpoint: its index points outside of its folder",
            )
        if not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{tensor} is in {name}: only safetensors files are read", where=path, remedy=_CONVERT
            )
    return weight_map


def _is_file_name(name: str) -> bool:
    return name == PurePosixPath(name).name and name not in ("", "..") and not set(name) & {"\\", "\0"}


_CONVERT = "convert the checkpoint with transformers: model.save_pretrained(folder, safe_serialization=True)"


def _no_checkpoint(folder: Path) -> CheckpointError:
    for pattern in _PICKLE_PATTERNS:
        if pickled := sorted(folder.glob(pattern)):
            return CheckpointError(
                f"only pickle files such as {pickled[0].name} are here: msquant reads safetensors only, "
                "because loading a pickle can run code",
                where=folder,
                remedy=_CONVERT,
            )
    if stray := sorted(folder.glob("*.safetensors")):
        return CheckpointError(
            f"{stray[0].name} is here, but {INDEX_NAME} that says which tensors are where is missing",
            where=folder,
            remedy=f"copy or download {INDEX_NAME} again",
        )
    return CheckpointError(
        f"neither {INDEX_NAME} nor {SINGLE_NAME} is here",
        where=folder,
        remedy="name the folder that holds config.json and the weights",
    )
