"""Memory that an array leaves is there for the next one, and goes back where it is much."""

import ctypes
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
from msquant.kernels.freed_memory import reuse_freed_memory

if sys.argv[1] == "reused":
    reuse_freed_memory()
for _ in range(3):
    np.ones(40 << 20, np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(40 << 20, np.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

RESIDENT = """
import numpy as np
import psutil
from msquant.kernels.freed_memory import reuse_freed_memory

reuse_freed_memory()
before = psutil.Process().memory_info().rss
arrays = [np.ones(300 << 20, np.uint8) for _ in range(2)] + [np.ones(100 << 20, np.uint8) for _ in range(12)]
del arrays
print(psutil.Process().memory_info().rss - before)
"""

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")


def answer(code: str, *arguments: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True
    )
    return int(done.stdout)


def test_pages_are_not_cleared_anew() -> None:
    assert answer(FAULTS, "reused") < answer(FAULTS, "given back") / 10


def test_no_more_is_kept_than_is_said() -> None:
    assert answer(RESIDENT) < (512 + 64 + 32) << 20
