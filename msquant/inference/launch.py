"""A command with its environment: what a launcher executes, and what `--dry-run` prints."""

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Launch:
    """A process to start.

    Attributes:
        argv: the program and its arguments.
        env: the variables to set on top of the environment that the process inherits.
        place: where it is to be run, for people (`node 0, the head`); empty for this machine.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    place: str = ""

    def environment(self, inherited: Mapping[str, str] | None = None) -> dict[str, str]:
        """The whole environment of the process.

        Args:
            inherited: what it starts from; this process's own environment by default.
        """
        return {**(os.environ if inherited is None else inherited), **self.env}

    def shell(self) -> str:
        """Lines that do the same when they are pasted into a POSIX shell: the exports, then the command."""
        lines = [f"# {self.place}"] if self.place else []
        lines += [f"export {name}={shlex.quote(value)}" for name, value in self.env.items()]
        return "\n".join([*lines, shlex.join(self.argv)])

    def document(self) -> dict[str, Any]:
        """The same as plain data, for `--json`."""
        document: dict[str, Any] = {"env": dict(self.env), "argv": list(self.argv)}
        return {"place": self.place, **document} if self.place else document
