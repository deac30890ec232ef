"""Worker processes on the nodes of a Ray cluster."""

import os
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from msquant.checkpoint.disk import shown_sizes
from msquant.errors import EngineError
from msquant.flows.worker_pool import PlaceLost, WorkerDied
from msquant.flows.worker_process import WorkerProcess, thread_variables
from msquant.flows.workers import Workers

_CONNECT_SECONDS = 5

# MindSpore's own messages were generated for an older protobuf than the one that Ray has loaded before it.
_PROTOBUF = {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"}


@dataclass(frozen=True)
class Place:
    """Where a worker is.

    Attributes:
        node: Ray's name of the node.
        threads: cores that the worker has.
    """

    node: str
    threads: int


class RayHand:
    """A worker, see `Hand`: an actor that Ray does not start anew by itself.

    Args:
        place: its node, and the cores that it asks for.
        memory: bytes that it asks for; 0 for none.
    """

    def __init__(self, place: Place, memory: int) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        asked: dict[str, Any] = {
            "num_cpus": place.threads,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(place.node, soft=False),
            "runtime_env": {"env_vars": _PROTOBUF | thread_variables(place.threads)},
        }
        if memory:
            asked["memory"] = memory
        self._actor: Any = ray.remote(max_restarts=0, **asked)(WorkerProcess).remote()
        self.reference: Any = None

    def call(self, method: str, *arguments: Any) -> None:
        """As `Hand.call`."""
        self.reference = getattr(self._actor, method).remote(*arguments)

    def answer(self) -> Any:
        """As `Hand.answer`."""
        import ray

        try:
            return ray.get(self.reference)
        except ray.exceptions.RayError as error:
            raise WorkerDied(str(error).strip().splitlines()[0]) from error

    def kill(self) -> None:
        """As `Hand.kill`."""
        import ray

        ray.kill(self._actor, no_restart=True)


class RayCrew:
    """Starts workers on a Ray cluster that this machine is a node of.

    Args:
        workers: how many, and the address; without a number one on each node, or as many as have work for
            its cores.

    Raises:
        EngineError: Ray is not installed, the cluster is not reached, has fewer cores than workers, or a node
            has less memory than its workers need.

    Attributes:
        count: workers to hire.
    """

    def __init__(self, workers: Workers) -> None:
        # Nothing is told to anybody.
        os.environ |= _PROTOBUF | {"RAY_USAGE_STATS_ENABLED": "0"}
        try:
            import ray
        except ImportError as error:
            raise EngineError(
                "Ray is not installed here", where="--ray-address", remedy="pip install 'msquant[ray]'"
            ) from error
        assert workers.address is not None
        try:
            # Ray itself tries for minutes.
            socket.create_connection(_meant(workers.address), _CONNECT_SECONDS).close()
            ray.init(workers.address, log_to_driver=False, logging_level=40, configure_logging=False)
        except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
            host, port = _meant(workers.address)
            raise EngineError(
                f"the Ray cluster at {host}:{port} is not reached: {str(error).splitlines()[0]}",
                where="--ray-address",
                remedy=f"start Ray {ray.__version__} on this machine too, ray start --address={host}:{port}; "
                f"a cluster of this machine alone by ray start --head --node-ip-address={host} --port={port}",
            ) from error
        self._memory, self._hands = workers.memory, list[RayHand]()
        try:
            self._places = _places(ray.nodes(), workers)
        except EngineError:
            self.close()
            raise
        self.count = len(self._places)

    def threads(self, number: int) -> int:
        """As `Crew.threads`."""
        return self._places[number].threads

    def hire(self, number: int) -> RayHand:
        """As `Crew.hire`."""
        import ray

        place = self._places[number]
        if not any(node["Alive"] for node in ray.nodes() if node["NodeID"] == place.node):
            raise PlaceLost("its node is not there any more")
        self._hands.append(RayHand(place, self._memory))
        return self._hands[-1]

    def wait(self, hands: Sequence[RayHand], seconds: float) -> list[RayHand]:
        """As `Crew.wait`."""
        import ray

        ready, _ = ray.wait([hand.reference for hand in hands], num_returns=len(hands), timeout=0)
        if not ready:
            ready, _ = ray.wait([hand.reference for hand in hands], timeout=seconds)
        return [hand for hand in hands if hand.reference in ready]

    def close(self) -> None:
        """As `Crew.close`."""
        import ray

        for hand in self._hands:
            hand.kill()
        ray.shutdown()


def _meant(address: str) -> tuple[str, int]:
    """The host and the port that Ray connects to; a loopback address is this machine's other one to it."""
    import ray

    host, _, port = address.rpartition(":")
    if host in ("127.0.0.1", "localhost", "::1"):
        host = ray.util.get_node_ip_address()
    return host, int(port)


def _places(nodes: Sequence[dict[str, Any]], workers: Workers) -> list[Place]:
    """Where workers are put, by Ray's own description of the nodes."""
    alive = [node for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    cores = [int(node["Resources"]["CPU"]) for node in alive]
    most = len(cores) if workers.threads is None else sum(max(1, each // workers.threads) for each in cores)
    shares = divided(cores, workers.count or most)
    for node, share in zip(alive, shares, strict=True):
        memory = int(node["Resources"].get("memory", 0))
        if len(share) * workers.memory > memory:
            left, needed = shown_sizes(memory, len(share) * workers.memory)
            raise EngineError(
                f"{len(share)} workers on node {node['NodeManagerAddress']} need about {needed} of memory, "
                f"Ray has {left} there",
                where="--workers",
                remedy="use fewer, or give ray start more by --memory",
            )
    return [
        Place(node["NodeID"], threads) for node, share in zip(alive, shares, strict=True) for threads in share
    ]


def divided(cores: Sequence[int], count: int) -> list[list[int]]:
    """The cores that each worker of each node has; the next worker goes where it has the most of them.

    Args:
        cores: of each node.
        count: workers.

    Raises:
        EngineError: there are more workers than cores, or no cores.
    """
    if not 0 < count <= sum(cores):
        raise EngineError(
            f"{count} workers are more than the {sum(cores)} cores of the cluster"
            if count
            else "no node of the cluster has a core to give",
            where="--workers",
            remedy=f"use at most {sum(cores)}, or start Ray on more nodes",
        )
    taken = Counter[int]()
    for _ in range(count):
        taken[max(range(len(cores)), key=lambda node: cores[node] // (taken[node] + 1))] += 1
    return [[each // taken[node]] * taken[node] if taken[node] else [] for node, each in enumerate(cores)]
