"""A partial folder that is kept, continued, cleared; and kills at every step of giving it its name."""

import itertools
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from msquant.checkpoint.journal import JOURNAL_NAME, Journal
from msquant.checkpoint.output_folder import LOCK_NAME, OutputFolder
from msquant.checkpoint.results import is_result
from msquant.checkpoint.writer import temporary_path, write_text
from msquant.errors import OutputError

IDENTITY = {"a": 1}
RESULT = {"config.json", "msquant.json", "data"}


def begin(output: OutputFolder, content: str = "new") -> None:
    """Write everything but the name."""
    output.keep = True
    for name in sorted(RESULT):
        write_text(output.path / name, content)
    (output.path / "scratch").mkdir()
    for number in range(2):
        (output.path / "scratch" / f"{number}.f32").write_text("x")
    files = {"data": {"size": len(content), "sha256": ""}}
    Journal.open(output.path, IDENTITY).append({"files": files})


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_a_folder_with_a_journal_is_there_again(tmp_path: Path) -> None:
    def work() -> None:
        with OutputFolder(tmp_path / "result") as output:
            begin(output)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert names(tmp_path) == {"result.partial"}
    temporary_path(tmp_path / "result.partial" / "half").write_text("left by a kill")
    with OutputFolder(tmp_path / "result") as output:
        assert names(output.path) == RESULT | {"scratch", JOURNAL_NAME, LOCK_NAME}
        assert len(Journal.open(output.path, IDENTITY).records) == 1
    with OutputFolder(tmp_path / "result") as output:
        output.finish(scratch=["scratch", "never-made"])
    assert names(tmp_path) == {"result"}
    assert names(tmp_path / "result") == RESULT


def test_a_folder_without_a_journal_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "result.partial").mkdir()
    (tmp_path / "result.partial" / "data").write_text("of whom?")
    with OutputFolder(tmp_path / "result") as output:
        assert names(output.path) == {LOCK_NAME}


def test_a_folder_that_is_not_to_be_kept_goes_with_its_journal(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "result") as output:
        begin(output)
        output.keep = False
    assert names(tmp_path) == set()


def test_clear_leaves_the_lock_alone(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "result") as output:
        begin(output)
        output.clear()
        assert names(output.path) == {LOCK_NAME}
        with pytest.raises(OutputError, match=f"process {os.getpid()}"), OutputFolder(tmp_path / "result"):
            pass
        assert Journal.open(output.path, {"a": 2}).records == []


def test_a_kept_folder_is_free_for_the_next(tmp_path: Path) -> None:
    for _ in range(2):
        with OutputFolder(tmp_path / "result") as output:
            shutil.rmtree(output.path / "scratch", ignore_errors=True)
            begin(output)


def test_a_kill_while_clearing_leaves_no_journal_to_continue(tmp_path: Path) -> None:
    for step in itertools.count():
        with OutputFolder(tmp_path / "result") as output:
            output.clear()
            begin(output)
        if not killed_at(step, lambda: entered(tmp_path / "result").clear()):
            break
        assert step == 0 or not (tmp_path / "result.partial" / JOURNAL_NAME).exists()
    assert step >= 5


def entered(target: Path, *, overwrite: bool = False) -> OutputFolder:
    return OutputFolder(target, overwrite=overwrite).__enter__()


CHANGES = {"os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Run `work` in a child that dies before its change number `step` to the file system; whether it died."""
    child = os.fork()
    if not child:
        steps = itertools.count()

        def die(event: str, _: object) -> None:
            if event in CHANGES and next(steps) == step:
                os._exit(9)

        sys.addaudithook(die)
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("replacing", [False, True])
def test_a_kill_at_any_step_of_finishing_leaves_a_result_or_what_leads_to_one(
    tmp_path: Path, replacing: bool
) -> None:
    outcomes = []
    for step in itertools.count():
        target = tmp_path / str(step) / "result"
        if replacing:
            with OutputFolder(target) as old:
                begin(old, "old")
                old.finish(["scratch"])
        with OutputFolder(target, overwrite=True) as output:
            begin(output)
        if not killed_at(step, lambda: entered(target, overwrite=True).finish(["scratch"])):  # noqa: B023
            break
        if not output.path.exists():
            outcomes.append("finished")
            assert is_result(target)
            assert names(target) - {JOURNAL_NAME, LOCK_NAME, ".msquant.replaced"} == RESULT
            assert (target / "data").read_text() == "new"
            with pytest.raises(OutputError, match="holds a result already"), OutputFolder(target):
                pass
            assert names(target) == RESULT
            continue
        outcomes.append("resumable")
        if replacing:
            # It may wait within the new one already.
            assert "old" in [path.read_text() for path in target.parent.rglob("data")]
        with OutputFolder(target, overwrite=True) as output:
            assert len(Journal.open(output.path, IDENTITY).records) == 1
            output.finish(["scratch"])
        assert names(target) == RESULT
        assert (target / "data").read_text() == "new"
    assert names(target) == RESULT
    assert names(target.parent) == {"result"}
    assert set(outcomes) == {"resumable", "finished"}
    assert outcomes == sorted(outcomes, reverse=True)
