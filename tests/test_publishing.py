"""What of a folder is uploaded: what its manifest lists, and what people have written for people."""

from pathlib import Path

import pytest

from msquant.errors import CheckpointError
from msquant.flows.publishing import prepare
from tests.formats.folders import write_folder


def test_what_the_manifest_does_not_list_is_left_out_by_name(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    own = {path.name for path in folder.iterdir()}
    (folder / "notes").mkdir()
    for name in ("LICENSE", "private.txt", "notes/todo.md"):
        (folder / name).write_text("x")
    found = prepare(folder, "org/name", "mit")
    assert set(found.files) == own | {"LICENSE", "README.md"}
    assert found.left_out == ["notes/todo.md", "private.txt"]

    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="does not belong to this model"):
        prepare(folder, "org/name", "mit")
