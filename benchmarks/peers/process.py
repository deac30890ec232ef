"""A process that is measured: CPU seconds, wall time, peak memory, and its exact error."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path

# Of an error: some go on for lines.
_ERROR_LINES, _ERROR_CHARACTERS = 3, 300
_COUNT = """
import json, resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
with open(sys.argv[1], "w") as file:
    json.dump([usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, code], file)
"""


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
    # A process starts with the peak memory of the one it was forked from: a small one runs and counts it.
    counts = log.with_suffix(".json")
    started = time.monotonic()
    with log.open("wb") as output:
        subprocess.run(
            [sys.executable, "-S", "-c", _COUNT, counts, *map(str, command)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            check=True,
        )
    cpu_seconds, peak_memory, code = json.loads(counts.read_text())
    return Measured(
        cpu_seconds=cpu_seconds,
        seconds=time.monotonic() - started,
        peak_memory=peak_memory,
        error=None if code == 0 else _last_lines(log, code),
    )


def _last_lines(log: Path, code: int) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [i for i, line in enumerate(lines) if re.search(r"(Error|Exception)\b", line)]
    last = takewhile(lambda line: "Warning:" not in line, lines[errors[-1] if errors else -1 :])
    text = " ".join(islice(last, _ERROR_LINES)) or f"exit code {code}"
    # A path in a temporary folder says nothing to the reader.
    return text.replace(f"{log.parent}/", "")[:_ERROR_CHARACTERS]
