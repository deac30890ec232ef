"""Who does the work on decoder layers."""

from dataclasses import dataclass

from msquant.errors import EngineError

# Beyond one a worker, so that none of them waits for the chain.
_AHEAD = 2


def layers_ahead(workers: int) -> int:
    """How many layers the floating-point pass of so many workers may be ahead of the quantization."""
    return workers + _AHEAD


@dataclass(frozen=True)
class Workers:
    """Who does the work on decoder layers.

    Attributes:
        count: processes; 1 is this one alone, without Ray. None: one, or with an address one a node.
        address: `HOST:PORT` of a Ray cluster to join; None for this machine.
        memory: bytes that one takes at most, as the plan says; 0 if that is not known.
        allow_different_arithmetic: go on where nodes round differently, so that bytes depend on who computes.
    """

    count: int | None = None
    address: str | None = None
    memory: int = 0
    allow_different_arithmetic: bool = False

    @property
    def in_process(self) -> bool:
        """Whether no other process is needed."""
        return self.address is None and self.count in (None, 1)


def require_workers(count: int | None, address: str | None, device: str, *, without_text: bool) -> None:
    """Refuse what no worker can do, before any work.

    Args:
        count: as in `Workers`.
        address: likewise.
        device: that they would compute on.
        without_text: whether the model is quantized without calibration.

    Raises:
        EngineError: the count or the address is none; workers are asked for where only one process works.
    """
    if count is not None and count < 1:
        raise EngineError(f"{count} workers can do nothing", where="--workers", remedy="use 1 or more")
    if address is not None:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise EngineError(
                f"{address!r} is no HOST:PORT",
                where="--ray-address",
                remedy="give what ray start --head has shown, such as 10.0.0.1:6379",
            )
    if Workers(count, address).in_process:
        return
    where = "--workers" if address is None else "--ray-address"
    if without_text:
        raise EngineError(
            "--calibration none computes no layer that workers could share",
            where=where,
            remedy="leave the option out: it uses all cores of this machine by itself",
        )
    if device != "cpu":
        raise EngineError(
            f"workers compute on the CPU, not on {device}", where=where, remedy="leave one of the options out"
        )
