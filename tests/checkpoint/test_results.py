"""Which result `msquant run` takes when none is named."""

from pathlib import Path

import pytest

from msquant.checkpoint.cache import cache_folder
from msquant.checkpoint.results import newest_result, remember_result


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MSQUANT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def finished(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "msquant.json").write_text("{}")
    return folder


def test_the_newest_that_is_still_whole_is_found(tmp_path: Path) -> None:
    assert newest_result() is None
    first, second = finished(tmp_path / "first"), finished(tmp_path / "second")
    assert remember_result(first)
    assert remember_result(second)
    assert newest_result() == second
    (second / "msquant.json").unlink()
    assert newest_result() == first
    remember_result(first)
    (second / "msquant.json").write_text("{}")
    assert newest_result() == first
    (first / "config.json").unlink()
    assert newest_result() == second


def test_a_relative_folder_is_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(tmp_path / "result")
    monkeypatch.chdir(tmp_path)
    remember_result(Path("result"))
    monkeypatch.chdir("/")
    assert newest_result() == tmp_path / "result"


def test_damaged_lines_are_passed_over(tmp_path: Path, cache: Path) -> None:
    remember_result(finished(tmp_path / "result"))
    with (cache / "results.jsonl").open("ab") as file:
        file.write(b'{"folder": 3}\n[]\n{"folder"\n\xff\xfe\n' + b"[" * 100_000 + b"\n\n")
    assert newest_result() == tmp_path / "result"


def test_a_cache_that_cannot_be_written_does_not_fail_the_job(tmp_path: Path, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    assert not remember_result(finished(tmp_path / "result"))
    assert newest_result() is None


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("MSQUANT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/msquant")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert cache_folder() == Path("/h/.cache/msquant")
