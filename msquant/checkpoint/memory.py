"""What memory this machine has left, and what this process has taken."""

import resource
from pathlib import Path

MEMORY_BUDGET = 10**9
"""Bytes of hidden states that are held in memory; more are kept on disk."""


def available_memory() -> int | None:
    """Bytes that a new process can use: what the system has left, or its control group if that is less."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        found.append(max(0, limit))
    except (OSError, ValueError, IndexError):
        # No such group, or one without a limit: "max".
        pass
    return min(found, default=None)


def peak_memory() -> int:
    """Greatest resident set of this process; ru_maxrss would hold that of a large parent before it."""
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
