"""Writes a planned folder group by group, and closes it with its manifest."""

import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.checkpoint_reader import INDEX_NAME
from msquant.checkpoint.disk import shown_sizes, writing
from msquant.checkpoint.results import MANIFEST_NAME
from msquant.checkpoint.shard_plan import PlannedShard
from msquant.checkpoint.shard_stream import ShardStream
from msquant.checkpoint.tensor_spec import TensorSpec
from msquant.checkpoint.weights import Linear
from msquant.checkpoint.writer import file_sha256, write_index, write_json, write_shard
from msquant.errors import OutputError
from msquant.families.row_orders import RowOrder
from msquant.formats.dtypes import cast, stored_dtype
from msquant.formats.folder_plan import FolderPlan
from msquant.schemes import FLOAT

# What a tokenizer, a processor of images and generation defaults are made of, in any of the forms that
# transformers saves.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tiktoken.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


class FileEntry(TypedDict):
    """What the journal and the manifest keep of a file: its bytes and its sha256 in hexadecimal."""

    size: int
    sha256: str


class GroupWriter:
    """Takes the tensors of one group, in any order; made by `FolderStream.group`.

    Args:
        folder: where the shards go.
        plan: of the whole folder.
        shards: of the group.
        stack: closes what is opened.
        written: names of those that are written; what belongs to others is let go. All if None.

    Attributes:
        files: the shards by name, filled when they are complete.
    """

    def __init__(
        self,
        folder: Path,
        plan: FolderPlan,
        shards: Iterable[PlannedShard],
        stack: ExitStack,
        written: Collection[str] | None = None,
    ) -> None:
        self.files: dict[str, FileEntry] = {}
        self._folder = folder
        self._plan = plan
        self._stack = stack
        self._shards = {shard.file_name: shard for shard in shards}
        self._places = {
            spec.name: (name, spec) for name, shard in self._shards.items() for spec in shard.specs
        }
        self._streams: dict[str, ShardStream] = {}
        self._written = self._shards.keys() if written is None else written

    def writes(self, name: str) -> bool:
        """Whether a tensor is written here."""
        return self._spec(name)[0] in self._written

    def tensor(self, name: str, values: NDArray[Any]) -> None:
        """Write a floating-point tensor, rounded to the dtype it is stored in.

        Raises:
            OutputError: it is not planned in this group, is of another shape, was written before, or the disk
                is full.
            CheckpointError: a value does not fit the stored dtype.
        """
        values = np.asarray(values)
        if values.shape != self._float_spec(name).shape:
            raise self._misfit(name, values.shape)
        order = self._order(name)
        self._put(name, self._cast(name, values if order is None else values[order.deinterleaved()]))

    def tensor_rows(self, name: str, start_row: int, block: NDArray[Any]) -> None:
        """Write some rows of a floating-point tensor.

        Args:
            name: the tensor.
            start_row: which row of the tensor, in the source's order, the block begins with.
            block: `[n, ...]`.

        Raises:
            OutputError: as for `tensor`.
            CheckpointError: as for `tensor`.
        """
        spec = self._float_spec(name)
        block = np.asarray(block)
        if block.shape[1:] != spec.shape[1:] or not 0 <= start_row <= start_row + len(block) <= spec.rows:
            raise self._misfit(name, block.shape)
        rounded = self._cast(name, block)
        order = self._order(name)
        if order is None:
            self._put(name, rounded, start_row)
            return
        for first, rows in _runs(order.interleaved()[start_row : start_row + len(block)]):
            self._put(name, rounded[rows], first)

    def dtype(self, name: str) -> str:
        """The safetensors dtype that a tensor is planned in. Raises OutputError if it is not planned here."""
        return self._spec(name)[1].dtype

    def stored_rows(self, name: str, start_row: int, block: NDArray[Any]) -> None:
        """Write some rows of a tensor that keeps the dtype it has.

        Args:
            name: the tensor.
            start_row: which row of it the block begins with.
            block: `[n, ...]`, in the planned dtype.

        Raises:
            OutputError: as for `tensor`, or it is of another dtype.
        """
        self._put(name, block, start_row)

    def linear(self, module: str, linear: Linear) -> None:
        """Write a linear layer in the scheme it is planned in.

        Raises:
            OutputError: it is not planned in this group, or in another scheme or shape, or was written
                before; or the disk is full.
            CheckpointError: as `Format.encode_linear`.
        """
        scheme = linear.scheme
        planned = self._plan.linears.get(module, FLOAT)
        if scheme != planned:
            raise OutputError(f"its scheme is {scheme}, {planned} is planned", where=module)
        order = self._order(f"{module}.weight")
        if order is not None:
            if len(linear.weight) != order.rows:
                raise self._misfit(f"{module}.weight", linear.weight.shape)
            linear = linear.take_rows(order.deinterleaved())
        for name, array in self._plan.format.encode_linear(module, linear, self._plan.dtype).items():
            self._put(name, array)

    def close(self) -> None:
        """Give the complete shards their names.

        Raises:
            OutputError: a tensor is missing, or the disk cannot be written.
        """
        for name in self._written:
            if name not in self._streams:
                missing = next(iter(self._shards[name].specs)).name
                raise OutputError(f"{missing} and all else in it was not written", where=self._folder / name)
        for name, stream in self._streams.items():
            self.files[name] = {"sha256": stream.finish(), "size": stream.nbytes}

    def _put(self, name: str, array: NDArray[Any], start_row: int = 0) -> None:
        file_name = self._spec(name)[0]
        if file_name not in self._written:
            return
        if file_name not in self._streams:
            stream = ShardStream(self._folder / file_name, self._shards[file_name].specs)
            self._streams[file_name] = self._stack.enter_context(stream)
        self._streams[file_name].write(name, array, start_row)

    def _cast(self, name: str, values: NDArray[Any]) -> NDArray[Any]:
        return cast(name, values, stored_dtype(name, self._plan.dtype))

    def _order(self, name: str) -> RowOrder | None:
        return self._plan.row_orders.of(name.rpartition(".")[0])

    def _spec(self, name: str) -> tuple[str, TensorSpec]:
        if name not in self._places:
            raise OutputError(f"{name} is not planned in this group", where=self._folder)
        return self._places[name]

    def _float_spec(self, name: str) -> TensorSpec:
        spec = self._spec(name)[1]
        if spec.dtype not in ("BF16", "F16", "F32"):
            raise OutputError(
                f"{name} is planned as {spec}: write its layer with linear()", where=self._folder
            )
        return spec

    def _misfit(self, name: str, shape: tuple[int, ...]) -> OutputError:
        return OutputError(
            f"{name} is given with shape {list(shape)}, but planned as {self._spec(name)[1]}",
            where=self._folder,
        )


