"""Stands in for msadapter, which is MindSpore under torch's names and is on no index.

It is the real torch, whose devices are this CPU's memory; what vLLM-MindSpore and vLLM do with it is theirs.
"""

import contextlib
import sys
import types
from typing import Any

import torch

MEMORY = 1 << 25
"""Bytes that the device has, as far as vLLM can see; it takes what is left for the cache."""

_used = 0


def _memory_info(*_: Any) -> tuple[int, int]:
    # vLLM wants to see that its trial run has taken some of it.
    global _used
    _used += 1 << 12
    return MEMORY - _used, MEMORY


class Event:
    """Something on a device to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """It has happened."""

    def wait(self, *_: Any) -> None:
        """A CPU has done everything at once."""

    record = synchronize = wait


class Stream(Event):
    """What a device does in the background."""


# torch keeps tables of its functions, so each is one of its own.
for _name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"):
    setattr(torch.cuda, _name, lambda *_: None)
for _name in ("memory_reserved", "memory_allocated", "max_memory_allocated"):
    setattr(torch.cuda, _name, lambda *_: 0)
for _name in ("current_stream", "default_stream"):
    setattr(torch.cuda, _name, lambda *_: Stream())
torch.cuda.mem_get_info = _memory_info
torch.cuda.memory_stats = lambda *_: {}
torch.cuda.get_device_name = lambda *_: "Ascend910B"
torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(
    total_memory=MEMORY, multi_processor_count=1, name="Ascend910B"
)
torch.cuda.Event, torch.cuda.Stream = Event, Stream
torch.cuda.stream = lambda *_: contextlib.nullcontext()
torch.compile = lambda model=None, **_: model if model is not None else (lambda function: function)
sys.modules[__name__] = torch
