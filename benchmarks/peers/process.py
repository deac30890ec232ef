"""A process that is measured: CPU seconds, wall time, peak memory, and its exact error."""

import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_ERROR_CHARACTERS = 300


@dataclass(frozen=True)
class Measured:
    """A process that has ended.

    Attributes:
        cpu_seconds: user and system time, of all its threads and children.
        seconds: wall time.
        peak_memory: greatest resident set, in bytes.
        error: the last lines that it printed if it failed, else None.
    """

    cpu_seconds: float
    seconds: float
    peak_memory: int
    error: str | None


def run_measured(command: Sequence[str | Path], log: Path, environment: dict[str, str]) -> Measured:
    """Run a command with its output in a file.

    Args:
        command: the program and its arguments.
        log: takes what it prints.
        environment: added to this process's own.
    """
    # A program starts with the peak memory of the process that it replaces: a shell in between is small.
    shell = ["sh", "-c", '"$@"; exit $?', "sh", *map(str, command)]
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            shell, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return Measured(
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        seconds=time.monotonic() - started,
        peak_memory=usage.ru_maxrss * 1024,
        error=None if process.returncode == 0 else _last_lines(log, process.returncode),
    )


def _last_lines(log: Path, code: int) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "error" in line]
    text = (errors or lines or [f"exit code {code}"])[-1]
    return text[:_ERROR_CHARACTERS]
