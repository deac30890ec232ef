"""Where the time of a run goes: functions are timed by name, each without the timed ones that it calls."""

import importlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

Label = str | Callable[..., str]
"""A part's name, or what makes it of the name of the part around (or "") and the function's arguments."""


class Profiler:
    """Times functions for as long as it is entered.

    What worker threads do is no wall time: it divides the time of the part that waits for them, in `share`.

    Args:
        functions: labels by `module:name` or `module:Class.name`; the name as its caller looks it up.

    Attributes:
        seconds: wall time of this thread by part, without that of other parts within it.
        worked: time of other threads by part.
    """

    def __init__(self, functions: Mapping[str, Label]) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.worked: dict[str, float] = defaultdict(float)
        self._functions = functions
        self._main = threading.current_thread()
        self._local = threading.local()
        self._lock = threading.Lock()
        self._originals: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> "Profiler":
        for path, label in self._functions.items():
            self.replace(path, partial(self.timed, label))
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, original in reversed(self._originals):
            setattr(owner, name, original)
        self._originals.clear()

    def replace(self, path: str, wrap: Callable[[Any], Any]) -> None:
        """Put `wrap(function)` in a function's place until the end."""
        module, _, name = path.partition(":")
        owner: Any = importlib.import_module(module)
        *classes, name = name.split(".")
        for part in classes:
            owner = getattr(owner, part)
        original = getattr(owner, name)
        self._originals.append((owner, name, original))
        setattr(owner, name, wrap(original))

    def timed(self, label: Label, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time charged to a part."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            name = label if isinstance(label, str) else label(self._around(), *args, **kwargs)
            with self.part(name):
                return function(*args, **kwargs)

        return call

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Charge the block's time to a part."""
        stack = self._stack()
        stack.append((name, 0.0))
        started = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - started
            own = elapsed - stack.pop()[1]
            if stack:
                around, inner = stack[-1]
                stack[-1] = around, inner + elapsed
            with self._lock:
                (self.seconds if threading.current_thread() is self._main else self.worked)[name] += own

    def share(self, waiting: str) -> None:
        """Divide the time of a part that waits for threads by what these worked, and forget both."""
        waited, total = self.seconds.pop(waiting, 0.0), sum(self.worked.values())
        for name, worked in self.worked.items():
            self.seconds[name] += waited * worked / total
        self.worked.clear()

    def reset(self) -> None:
        """Begin at nothing."""
        self.seconds.clear()
        self.worked.clear()

    def _around(self) -> str:
        stack = self._stack()
        return stack[-1][0] if stack else ""

    def _stack(self) -> list[tuple[str, float]]:
        """Of this thread: the parts it is in, with the time that other parts took within each."""
        stack: list[tuple[str, float]] = self._local.__dict__.setdefault("stack", [])
        return stack
