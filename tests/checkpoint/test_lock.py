"""A lock that says who holds it, and ends with its process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from msquant.checkpoint.lock import LockHeld, acquire_lock

HOLDER = """
import sys, time
from pathlib import Path
from msquant.checkpoint.lock import acquire_lock
acquire_lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_another_process_is_named_and_its_end_frees_the_lock(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LockHeld, match=f"process {holder.pid} on "):
            acquire_lock(tmp_path / "lock")
        holder.kill()
    os.close(acquire_lock(tmp_path / "lock"))


@pytest.mark.parametrize("text", ["", "[" * 1000])
def test_a_holder_that_says_nothing_is_another_process(text: str, tmp_path: Path) -> None:
    descriptor = acquire_lock(tmp_path / "lock")
    (tmp_path / "lock").write_text(text)
    with pytest.raises(LockHeld, match="another process"):
        acquire_lock(tmp_path / "lock")
    os.close(descriptor)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="symbolic links"):
        acquire_lock(tmp_path / "lock")
    assert not (tmp_path / "other").exists()
