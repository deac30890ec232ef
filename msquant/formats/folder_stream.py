"""Writes a planned folder group by group, and closes it with its manifest."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from msquant.checkpoint.disk import writing
from msquant.checkpoint.reader import INDEX_NAME
from msquant.checkpoint.results import MANIFEST_NAME
from msquant.checkpoint.writer import file_sha256, write_index, write_json
from msquant.errors import OutputError
from msquant.formats.folder_plan import FolderPlan
from msquant.formats.group_writer import FileEntry, GroupWriter

# What a tokenizer and its generation defaults are made of, in any of the forms transformers saves.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


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
    def group(self, index: int) -> Iterator[GroupWriter]:
        """Write one group of the plan; its shards appear when the block ends without an error.

        Not more than the tensor being written is in memory, and its shard on disk.

        Raises:
            OutputError: a tensor is missing, or the disk is full.
        """
        with ExitStack() as stack:
            writer = GroupWriter(self.folder, self.plan, self.plan.groups[index], stack)
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
                state = "missing" if found is None else f"{found} bytes long"
                raise OutputError(
                    f"is {state}, {entry['size']} bytes were written", where=path, remedy="use --restart"
                )
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
