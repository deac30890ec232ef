"""One thing that was looked at on this machine, what was found, and what to do about it."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["ok", "note", "warning", "error"]


@dataclass(frozen=True)
class Check:
    """A line of a diagnosis.

    Attributes:
        section: what it belongs to, such as `packages`.
        subject: what was looked at, such as `numpy`.
        status: `ok`; `note`, missing but not needed here; `warning`, works but not as it should; `error`,
            something that is needed does not work.
        detail: what was found.
        remedy: what to do about it, unless it is `ok`.
    """

    section: str
    subject: str
    status: Status
    detail: str
    remedy: str | None = None

    def document(self) -> dict[str, Any]:
        """The same as plain data, for `--json`."""
        return asdict(self)


def failed(checks: Iterable[Check]) -> list[Check]:
    """Those that are errors."""
    return [check for check in checks if check.status == "error"]
