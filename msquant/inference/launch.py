"""A command with its environment: what a launcher executes, and what `--dry-run` prints."""

import json
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
        requests: JSON objects that are written to its standard input as lines, as soon as it is started.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    place: str = ""
    requests: tuple[Mapping[str, Any], ...] = ()

    def environment(self, inherited: Mapping[str, str] | None = None) -> dict[str, str]:
        """The whole environment of the process.

        Args:
            inherited: what it starts from; this process's own environment by default.
        """
        return {**(os.environ if inherited is None else inherited), **self.env}

    def shell(self) -> str:
        """Lines that do the same when they are pasted into a POSIX shell: the exports, then the command.

        Requests are comments below: the process ends with its standard input, so nothing could be piped in.
        """
        lines = [f"# {self.place}"] if self.place else []
        lines += [f"export {name}={shlex.quote(value)}" for name, value in self.env.items()]
        lines.append(shlex.join(self.argv))
        lines += [f"# its input: {json.dumps(request)}" for request in self.requests]
        return "\n".join(lines)

    def document(self) -> dict[str, Any]:
        """The same as plain data, for `--json`."""
        document: dict[str, Any] = {"env": dict(self.env), "argv": list(self.argv)}
        if self.requests:
            document["requests"] = [dict(request) for request in self.requests]
        return {"place": self.place, **document} if self.place else document
