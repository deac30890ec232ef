"""The packages that this installation of msquant asks for, and the command that installs them."""

import shlex
from importlib.metadata import requires
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.requirements import Requirement


def requirements_of(extra: str = "") -> "list[Requirement]":
    """What msquant needs on this machine, or what one of its extras needs beside that."""
    from packaging.requirements import Requirement

    found = [Requirement(line) for line in requires("msquant") or []]
    if not extra:
        return [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]
    return [
        r
        for r in found
        if r.marker and r.marker.evaluate({"extra": extra}) and not r.marker.evaluate({"extra": ""})
    ]


def pip_install(extra: str) -> str:
    """The command that installs what an extra needs, by the packages' own names.

    `pip install 'msquant[EXTRA]'` would ask an index for msquant, which may be here from a clone or a wheel.
    """
    wanted = [
        r.name + (f"[{','.join(sorted(r.extras))}]" if r.extras else "") + str(r.specifier)
        for r in requirements_of(extra)
    ]
    return f"pip install {shlex.join(wanted)}"
