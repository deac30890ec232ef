"""Layers that the nodes of a real Ray cluster share: the same bytes, whoever is killed."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.fixtures.quantize_process import FEED_FORWARD, RECIPE, digests, ended, journaled, start
from tests.fixtures.tiny_families import write_tiny
from tests.fixtures.tiny_strangers import write_stranger

# A node's agent has some seconds to start in, which it misses beside the other tests.
pytestmark = [pytest.mark.e2e, pytest.mark.slow]

LAYERS = 4
KILLS = 20


class Cluster:
    """Two nodes of one core each on this machine."""

    def __init__(self) -> None:
        # Where tests of MindSpore are collected, nothing may load a newer protobuf before it.
        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            self.port = free.getsockname()[1]
        host = ray.util.get_node_ip_address()
        self.address = f"{host}:{self.port}"
        # By the usual folder other programs of this machine would find a cluster that is gone. Sockets are in
        # it, whose paths are short.
        self.folder = tempfile.mkdtemp(prefix="ray-")
        where = f"--node-ip-address={host}", f"--port={self.port}", f"--temp-dir={self.folder}"
        self.head = self._start("--head", *where)
        self.other = self.join()

    def _start(self, *options: str) -> subprocess.Popen[str]:
        """A node, when it says that it has started; it ends with the process."""
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("ray")), "start", *options, "--block", "--num-cpus=1"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Each node is to have a name of its own for what it starts.
            start_new_session=True,
            env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "no_proxy": "*"},
        )
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if "Ray runtime started" in line:
                return process
        raise AssertionError("".join(said))

    def join(self) -> subprocess.Popen[str]:
        return self._start(f"--address={self.address}")

    def lose(self) -> None:
        """Kill the second node, as if its power were cut, and start another."""
        _kill(self.other)
        for left in reversed(range(3)):
            try:
                self.other = self.join()
                return
            except AssertionError:
                # A node that is busy with what was killed does not answer in time.
                if not left:
                    raise

    def end(self) -> None:
        _kill(self.other)
        _kill(self.head)
        shutil.rmtree(self.folder)


def _kill(node: subprocess.Popen[str]) -> None:
    """All processes of a node, which may have been killed before."""
    if node.returncode is not None:
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    node.communicate()


def workers() -> list[psutil.Process]:
    """The processes in which Ray has put this project's workers."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[:1] and "WorkerProcess" in process.cmdline()[0]:
                found.append(process)
    return found


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    try:
        yield cluster
    finally:
        cluster.end()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    model = write_tiny(folder / "model", "deepseek_v3", layers=LAYERS, dtype="bfloat16")
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(model=model, feed_forward=FEED_FORWARD["deepseek_v3"]))
    return path


@pytest.fixture(scope="module")
def expected(recipe: Path) -> dict[str, str]:
    """What one process writes that nobody disturbs."""
    ended(start(recipe, recipe.parent / "whole"), seconds=900)
    return digests(recipe.parent / "whole")


def test_the_bytes_are_those_of_one_process(
    cluster: Cluster, recipe: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    process, most = start(recipe, tmp_path / "out", "--ray-address", cluster.address), 0
    while process.poll() is None:
        most = max(most, len(workers()))
        time.sleep(0.2)
    ended(process)
    assert most == 2
    assert digests(tmp_path / "out") == expected
    assert workers() == []


def test_parts_without_calibration_are_shared(cluster: Cluster, tmp_path: Path) -> None:
    model = write_stranger(tmp_path / "model", "dots1", max_shard_size="60KB")
    ended(start(model, tmp_path / "whole", "--calibration", "none"))
    errors = ended(start(model, tmp_path / "out", "--calibration", "none", "--ray-address", cluster.address))
    assert "joining the Ray cluster" in errors
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert workers() == []


def test_a_node_that_is_lost_is_gone_on_without(
    cluster: Cluster, recipe: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    process = start(recipe, tmp_path / "out", "--ray-address", cluster.address)
    deadline = time.monotonic() + 300
    while journaled(tmp_path / "out") < 1:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    _kill(cluster.other)
    assert "died; " in ended(process, seconds=900)
    assert digests(tmp_path / "out") == expected


def test_random_kills_change_nothing(
    cluster: Cluster, recipe: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    """Of workers, of a node, and of the command, which is then given again."""
    choose, kills, runs = random.Random(11), 0, 0
    while kills < KILLS:
        output, runs = tmp_path / f"out{runs}", runs + 1
        while not output.exists():
            process = start(recipe, output, "--ray-address", cluster.address)
            while process.poll() is None and kills < KILLS:
                time.sleep(choose.uniform(5, 20))
                what = choose.choice(["worker", "worker", "node", "command"])
                kills += 1
                if what == "node":
                    cluster.lose()
                elif what == "command":
                    process.kill()
                else:
                    for victim in choose.sample(found, 1) if (found := workers()) else []:
                        with contextlib.suppress(psutil.NoSuchProcess):
                            victim.kill()
            _, errors = process.communicate(timeout=900)
            # Three deaths of one task end a run, which then continues by the same command.
            assert process.returncode in (0, -signal.SIGKILL) or "3 workers died" in errors, errors
        assert digests(output) == expected
