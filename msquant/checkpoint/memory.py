"""What memory this machine has left."""

from pathlib import Path


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