class GroupTensors(GroupWriter):
    """Takes some of a group's tensors and keeps them, as they are to be stored, for who writes the shards.

    Attributes:
        kept: the tensors by name.
    """

    def __init__(self, folder: Path, plan: FolderPlan, shards: Iterable[PlannedShard]) -> None:
        super().__init__(folder, plan, shards, ExitStack())
        self.kept: dict[str, NDArray[Any]] = {}

    def _put(self, name: str, array: NDArray[Any], start_row: int = 0) -> None:
        assert start_row == 0
        self.kept[name] = array


def _runs(targets: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Rows that go to neighbouring places, as pairs of the first place and the rows in that order."""
    rows = np.argsort(targets, kind="stable")
    for run in np.split(rows, np.flatnonzero(np.diff(targets[rows]) != 1) + 1):
        if len(run):
            yield int(targets[run[0]]), run


class FolderStream:
    """Writes one folder.

    Args:
        folder: exists.
        plan: what it will hold.

    Attributes:
        files: size and sha256 of every shard that is complete, by name.
    """

    def __init__(self, folder: Path, plan: FolderPlan) -> None:
        self.folder = folder
        self.plan = plan
        self.files: dict[str, FileEntry] = {}

    @property
    def total_size(self) -> int:
        """Bytes of all tensors."""
        return self.plan.tensor_bytes

    @contextmanager
    def group(self, index: int, shard: int | None = None) -> Iterator[GroupWriter]:
        """Write one group of the plan; its shards appear when the block ends without an error.

        Not more than the tensor being written is in memory, and its shard on disk.

        Args:
            index: the group.
            shard: the only one of its shards that is written; all if None.

        Raises:
            OutputError: a tensor is missing, or the disk is full.
        """
        shards = self.plan.groups[index]
        written = [each.file_name for each in (shards if shard is None else shards[shard : shard + 1])]
        with ExitStack() as stack:
            writer = GroupWriter(self.folder, self.plan, shards, stack, written)
            yield writer
            writer.close()
        self.files.update(writer.files)

    def restore(self, index: int, files: Mapping[str, FileEntry]) -> None:
        """Take over a group that an earlier process finished; the shards themselves are not read.

        Args:
            index: the group.
            files: what `GroupWriter.files` was.

        Raises:
            OutputError: they are not the shards of this group, or one is missing or of another size.
        """
        planned = {shard.file_name for shard in self.plan.groups[index]}
        if set(files) != planned:
            raise OutputError(
                f"group {index} was written as {', '.join(sorted(files))}, but {', '.join(sorted(planned))} "
                "are planned",
                where=self.folder,
                remedy="start over with --restart",
            )
        for name, entry in files.items():
            path = self.folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != entry["size"]:
                here, written = shown_sizes(found or 0, entry["size"])
                state = "is missing" if found is None else f"has {here}"
                raise OutputError(f"{state}, {written} were written", where=path, remedy="use --restart")
        self.files.update({name: {"sha256": e["sha256"], "size": e["size"]} for name, e in files.items()})

    def finish(self, source: Path, manifest: Mapping[str, Any]) -> None:
        """Write all that is not a shard; the manifest comes last.

        Args:
            source: the folder that the tokenizer is taken from.
            manifest: what `msquant.json` holds besides the format, the variant and the files.

        Raises:
            OutputError: a group was neither written nor restored, or the disk cannot be written.
        """
        for shard in self.plan.shards:
            if shard.file_name not in self.files:
                raise OutputError("this shard was not written", where=self.folder / shard.file_name)
        files = dict(self.files)
        for companion in COMPANIONS:
            if (source / companion).is_file():
                with writing(self.folder / companion):
                    shutil.copyfile(source / companion, self.folder / companion)
                files[companion] = self._entry(companion, file_sha256(self.folder / companion))
        for name, tensors in self.plan.format.extra_shards().items():
            path = self.folder / name
            with writing(path):
                path.parent.mkdir(exist_ok=True)
            files[name] = self._entry(name, write_shard(path, tensors))
        for name, document in self.plan.documents.items():
            files[name] = self._entry(name, write_json(self.folder / name, document))
        files[INDEX_NAME] = self._entry(
            INDEX_NAME, write_index(self.folder, self.plan.weight_map, self.total_size)
        )
        files["config.json"] = self._entry(
            "config.json", write_json(self.folder / "config.json", self.plan.written_config)
        )
        form = self.plan.format
        record = {"format": form.name, "variant": form.variant, "files": dict(sorted(files.items()))}
        write_json(self.folder / MANIFEST_NAME, {**manifest, **record})

    def _entry(self, name: str, digest: str) -> FileEntry:
        return {"sha256": digest, "size": (self.folder / name).stat().st_size}
