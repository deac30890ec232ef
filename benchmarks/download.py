"""msquant's download beside curl and huggingface_hub, against one server on this machine, in one run.

One file of 2 GB, verified: `curl | sha256sum` beside `msquant download`, each a process. Eight files of
256 MB: huggingface_hub's `snapshot_download`, which verifies nothing, beside msquant, each one call in a
process of its own. Everything lies in memory (tmpfs) where there is room, for a disk that writes 0.2 GB/s
would be all that is measured. The server shares the cores with what it serves. The rounds alternate, and the
best of each counts.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.rows import row

ROUNDS = 3
LARGE_BYTES, SMALL_BYTES, SMALL_COUNT = 2_000_000_000, 256 << 20, 8
MIN_OF_CURL, MIN_OF_SNAPSHOT = 0.8, 1.0

_SERVER = """
import sys
from pathlib import Path
from tests.fixtures.hub_server import Hub, serve

hub, folder = Hub(), Path(sys.argv[1])
for name in ("large", "small"):
    files = {path.name: path for path in sorted((folder / name).iterdir())}
    repository = hub.repository(f"bench/{name}")
    for blob in repository.commits[repository.push(files)].values():
        blob.sha1
with serve(hub) as address:
    print(address, flush=True)
    sys.stdin.read()
"""
_CALL = """
import sys, time
{imports}
started = time.monotonic()
{call}
print(time.monotonic() - started)
"""
_SNAPSHOT = _CALL.format(
    imports="from huggingface_hub import snapshot_download",
    call="snapshot_download(sys.argv[1], local_dir=sys.argv[2])",
)
_OURS = _CALL.format(
    imports="""
from pathlib import Path
from msquant.hub.choose import find_snapshot
from msquant.hub.folder_download import download
""",
    call="""
snapshot = find_snapshot(sys.argv[1], hub="huggingface")
download(snapshot, snapshot.files, Path(sys.argv[2]))
""",
)


def measure() -> list[dict[str, Any]]:
    """Download both repositories with all four, several times."""
    with _folder() as folder:
        _write(folder / "served" / "large" / "model.safetensors", LARGE_BYTES)
        for number in range(SMALL_COUNT):
            _write(folder / "served" / "small" / f"model-{number}.safetensors", SMALL_BYTES)
        with _serve(folder / "served") as address:
            target = folder / "target"
            runs: dict[str, Callable[[], float]] = {
                "curl": lambda: _curl(f"{address}/bench/large/resolve/main/model.safetensors"),
                "ours, large": lambda: _command(address, "bench/large", target),
                "snapshot": lambda: _call(_SNAPSHOT, address, "bench/small", target),
                "ours, small": lambda: _call(_OURS, address, "bench/small", target),
            }
            best = dict.fromkeys(runs, float("inf"))
            for _ in range(ROUNDS):
                for name, run in runs.items():
                    best[name] = min(best[name], run())
                    shutil.rmtree(target, ignore_errors=True)
    large, small = LARGE_BYTES / 1e9, SMALL_COUNT * SMALL_BYTES / 1e9
    of_curl = best["curl"] / best["ours, large"]
    of_snapshot = best["snapshot"] / best["ours, small"]
    return [
        row("one file of 2 GB: curl | sha256sum, GB/s", round(large / best["curl"], 2)),
        row("the same by msquant, verified and written, GB/s", round(large / best["ours, large"], 2)),
        row("of curl | sha256sum", round(of_curl, 2), f">= {MIN_OF_CURL}", of_curl >= MIN_OF_CURL),
        row("8 files of 256 MB: snapshot of huggingface_hub, GB/s", round(small / best["snapshot"], 2)),
        row("the same by msquant, verified, GB/s", round(small / best["ours, small"], 2)),
        row("sha256 alone on one core, which the snapshot does not do, GB/s", round(_hash_speed(), 2)),
        row(
            "of that snapshot", round(of_snapshot, 2), f">= {MIN_OF_SNAPSHOT}", of_snapshot >= MIN_OF_SNAPSHOT
        ),
        row("load of the machine before, 1 min", round(os.getloadavg()[0], 2)),
    ]


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder in memory if there is room for the files twice, else on disk."""
    needed = 2 * (LARGE_BYTES + SMALL_COUNT * SMALL_BYTES)
    memory = Path("/dev/shm")
    fits = memory.is_dir() and shutil.disk_usage(memory).free > needed
    with tempfile.TemporaryDirectory(dir=memory if fits else None) as folder:
        yield Path(folder)


def _write(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    block = os.urandom(1 << 20)
    with path.open("wb") as file:
        for start in range(0, size, len(block)):
            file.write(block[: size - start])


@contextmanager
def _serve(folder: Path) -> Iterator[str]:
    command = [sys.executable, "-c", _SERVER, str(folder)]
    root = Path(__file__).parent.parent
    with subprocess.Popen(
        command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        assert server.stdin is not None
        yield server.stdout.readline().strip()
        server.stdin.close()


def _hash_speed() -> float:
    block = bytes(SMALL_BYTES)
    started = time.monotonic()
    hashlib.sha256(block).digest()
    return len(block) / 1e9 / (time.monotonic() - started)


def _curl(url: str) -> float:
    started = time.monotonic()
    subprocess.run(f"curl -sSfL {url} | sha256sum", shell=True, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def _command(address: str, repository: str, target: Path) -> float:
    options = ["--hub", "huggingface", "--output", str(target), "--json"]
    command = [sys.executable, "-m", "msquant", "download", repository, *options]
    started = time.monotonic()
    subprocess.run(
        command,
        env=_environment(address),
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.monotonic() - started


def _call(code: str, address: str, repository: str, target: Path) -> float:
    command = [sys.executable, "-c", code, repository, str(target)]
    done = subprocess.run(
        command,
        env=_environment(address),
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    return float(done.stdout)


def _environment(address: str) -> dict[str, str]:
    return os.environ | {"HF_ENDPOINT": address, "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
