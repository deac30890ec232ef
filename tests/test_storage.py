"""What msquant lists as its own, and that it removes that and nothing else."""

import fcntl
import json
import os
from pathlib import Path

import pytest

from msquant.checkpoint.download_marker import DownloadMarker, MarkedFile
from msquant.checkpoint.results import remember_folder, remember_result
from msquant.errors import ModelError, OutputError
from msquant.flows.storage import StoredItem, find_items, remove_item, stored_items

SIZE = 200_000
SCHEMES = [{"lm_head": "FLOAT"}, {"*": "W8A8"}]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own."""
    monkeypatch.setenv("MSQUANT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(os.urandom(SIZE))
    return folder


def write_download(folder: Path, *names: str, complete: bool = True) -> Path:
    write_files(folder, *names)
    files = {name: MarkedFile(SIZE, "sha256", "0" * 64, 1) for name in names}
    DownloadMarker("modelers", "org/name", "main", "0" * 40, complete, files).write(folder)
    return folder


def write_result(folder: Path, *extra: str) -> Path:
    names = ("config.json", "model.safetensors")
    write_files(folder, *names, *extra)
    manifest = {"recipe": {"quantization": {"schemes": SCHEMES}}, "files": {name: {} for name in names}}
    (folder / "msquant.json").write_text(json.dumps(manifest))
    return folder


def write_all(cache: Path, tmp_path: Path) -> dict[str, Path]:
    """One of each kind."""
    folders = {
        "org/model": write_download(cache / "models/org/model", "config.json", "model.safetensors"),
        "org/rows": write_download(cache / "datasets/org/rows", "data/train.jsonl"),
        "half": write_download(tmp_path / "half", "config.json", complete=False),
        "smollm2-135m-01234567": write_files(cache / "models/smollm2-135m-01234567", "msquant-source.json"),
        "result": write_result(tmp_path / "result"),
        "other.partial": write_files(tmp_path / "other.partial", "journal.jsonl", "scratch/hidden"),
    }
    remember_folder(folders["half"], "download")
    remember_result(folders["result"])
    remember_folder(folders["other.partial"], "unfinished")
    return folders


def test_every_kind_is_listed_with_its_size_and_scheme(cache: Path, tmp_path: Path) -> None:
    assert stored_items() == []
    folders = write_all(cache, tmp_path)
    items = {item.name: item for item in stored_items()}
    assert {name: item.folder for name, item in items.items()} == folders
    kinds = {name: item.kind for name, item in items.items()}
    assert kinds == {
        "org/model": "model",
        "org/rows": "dataset",
        "half": "partial download",
        "smollm2-135m-01234567": "model",
        "result": "result",
        "other.partial": "unfinished result",
    }
    assert items["result"].scheme == "W8A8, FLOAT"
    assert items["org/model"].scheme is None
    assert 2 * SIZE <= items["org/model"].nbytes <= 2.2 * SIZE
    assert items["result"].changed == (folders["result"] / "msquant.json").stat().st_mtime


def test_a_sparse_file_counts_what_it_holds(cache: Path) -> None:
    folder = write_download(cache / "models/org/model", "config.json", complete=False)
    with (folder / ".msquant" / "partial").open("wb") as file:
        file.truncate(10 << 30)
    (item,) = stored_items()
    assert item.nbytes < 2 * SIZE


def test_two_of_one_name_are_told_apart_by_their_paths(cache: Path, tmp_path: Path) -> None:
    first, second = write_result(tmp_path / "a" / "result"), write_result(tmp_path / "b" / "result")
    for folder in (first, second, first):
        remember_result(folder)
    assert [item.name for item in stored_items()] == [str(first), str(second)]
    assert [item.folder for item in find_items([str(second)])] == [second]
    with pytest.raises(ModelError, match="made nothing of that name"):
        find_items(["result"])


def test_each_is_removed_whole_and_alone(cache: Path, tmp_path: Path) -> None:
    folders = write_all(cache, tmp_path)
    left = dict(folders)
    for name, folder in folders.items():
        (item,) = find_items([name])
        assert remove_item(item) == item.nbytes
        del left[name]
        assert not folder.exists()
        assert {item.name for item in stored_items()} == set(left)
    # The organisation's folder went with its last model, and the record of written folders stays.
    assert not (cache / "models" / "org").exists()
    assert (cache / "results.jsonl").is_file()


def test_a_folder_is_found_by_its_path(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remember_result(write_result(tmp_path / "result"))
    monkeypatch.chdir(tmp_path)
    for name in ("result", "./result", "result/", str(tmp_path / "result")):
        assert [item.folder for item in find_items([name, name])] == [tmp_path / "result"]


@pytest.mark.parametrize("name", ["resutl", "/", "..", ".", "/etc", "~", "", "cache"])
def test_what_msquant_has_not_made_is_refused(
    name: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember_result(write_result(tmp_path / "result"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="removes nothing else") as caught:
        find_items([name])
    if name == "resutl":
        assert caught.value.remedy == "did you mean result? use one of: result"


def test_a_remembered_folder_that_is_another_one_now_is_not_listed(cache: Path, tmp_path: Path) -> None:
    folder = write_result(tmp_path / "result")
    remember_result(folder)
    (folder / "msquant.json").unlink()
    remember_result(tmp_path)
    remember_result(Path("/"))
    assert stored_items() == []


def stored(folder: Path) -> StoredItem:
    (item,) = (item for item in stored_items() if item.folder == folder)
    return item


@pytest.mark.parametrize("extra", ["notes.txt", "photos/2026.jpg"])
def test_a_folder_with_a_file_of_somebody_else_stays(extra: str, cache: Path, tmp_path: Path) -> None:
    result = write_result(tmp_path / "result", extra)
    remember_result(result)
    download = write_files(write_download(cache / "models/org/model", "config.json"), extra)
    for folder in (result, download):
        with pytest.raises(OutputError, match="none of the files that msquant put") as caught:
            remove_item(stored(folder))
        assert caught.value.where == str(folder / extra)
        assert (folder / "config.json").exists()
        (folder / extra).unlink()
        remove_item(stored(folder))


def test_a_result_that_was_not_cleared_up_is_checked_like_any(cache: Path, tmp_path: Path) -> None:
    """As a run leaves it that is killed right after its folder got its name."""
    folder = write_result(
        tmp_path / "done", "journal.jsonl", ".msquant.replaced/msquant.json", "own-notes.txt"
    )
    remember_result(folder)
    assert stored(folder).kind == "result"
    with pytest.raises(OutputError, match="none of the files that msquant put") as caught:
        remove_item(stored(folder))
    assert caught.value.where == str(folder / "own-notes.txt")
    (folder / "own-notes.txt").unlink()
    remove_item(stored(folder))
    assert not folder.exists()


def test_an_earlier_result_that_was_being_replaced_stays(cache: Path, tmp_path: Path) -> None:
    """As a run leaves it that is killed after the earlier result moved, and before its own came."""
    partial = write_files(tmp_path / "done.partial", "journal.jsonl", ".msquant.replaced/msquant.json")
    remember_folder(partial, "unfinished")
    with pytest.raises(OutputError, match="earlier result"):
        remove_item(stored(partial))
    assert (partial / ".msquant.replaced" / "msquant.json").is_file()
    assert (partial / "journal.jsonl").is_file()


def test_no_symlink_is_followed(cache: Path, tmp_path: Path) -> None:
    precious = write_files(tmp_path / "precious", "config.json", "photo.jpg")
    result = write_result(tmp_path / "result")
    remember_result(result)
    # A whole result, an organisation and a model that are links lead elsewhere: they are none of ours.
    elsewhere = write_result(tmp_path / "elsewhere" / "result")
    os.symlink(elsewhere, tmp_path / "link")
    (cache / "models").mkdir(parents=True)
    os.symlink(elsewhere.parent, cache / "models" / "org")
    write_download(tmp_path / "elsewhere" / "model", "config.json")
    assert [item.folder for item in stored_items()] == [result]
    with pytest.raises(ModelError):
        find_items([str(tmp_path / "link")])
    # A folder in the result that is a link is nobody's; the file that is one of its own goes as a link.
    os.symlink(precious, result / "more")
    with pytest.raises(OutputError, match="none of the files"):
        remove_item(stored(result))
    (result / "more").unlink()
    (result / "model.safetensors").unlink()
    os.symlink(precious / "photo.jpg", result / "model.safetensors")
    remove_item(stored(result))
    assert sorted(path.name for path in precious.iterdir()) == ["config.json", "photo.jpg"]
    # What was a result when it was listed and is a link when it is removed.
    again = write_result(tmp_path / "again")
    remember_result(again)
    item = stored(again)
    again.rename(tmp_path / "moved")
    os.symlink(tmp_path / "moved", again)
    with pytest.raises(OutputError, match="no longer what msquant made"):
        remove_item(item)
    assert (tmp_path / "moved" / "config.json").exists()


def test_a_folder_that_a_process_works_in_stays(cache: Path, tmp_path: Path) -> None:
    folders = write_all(cache, tmp_path)
    for name, lock in (("other.partial", ".msquant.lock"), ("half", ".msquant/lock")):
        item = stored(folders[name])
        with (folders[name] / lock).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with pytest.raises(OutputError, match="is writing it now"):
                remove_item(item)
        assert item.folder.is_dir()
        remove_item(item)
        assert not item.folder.exists()


def test_an_interrupted_removal_can_be_repeated(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_result(tmp_path / "result")
    remember_result(folder)

    def fail(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("msquant.flows.storage.remove_path", fail)
        with pytest.raises(OutputError):
            remove_item(stored(folder))
    # It is no model any more, and still one of ours.
    assert not (folder / "config.json").exists()
    remove_item(stored(folder))
    assert not folder.exists()
