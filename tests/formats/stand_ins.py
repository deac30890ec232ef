"""Runs one file of a serving engine without the engine: what it imports from there is stood in for."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any


class _StandIn(ModuleType):
    """A module in which every class is an empty one, and every function decorates with nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper() and not name.isupper():
            return type(name, (), {"__init__": lambda self, *_: None})
        if name.isupper():
            return name.lower()
        return lambda *_: lambda decorated: decorated


@contextmanager
def _stood_in(names: tuple[str, ...]) -> Iterator[None]:
    modules = {}
    for name in names:
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            modules[".".join(parts[:end])] = _StandIn(".".join(parts[:end]))
    for module in modules.values():
        module.__path__ = []
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, old in before.items():
            if old is None:
                del sys.modules[name]
            else:
                sys.modules[name] = old


def find_file(package: str, path: str) -> Path | None:
    """A file of an installed package, found without importing it; None if the package is not installed."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        return None
    file = Path(found.submodule_search_locations[0]) / path
    return file if file.is_file() else None


def load_file(path: Path, name: str, stand_ins: tuple[str, ...] = ()) -> Any:
    """Execute a Python file as the module `name`, with stand-ins for the modules named."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _stood_in(stand_ins):
        spec.loader.exec_module(module)
    return module
