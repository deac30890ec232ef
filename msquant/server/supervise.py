"""Another engine's server as a child process: started, watched until it answers, ended with this process."""

import os
import signal
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.client import HTTPException
from types import FrameType

from msquant.errors import EngineError
from msquant.inference.launch import Launch

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_POLL_SECONDS = 0.5
# A server that was asked to end and does not is killed.
END_SECONDS = 30.0


def supervise(
    launch: Launch,
    health: str | None,
    on_ready: Callable[[int], None],
    secrets: Mapping[str, str] | None = None,
    log: int | None = None,
    end_seconds: float = END_SECONDS,
) -> None:
    """Run a server until it ends. SIGINT, SIGTERM and SIGHUP are passed on to it.

    Args:
        launch: the command.
        health: URL that answers 200 when the server is ready, or None if it has none.
        on_ready: called with the process id when it is ready.
        secrets: more variables, which `launch` does not show.
        log: file descriptor for the server's standard output; by default this process's own.
        end_seconds: time to end after a signal.

    Raises:
        EngineError: the program is not there, or it ended by itself with an exit code other than 0.
        KeyboardInterrupt: it was ended by Ctrl-C.
    """
    environment = launch.environment() | dict(secrets or {})
    received: list[int] = []
    try:
        # A session of its own: Ctrl-C reaches the server once, from here.
        process = subprocess.Popen(launch.argv, env=environment, stdout=log, start_new_session=True)
    except OSError as error:
        raise EngineError(
            f"cannot start {launch.argv[0]} ({error.strerror or error})",
            where="--engine",
            remedy="install the engine: msquant doctor says what is missing",
        ) from error

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        _signal(process, number)

    with _handling(forward):
        try:
            _wait(process, health, on_ready, received, end_seconds)
        finally:
            # Its own workers go with it.
            _signal_group(process, signal.SIGKILL)
            process.wait()
    if signal.SIGINT in received:
        raise KeyboardInterrupt
    if process.returncode and not received:
        raise EngineError(
            f"{launch.argv[0]} ended with exit code {process.returncode}",
            where="--engine",
            remedy="its own messages above say why",
        )


def _wait(
    process: "subprocess.Popen[bytes]",
    health: str | None,
    on_ready: Callable[[int], None],
    received: list[int],
    end_seconds: float,
) -> None:
    ready = False
    left = end_seconds
    while True:
        if not ready and not received and (health is None or _answers(health)):
            ready = True
            on_ready(process.pid)
        try:
            process.wait(_POLL_SECONDS)
            return
        except subprocess.TimeoutExpired:
            left -= _POLL_SECONDS if received else 0
            if left <= 0:
                return


def _answers(url: str) -> bool:
    """Whether a URL of this machine answers with success; a proxy of the environment is not asked."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_POLL_SECONDS) as response:
            return bool(response.status == 200)
    except (OSError, HTTPException):
        return False


def _signal(process: "subprocess.Popen[bytes]", number: int) -> None:
    if process.poll() is None:
        process.send_signal(number)


def _signal_group(process: "subprocess.Popen[bytes]", number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in _FORWARDED}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
