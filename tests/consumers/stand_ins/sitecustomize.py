"""What a test puts into a server's process, by PYTHONPATH: operators for the NPU that is not there.

Python imports this module when it starts. Nothing is imported before the server imports it itself.
"""

import ctypes
import importlib.abc
import importlib.machinery
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    """A server's worker waits for work for ever, whatever became of who started it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _operators() -> None:
    import npu_operators

    npu_operators.install()


def _vllm_mindspore() -> None:
    import vllm_mindspore_on_cpu

    vllm_mindspore_on_cpu.adapt()


def _device_nodes() -> None:
    sys.modules["msquant.inference.ascend_host"].DEVICE_NODES = os.environ["NPU_DEVICE_NODES"]


AFTER: dict[str, Callable[[], None]] = {"msadapter": _operators, "vllm_mindspore": _vllm_mindspore}
if "NPU_DEVICE_NODES" in os.environ:
    AFTER["msquant.inference.ascend_host"] = _device_nodes


class _After(importlib.abc.MetaPathFinder):
    """Finds nothing itself; lets a function follow the import of a module."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        follow = AFTER.pop(name, None)
        if follow is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def executed(module: Any) -> None:
            execute(module)
            follow()

        spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


_die_with_parent()
os.register_at_fork(after_in_child=_die_with_parent)
sys.meta_path.insert(0, _After())
