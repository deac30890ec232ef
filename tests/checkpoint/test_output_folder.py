"""A result folder appears whole or not at all."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from msquant.checkpoint.journal import JOURNAL_NAME
from msquant.checkpoint.output_folder import LOCK_NAME, OutputFolder
from msquant.checkpoint.writer import write_text
from msquant.errors import OutputError

WORKER = """
import signal, sys, time
from msquant.checkpoint.output_folder import OutputFolder

# A background job of a shell starts with Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
with OutputFolder(sys.argv[1]) as output:
    (output.path / "half").write_text("half a result")
    print("ready", flush=True)
    time.sleep(60)
"""


def start_worker(target: Path) -> subprocess.Popen[str]:
    worker = subprocess.Popen([sys.executable, "-c", WORKER, str(target)], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    assert worker.stdout.readline() == "ready\n"
    return worker


def make_result(target: Path, content: str, *, overwrite: bool = False) -> None:
    with OutputFolder(target, overwrite=overwrite) as output:
        write_text(output.path / "msquant.json", "{}")
        write_text(output.path / "data", content)
        output.finish()


def test_a_result_appears_only_when_it_is_finished(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "result"
    with OutputFolder(target) as output:
        write_text(output.path / "data", "x")
        assert not target.exists()
        assert output.path == tmp_path / "deep" / "result.partial"
        assert output.finish() == target
    assert [entry.name for entry in target.iterdir()] == ["data"]
    assert [entry.name for entry in target.parent.iterdir()] == ["result"]


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "result").mkdir()
    make_result(tmp_path / "result", "x")
    assert (tmp_path / "result" / "data").read_text() == "x"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def work() -> None:
        with OutputFolder(tmp_path / "result") as output:
            (output.path / "sub").mkdir()
            (output.path / "sub" / "file").write_text("x")
            raise error

    with pytest.raises(error):
        work()
    assert list(tmp_path.iterdir()) == []


def test_leaving_without_finishing_leaves_nothing(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "result") as output:
        (output.path / "file").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_in_a_real_process_leaves_nothing(tmp_path: Path) -> None:
    worker = start_worker(tmp_path / "result")
    worker.send_signal(signal.SIGINT)
    assert worker.wait(timeout=20) != 0
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_only_a_partial_folder_and_the_next_one_replaces_it(tmp_path: Path) -> None:
    worker = start_worker(tmp_path / "result")
    worker.kill()
    worker.wait(timeout=20)
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.partial"]
    make_result(tmp_path / "result", "new")
    assert sorted(entry.name for entry in (tmp_path / "result").iterdir()) == ["data", "msquant.json"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["result"]


def test_a_folder_that_a_living_process_writes_is_refused_with_its_number(tmp_path: Path) -> None:
    worker = start_worker(tmp_path / "result")
    try:
        with pytest.raises(OutputError, match=f"process {worker.pid} on "), OutputFolder(tmp_path / "result"):
            pass
        assert (tmp_path / "result.partial" / "half").exists()
    finally:
        worker.kill()
        worker.wait(timeout=20)


def test_the_same_folder_twice_in_one_process_is_refused(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "result") as output:
        with (
            pytest.raises(OutputError, match=f"process {os.getpid()} on "),
            OutputFolder(tmp_path / "result"),
        ):
            pass
        assert (output.path / LOCK_NAME).exists()
        output.finish()
    assert (tmp_path / "result").is_dir()


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "result"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="did not write"), OutputFolder(target, overwrite=overwrite):
            pass
    assert (target / "thesis.txt").read_text() == "years of work"


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "result").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("result", "link"):
        with pytest.raises(OutputError, match="not a folder"), OutputFolder(tmp_path / name, overwrite=True):
            pass


def test_a_result_is_replaced_only_on_demand_and_only_when_the_new_one_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "result"
    make_result(target, "old")
    with pytest.raises(OutputError, match="--overwrite"), OutputFolder(target):
        pass
    with OutputFolder(target, overwrite=True) as output:
        write_text(output.path / "data", "half")
    assert (target / "data").read_text() == "old"
    make_result(target, "new", overwrite=True)
    assert (target / "data").read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["result"]


RENAMES = ("os.rename",)
ALL_USES = (*RENAMES, "os.remove", "os.rmdir", "os.mkdir", "os.scandir", "os.listdir", "open")


def killed_at(point: int, events: Sequence[str], folder: Path, work: Callable[[], None]) -> bool:
    """Do the work in a process that kills itself before so many uses of a path in a folder.

    Returns:
        Whether it came to that.
    """
    if (child := os.fork()) == 0:
        left = point

        def watch(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if event in events and str(arguments[0]).startswith(str(folder)):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        try:
            work()
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0
    return os.WIFSIGNALED(status)


def result_files(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.txt")}


@pytest.mark.parametrize("resumable", [False, True])
@pytest.mark.parametrize(
    ("events", "least"), [(RENAMES, 5), pytest.param(ALL_USES, 20, marks=pytest.mark.slow)]
)
def test_a_kill_at_any_moment_of_overwrite_leaves_one_whole_result_after_the_next_run(
    events: Sequence[str], least: int, resumable: bool, tmp_path: Path
) -> None:
    target = tmp_path / "result"
    old = {"msquant.json.txt": "old", "a.txt": "old", "only-old.txt": "old"}
    new = {"msquant.json.txt": "new", "a.txt": "new", "only-new.txt": "new"}

    def write(content: dict[str, str]) -> None:
        with OutputFolder(target, overwrite=True) as output:
            if resumable:
                (output.path / JOURNAL_NAME).write_text("")
            for name, text in {**content, "msquant.json": "{}"}.items():
                write_text(output.path / name, text)
            output.finish()

    kills = 0
    while True:
        write(old)
        if not killed_at(kills, events, tmp_path, lambda: write(new)):
            break
        kills += 1
        # The next run does what is left to do before it begins its own work, which it leaves undone.
        with OutputFolder(target, overwrite=True) as output:
            output.keep = False
        assert [path.name for path in tmp_path.iterdir()] == ["result"], kills
        assert result_files(target) in (old, new), kills
        assert len(list(target.iterdir())) == 4, kills
        write(new)
        assert [path.name for path in tmp_path.iterdir()] == ["result"]
        assert result_files(target) == new
    assert kills >= least


def test_a_result_that_was_made_anew_since_a_kill_is_not_touched(tmp_path: Path) -> None:
    target = tmp_path / "result"
    make_result(target, "new")
    shutil.copytree(target, tmp_path / "result.partial" / ".msquant.replaced")
    for _ in range(2):
        with (
            pytest.raises(OutputError, match="made anew since then") as caught,
            OutputFolder(target, overwrite=True),
        ):
            pass
        assert caught.value.where == str(tmp_path / "result.partial" / ".msquant.replaced")
    assert (tmp_path / "result.partial" / ".msquant.replaced" / "data").exists()


def test_a_target_that_was_taken_meanwhile_is_not_touched(tmp_path: Path) -> None:
    target = tmp_path / "result"
    with OutputFolder(target) as output:
        target.mkdir()
        (target / "mine").write_text("x")
        with pytest.raises(OutputError, match="did not write"):
            output.finish()
    assert [entry.name for entry in tmp_path.iterdir()] == ["result"]
    assert (target / "mine").read_text() == "x"


def test_finishing_twice_is_an_error(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "result") as output:
        output.finish()
        with pytest.raises(OutputError, match="not open"):
            output.finish()


def test_a_parent_that_is_a_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError), OutputFolder(tmp_path / "file" / "result"):
        pass


def test_many_processes_agree_on_one_winner(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from msquant.checkpoint.output_folder import OutputFolder\n"
        "from msquant.errors import OutputError\n"
        "time.sleep(max(0, float(sys.argv[2]) - time.time()))\n"
        "try:\n"
        "    with OutputFolder(sys.argv[1]) as output:\n"
        "        (output.path / 'msquant.json').write_text('{}')\n"
        "        time.sleep(0.2)\n"
        "        output.finish()\n"
        "except OutputError:\n"
        "    sys.exit(3)\n"
    )
    start = str(time.time() + 2)
    command = [sys.executable, "-c", script, str(tmp_path / "result"), start]
    workers = [subprocess.Popen(command) for _ in range(4)]
    codes = sorted(worker.wait(timeout=60) for worker in workers)
    assert codes == [0, 3, 3, 3]
    assert [entry.name for entry in tmp_path.iterdir()] == ["result"]
