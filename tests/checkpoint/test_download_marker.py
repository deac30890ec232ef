"""The marker of a download says what is there, and a folder without all of it is refused."""

import json
from pathlib import Path

import pytest

from msquant.checkpoint.download_marker import DownloadMarker, MarkedFile, require_complete
from msquant.errors import CheckpointError


@pytest.fixture
def marker() -> DownloadMarker:
    files = {"a/b": MarkedFile(3, "sha256", "0" * 64, 123), "c": MarkedFile(5, "git-sha1", "1" * 40)}
    return DownloadMarker("modelers", "org/name", "main", "2" * 40, files=files)


def test_it_is_read_back_as_it_was_written(marker: DownloadMarker, tmp_path: Path) -> None:
    marker.write(tmp_path)
    assert DownloadMarker.read(tmp_path) == marker


def test_a_folder_without_one_is_nobodys_download(tmp_path: Path) -> None:
    assert DownloadMarker.read(tmp_path) is None
    require_complete(tmp_path)
    require_complete(tmp_path / "nowhere")


def test_an_incomplete_folder_is_refused_with_the_command(marker: DownloadMarker, tmp_path: Path) -> None:
    marker.write(tmp_path)
    with pytest.raises(CheckpointError, match="1 of 2 files are missing") as caught:
        require_complete(tmp_path)
    assert caught.value.remedy == f"finish it: msquant download org/name --hub modelers --output {tmp_path}"
    marker.complete = True
    marker.write(tmp_path)
    require_complete(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"version": 2}, {"files": []}, {"files": {"a": {"size": 1}}}, {"more": 1}, {"complete": None}]
    + [
        {key: {name: {"size": 1, "algorithm": "sha256", "digest": "0"}}}
        for key in ("files", "obsolete")
        for name in ("../../evil", "/etc/passwd", ".msquant/lock", "a\x9bb")
    ],
)
def test_a_damaged_one_is_an_error(change: dict[str, object], marker: DownloadMarker, tmp_path: Path) -> None:
    marker.write(tmp_path)
    path = tmp_path / ".msquant" / "download.json"
    raw = json.loads(path.read_text()) | change
    if change == {"complete": None}:
        del raw["commit"]
    path.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="damaged") as caught:
        DownloadMarker.read(tmp_path)
    assert caught.value.where == str(path)
