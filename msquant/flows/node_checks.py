"""Whether the nodes of a cluster are alike: folders, versions, arithmetic, memory."""

import os
import platform
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from msquant.checkpoint.memory import available_memory
from msquant.deploy.ascend_checks import Check
from msquant.errors import EngineError
from msquant.flows.manifest import RECORDED

_SAME = "install the same msquant with its dependencies on all nodes"


@dataclass(frozen=True)
class NodeReport:
    """What a worker has and sees.

    Attributes:
        host: its node's name.
        cores: that it is bound to.
        memory: bytes that are available on its node; None if that cannot be told.
        versions: of Python, and of the packages that a result depends on.
        arithmetic: sha256 of a small reference computation; empty where nothing depends on it.
        source: sha256 of the headers of the weights that it sees; None if it was not asked.
        probe: what it read of the file that it was shown; None if there is none.
    """

    host: str
    cores: int
    memory: int | None
    versions: dict[str, str]
    arithmetic: str
    source: str | None
    probe: str | None

    @property
    def other_versions(self) -> list[str]:
        """The packages that it has in another version than this process, with both."""
        return [
            f"{package} {self.versions.get(package)}, {expected} here"
            for package, expected in own_versions().items()
            if self.versions.get(package) != expected
        ]

    def computes_as(self, other: "NodeReport") -> bool:
        """Whether its processor gives the same digits as another node's."""
        return self.arithmetic == other.arithmetic


def look_around(device: str | None, source: Path | None, probe: Path | None, number: int) -> NodeReport:
    """Make the report of this process.

    Args:
        device: whose arithmetic to show, as `Job.device`.
        source: folder of the weights; its headers are read.
        probe: a file to read, and to copy to `answer_of(probe, number)`.
        number: of this worker.

    Raises:
        MsquantError: the weights are not there, or the device is not.
    """
    from msquant.checkpoint.checkpoint_reader import Checkpoint

    found = None
    if probe is not None and probe.is_file():
        found = probe.read_text()
        answer_of(probe, number).write_text(found)
    return NodeReport(
        host=socket.gethostname(),
        cores=len(os.sched_getaffinity(0)),
        memory=available_memory(),
        versions=own_versions(),
        arithmetic="" if device is None else reference_checksum(device),
        source=None if source is None else Checkpoint.open(source).fingerprint()["sha256"],
        probe=found,
    )


def answer_of(probe: Path, number: int) -> Path:
    """Where the worker with that number leaves what it has read of the probe."""
    return probe.with_suffix(f".{number}.tmp")


def reference_checksum(device: str) -> str:
    """sha256 of products, exponents and factors of fixed numbers, as MindSpore and NumPy compute them here.

    Processors with other instructions add in another order, and differ in the last digits.
    """
    import hashlib

    import numpy as np

    from msquant.kernels.blas import one_blas_thread
    from msquant.models.device import use_device

    dtype = use_device(device)
    from mindspore import Tensor, ops

    digest, generator = hashlib.sha256(), np.random.default_rng(0)
    for tokens, columns, rows in ((7, 576, 192), (128, 320, 512), (33, 1024, 96)):
        x = generator.standard_normal((tokens, columns), np.float32)
        weight = generator.standard_normal((rows, columns), np.float32)
        products = ops.matmul(Tensor(x, dtype), Tensor(weight, dtype).T)
        digest.update(products.astype("float32").asnumpy().tobytes())
        digest.update(ops.softmax(products, -1).astype("float32").asnumpy().tobytes())
        with one_blas_thread():
            digest.update((x @ weight.T).tobytes())
            digest.update((x.T @ x).tobytes())
        digest.update(np.exp(x).tobytes())
    return digest.hexdigest()


def own_versions() -> dict[str, str]:
    """Versions of Python, and of the packages that a result depends on, in this process."""
    return {"python": platform.python_version()} | {package: version(package) for package in RECORDED}


def require_alike(
    reports: Sequence[NodeReport], source: Path, sha256: str, *, different_arithmetic: bool
) -> None:
    """Check that all workers see the same weights as this process, run its versions and compute the same.

    Args:
        reports: of all workers.
        source: folder of the weights.
        sha256: of the headers of the weights, as this process sees them.
        different_arithmetic: let them compute differently.

    Raises:
        EngineError: one differs; names its node and what differs.
    """
    first = reports[0]
    for report in reports:
        if other := report.other_versions:
            raise EngineError(f"node {report.host} has {other[0]}", where="--ray-address", remedy=_SAME)
        if report.source not in (None, sha256):
            raise EngineError(
                f"node {report.host} sees other weights than this machine",
                where=source,
                remedy="put the source on a disk that all nodes mount at the same path",
            )
        if not report.computes_as(first) and not different_arithmetic:
            raise EngineError(
                f"the processors of {report.host} and {first.host} round differently: bytes of the result "
                "would depend on which of them computes a layer",
                where="--ray-address",
                remedy="use nodes of one kind, or accept last digits that vary: --allow-different-arithmetic",
            )


def alike_checks(reports: Sequence[NodeReport]) -> list[Check]:
    """What is to be said of every node, for `msquant doctor`.

    Args:
        reports: one of each node.
    """
    checks = []
    for report in reports:
        other = report.other_versions
        checks.append(
            Check(
                report.host,
                "versions",
                "error" if other else "ok",
                "; ".join(other) or f"msquant {report.versions['msquant']} with the packages of this machine",
                _SAME if other else None,
            )
        )
        same = report.computes_as(reports[0])
        checks.append(
            Check(
                report.host,
                "arithmetic",
                "ok" if same else "error",
                f"reference {report.arithmetic[:12]}"
                + ("" if same else f", {reports[0].arithmetic[:12]} on {reports[0].host}"),
                None if same else "use nodes of one kind, or --allow-different-arithmetic: bytes then vary",
            )
        )
        memory = "unknown" if report.memory is None else f"{report.memory / 1e9:.1f} GB available"
        checks.append(Check(report.host, "memory", "ok", f"{memory}, {report.cores} cores"))
    return checks
