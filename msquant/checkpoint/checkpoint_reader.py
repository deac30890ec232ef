"""A local Hugging Face folder of safetensors, read lazily: headers at once, tensors one at a time."""

import hashlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.file_names import INDEX_NAME, SINGLE_NAME
from msquant.checkpoint.float_rows import FloatRows, check_dtype
from msquant.checkpoint.fp8 import FP8, SCALE_SUFFIX, BlockScale, check_scale_shape, read_block_size
from msquant.checkpoint.shard import Shard
from msquant.checkpoint.weight_map import find_weights, read_weight_map
from msquant.checkpoint.weights import FloatLinear
from msquant.errors import CheckpointError

__all__ = ["INDEX_NAME", "SINGLE_NAME", "Checkpoint"]


class Checkpoint:
    """The tensors of a folder by name; a `WeightSource` when they are in floating point.

    Attributes:
        folder: where it lies.
        shards: the files the index names, by file name.
        weight_map: the file name of each tensor's shard, by tensor name.
        aliases: tensors that are stored once, under another name, by the name that they are asked for by too.
    """

    def __init__(
        self,
        folder: Path,
        shards: dict[str, Shard],
        weight_map: dict[str, str],
        aliases: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.folder = folder
        self.shards = shards
        self.weight_map = weight_map
        self.aliases = aliases

    @classmethod
    def open(cls, folder: Path | str) -> "Checkpoint":
        """Read the index and every shard's header, and check one against the other.

        Raises:
            CheckpointError: there is no checkpoint; a shard is missing, truncated or damaged; the index
                names a tensor that its shard does not hold, or a file outside the folder; or as
                `require_own_files`.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError("there is no such folder", where=folder, remedy="check the path")
        found = find_weights(folder)
        if found.suffix == ".json":
            weight_map = read_weight_map(found)
            shards = {name: Shard.open(folder / name) for name in sorted(set(weight_map.values()))}
            for tensor, name in weight_map.items():
                if tensor not in shards[name].entries:
                    raise CheckpointError(
                        f"{found.name} places {tensor} in this shard, which does not hold it",
                        where=folder / name,
                        remedy="download the shard and the index again: they are of different versions",
                    )
        else:
            shards = {found.name: Shard.open(found)}
            weight_map = dict.fromkeys(shards[found.name].entries, found.name)
        return cls(folder, shards, weight_map)

    def with_aliases(self, aliases: Mapping[str, str]) -> "Checkpoint":
        """The same, in which tensors have further names; see `aliases`."""
        return Checkpoint(self.folder, self.shards, self.weight_map, aliases)

    def names(self) -> list[str]:
        """Names of all tensors as they are stored, sorted."""
        return sorted(self.weight_map)

    @cached_property
    def by_module(self) -> dict[str, list[str]]:
        """The same by what stands before the last dot of each; none stands before it in a name without."""
        found: dict[str, list[str]] = {}
        for name in self.names():
            found.setdefault(name.rpartition(".")[0], []).append(name)
        return found

    def parameters(self) -> list[str]:
        """Names of all tensors but the scales of others, sorted."""
        return [name for name in self.names() if not self.is_scale(name)]

    def is_scale(self, name: str) -> bool:
        """Whether a tensor holds the block scales of another."""
        return name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in self.weight_map

    def __contains__(self, name: str) -> bool:
        return self.stored_name(name) in self.weight_map

    def shard_path(self, name: str) -> Path:
        """The file that holds a tensor. Raises CheckpointError if there is no such tensor."""
        return self._shard(name).path

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape. Raises CheckpointError if there is no such tensor."""
        return self._shard(name).entries[self.stored_name(name)].shape

    def dtype(self, name: str) -> str:
        """A tensor's safetensors dtype, such as `BF16`. Raises CheckpointError if there is no such tensor."""
        return self._shard(name).entries[self.stored_name(name)].dtype

    def nbytes(self, name: str) -> int:
        """Bytes a tensor takes on disk. Raises CheckpointError if there is no such tensor."""
        return self._shard(name).entries[self.stored_name(name)].nbytes

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

    def expect_weight(self, name: str, shape: tuple[int, ...]) -> None:
        """As `expect`, and check from the headers alone that `tensor` finds what it needs.

        Raises:
            CheckpointError: as `expect`; it is stored as integers; it is FP8 and its scales are missing or of
                another shape.
        """
        self.expect(name, shape)
        self._scale_name(name)

    def raw(self, name: str) -> NDArray[Any]:
        """Return a tensor in the dtype it is stored in (bfloat16 and float8 as `ml_dtypes`), unchecked.

        Raises:
            CheckpointError: there is no such tensor, or its shard was changed since it was opened.
        """
        return self._shard(name).read(self.stored_name(name))

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Return a floating-point tensor as float32; FP8 with block scales is dequantized (see `fp8`).

        Raises:
            CheckpointError: there is no such tensor; it is stored as integers; it is FP8 and its scales are
                missing or wrong; its shard was changed since it was opened; it holds NaN or infinity.
        """
        rows = self._float_rows(name)
        return rows.read(0, rows.count).reshape(self.shape(name))

    def rows(self, name: str, indices: NDArray[np.integer]) -> NDArray[np.float32]:
        """Return some rows of a floating-point tensor, `[len(indices), ...]`; only those are read.

        Raises:
            CheckpointError: as for `tensor`, or there is no such row.
        """
        return self._float_rows(name).take(indices)

    def row_blocks(self, name: str, max_bytes: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Read a floating-point tensor by blocks of rows, in order.

        Args:
            name: the tensor.
            max_bytes: of a block in float32; a single row may be larger.

        Returns:
            Pairs of a block's first row and its rows `[n, ...]`; a scalar is one row `[1]`.

        Raises:
            CheckpointError: as for `tensor`, when the block is read.
        """
        return self._float_rows(name).blocks(max_bytes)

    def float_rows(self, name: str) -> FloatRows:
        """A floating-point tensor, of which nothing is in memory. Raises CheckpointError as for `tensor`."""
        return self._float_rows(name)

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

    def fingerprint(self) -> dict[str, Any]:
        """What tells this checkpoint from another, by headers alone, without reading any weight.

        Returns:
            `shards`: each file's size in bytes by its name; `sha256`: over `config.json`, the index and all
            headers.

        Raises:
            CheckpointError: the index or `config.json` cannot be read any more.
        """
        digest = hashlib.sha256()
        for name in ("config.json", INDEX_NAME):
            digest.update(f"{name}\n{_sha256(self.folder / name)}\n".encode())
        for name, shard in sorted(self.shards.items()):
            digest.update(f"{name}\n{shard.header_sha256}\n".encode())
        sizes = {name: shard.size for name, shard in sorted(self.shards.items())}
        return {"shards": sizes, "sha256": digest.hexdigest()}

    @cached_property
    def _block_size(self) -> tuple[int, int]:
        return read_block_size(self.folder)

    def _float_rows(self, name: str) -> FloatRows:
        scale_name = self._scale_name(name)
        if scale_name is None:
            return FloatRows(self._shard(name), self.stored_name(name))
        values, where = self.tensor(scale_name), self.shard_path(scale_name)
        scale = BlockScale.checked(name, values, self._block_size, where)
        return FloatRows(self._shard(name), self.stored_name(name), scale)

    def _scale_name(self, name: str) -> str | None:
        """The scales of an FP8 matrix, checked as far as headers tell; None for other dtypes."""
        dtype, where = self.dtype(name), self.shard_path(name)
        check_dtype(name, dtype, where)
        if dtype != FP8:
            return None
        scale_name = self.stored_name(name) + SCALE_SUFFIX
        if scale_name not in self:
            raise CheckpointError(
                f"{name} is stored as {dtype}, but its scales {scale_name} are missing",
                where=where,
                remedy="download the checkpoint again, or start from an unquantized one",
            )
        self._scale_name(scale_name)
        where = self.shard_path(scale_name)
        check_scale_shape(name, self.shape(name), self.shape(scale_name), self._block_size, where)
        return scale_name

    def stored_name(self, name: str) -> str:
        """The name that a tensor is stored under; see `aliases`."""
        return self.aliases.get(name, name)

    def _shard(self, name: str) -> Shard:
        name = self.stored_name(name)
        if name not in self.weight_map:
            raise CheckpointError(
                f"there is no tensor {name}",
                where=self.folder,
                remedy="check that config.json and the weights are of the same model",
            )
        return self.shards[self.weight_map[name]]


def _sha256(path: Path) -> str:
    if not path.is_file():
        return ""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from error
