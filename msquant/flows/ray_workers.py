"""Worker processes on the nodes of a Ray cluster."""

import os
from collections.abc import Sequence
from typing import Any

from msquant.errors import EngineError
from msquant.flows.worker_pool import WorkerDied
from msquant.flows.worker_process import WorkerProcess
from msquant.flows.workers import Workers


class RayHand:
    """A worker, see `Hand`: an actor that Ray does not start anew by itself.

    Args:
        threads: cores that it asks its node for.
        memory: bytes that it asks for; 0 for none.
    """

    def __init__(self, threads: int, memory: int) -> None:
        import ray

        asked: dict[str, Any] = {"num_cpus": threads} | ({"memory": memory} if memory else {})
        remote = ray.remote(max_restarts=0, scheduling_strategy="SPREAD", **asked)(WorkerProcess)
        self._actor: Any = remote.remote()
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
        workers: how many, and the address; one on each node if no number is given.

    Raises:
        EngineError: Ray is not installed, the cluster is not reached, or has fewer cores than workers.

    Attributes:
        count: workers to hire.
        threads: cores of each.
    """

    def __init__(self, workers: Workers) -> None:
        try:
            import ray
        except ImportError as error:
            raise EngineError(
                "Ray is not installed here", where="--ray-address", remedy="pip install 'msquant[ray]'"
            ) from error
        # Nothing is told to anybody.
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        try:
            ray.init(workers.address, log_to_driver=False, logging_level=40, configure_logging=False)
        except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
            raise EngineError(
                f"the Ray cluster at {workers.address} is not reached: {str(error).splitlines()[0]}",
                where="--ray-address",
                remedy=f"start Ray {ray.__version__} on this machine too: "
                f"ray start --address={workers.address}",
            ) from error
        nodes = [node for node in ray.nodes() if node["Alive"]]
        cores = [int(node["Resources"].get("CPU", 0)) for node in nodes]
        self.count, self._memory = workers.count or len(nodes), workers.memory
        self._hands: list[RayHand] = []
        try:
            self.threads = threads_each(cores, self.count)
        except EngineError:
            self.close()
            raise

    def hire(self) -> RayHand:
        """As `Crew.hire`."""
        self._hands.append(RayHand(self.threads, self._memory))
        return self._hands[-1]

    def wait(self, hands: Sequence[RayHand], seconds: float) -> list[RayHand]:
        """As `Crew.wait`."""
        import ray

        ready, _ = ray.wait([hand.reference for hand in hands], timeout=seconds)
        return [hand for hand in hands if hand.reference in ready]

    def close(self) -> None:
        """As `Crew.close`."""
        import ray

        for hand in self._hands:
            hand.kill()
        ray.shutdown()


def threads_each(cores: Sequence[int], count: int) -> int:
    """The most cores that each of so many workers can have.

    Args:
        cores: of each node.
        count: workers; each is on one node.

    Raises:
        EngineError: there are more workers than cores.
    """
    for threads in range(max(cores, default=0), 0, -1):
        if sum(each // threads for each in cores) >= count:
            return threads
    raise EngineError(
        f"{count} workers are more than the {sum(cores)} cores of the cluster",
        where="--workers",
        remedy=f"use at most {sum(cores)}, or start Ray on more nodes",
    )
