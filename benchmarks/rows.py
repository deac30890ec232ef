"""One line of a benchmark's result."""

from typing import Any


def row(what: str, measured: Any, target: str = "", met: bool | None = None) -> dict[str, Any]:
    """A measured value, beside the target it has to meet if there is one."""
    return {"what": what, "measured": measured, "target": target, "met": met}
