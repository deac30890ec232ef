"""`msquant` as a process of its own, which accounts for its own time and memory."""

import json
import subprocess
import sys
from typing import Any


def msquant(*arguments: object, expected: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """Run `msquant ... --json`.

    Args:
        arguments: of the command.
        expected: exit codes that are no failure.

    Returns:
        What it printed.

    Raises:
        SystemExit: it failed; its errors are on stderr.
    """
    command = [sys.executable, "-m", "msquant", *map(str, arguments), "--json"]
    # A program starts with the peak memory of the process that it replaces, and this one may be large: a
    # shell in between replaces it, and starts the program from its own small memory.
    shell = ["sh", "-c", '"$@"; exit $?', "sh", *command]
    process = subprocess.run(shell, stdout=subprocess.PIPE, text=True, check=False)
    if process.returncode not in expected:
        raise SystemExit(f"{' '.join(command)} failed")
    result: dict[str, Any] = json.loads(process.stdout)
    return result
