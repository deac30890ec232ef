"""The child process behind an engine, against children that misbehave."""

import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from msquant.errors import EngineError
from msquant.inference import worker_engine
from msquant.inference.worker_engine import WorkerProcess, last_lines

ECHO = """
import json, sys, time
for line in sys.stdin:
    request = json.loads(line)
    print(json.dumps({"id": request["id"], "event": "part"}), flush=True)
    if request["op"] == "deaf":
        time.sleep(600)
    print(json.dumps({"id": request["id"], "event": "done"}), flush=True)
"""


def start(code: str, tmp_path: Path) -> WorkerProcess:
    return WorkerProcess(
        "child", [sys.executable, "-u", "-c", code], {}, tmp_path / "logs" / "log", "check it"
    )


def runs(status: Path) -> bool:
    """Whether a process is there and not only a zombie that nobody has asked for."""
    try:
        return status.read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_answers_up_to_the_last_event(tmp_path: Path) -> None:
    with closing(start(ECHO, tmp_path)) as child:
        for _ in range(2):
            events = [answer["event"] for answer in child.ask("done", "talking", {"op": "talk"}, timeout=30)]
            assert events == ["part", "done"]


@pytest.mark.parametrize(
    "garbage", ["Welcome!", "[1, 2]", '{"event": "done"}', '{"id": "0", "event": "done"}', ""]
)
def test_garbage_on_stdout(tmp_path: Path, garbage: str) -> None:
    code = f"import sys, time; print({garbage!r}); sys.stdin.readline(); time.sleep(600)"
    with closing(start(code, tmp_path)) as child:
        with pytest.raises(EngineError, match="is no answer, while loading") as caught:
            list(child.ask("done", "loading", {"op": "load"}, timeout=30))
        assert garbage[:20] in caught.value.what
        assert "sitecustomize" in str(caught.value.remedy)


def test_a_child_that_is_gone_before_it_is_asked(tmp_path: Path) -> None:
    child = start("import sys; sys.exit('no, thanks')", tmp_path)
    child._process.wait()
    with pytest.raises(EngineError, match="child ended with exit code 1 while asking") as caught:
        list(child.ask("done", "asking", {"op": "x"}))
    assert caught.value.__notes__ == ["no, thanks"]
    assert caught.value.where == str(tmp_path / "logs" / "log")


def test_a_child_that_does_not_hear_that_it_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_engine, "CANCEL_SECONDS", 0.2)
    child = start(ECHO, tmp_path)
    answers = child.ask("done", "talking", {"op": "deaf"}, cancel=True)
    assert next(answers)["event"] == "part"
    answers.close()
    assert child._process.returncode is not None


def test_what_cannot_be_cancelled_is_ended(tmp_path: Path) -> None:
    child = start(ECHO, tmp_path)
    answers = child.ask("done", "talking", {"op": "deaf"})
    next(answers)
    answers.close()
    assert child._process.returncode is not None


def test_its_own_children_end_with_it(tmp_path: Path) -> None:
    code = (
        "import json, subprocess, sys\nsleeper = subprocess.Popen(['sleep', '600'])\nsys.stdin.readline()\n"
        "print(json.dumps({'id': 0, 'event': 'done', 'pid': sleeper.pid}))\nsys.stdin.read()"
    )
    child = start(code, tmp_path)
    (answer,) = child.ask("done", "starting", {"op": "x"}, timeout=30)
    status = Path(f"/proc/{answer['pid']}/stat")
    assert status.exists()
    child.close()
    deadline = time.monotonic() + 10
    while runs(status) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not runs(status)


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="child cannot be started: No such file") as caught:
        WorkerProcess("child", [str(tmp_path / "absent")], {}, tmp_path / "log", "check it")
    assert caught.value.where == str(tmp_path / "absent")


def test_last_lines_of_a_long_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("x" * 100_000 + "\n\n" + "".join(f"line {i}\n\n" for i in range(50)))
    assert last_lines(log, 2) == ["line 48", "line 49"]
    assert last_lines(tmp_path / "absent") == []
