"""Where MindSpore computes, and in which dtype."""

import os
import signal
import threading
from functools import cache
from typing import Any

from msquant.errors import EngineError, choices

_TARGETS = {"cpu": "CPU", "ascend": "Ascend"}
"""What MindSpore calls each device."""

DEVICES = tuple(_TARGETS)


def silence_libraries() -> None:
    """Keep the warnings of MindSpore and transformers off the terminal; for before either is imported.

    Errors still show, and a variable that the user has set wins.
    """
    os.environ.setdefault("GLOG_v", "3")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def mindspore_target(device: str) -> str:
    """What MindSpore calls a device. Raises EngineError if there is none of that name."""
    if device not in _TARGETS:
        # "npu" is nearer to "cpu" in letters, and means the other.
        meant = "ascend" if device == "npu" else device
        raise EngineError(f"device {device!r} is unknown", where="--device", remedy=choices(meant, DEVICES))
    return _TARGETS[device]


def require_device(device: str) -> None:
    """Refuse a device before any work; unlike `use_device`, the process may use another one afterwards.

    Raises:
        EngineError: the device is unknown or not there.
    """
    target = mindspore_target(device)
    if device == "cpu":
        return
    import mindspore as ms

    if not ms.hal.is_available(target):
        raise _not_usable(device, "its libraries or the NPU's driver cannot be loaded")


@cache
def use_device(device: str = "cpu") -> Any:
    """Prepare MindSpore for eager execution on `device` and return the compute dtype.

    float32 on the CPU, which has no bfloat16 matrix product; bfloat16 on Ascend. Call it before MindSpore
    computes anything: the device of a process cannot be changed afterwards.

    Raises:
        EngineError: the device is unknown or not there.
    """
    target = mindspore_target(device)
    # Read by MindSpore when a network is built: without it PyNative compiles every cell.
    os.environ["ENFORCE_EAGER"] = "true"
    import mindspore as ms

    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        ms.set_device(target)
    except (RuntimeError, ValueError) as error:
        raise _not_usable(device, str(error).splitlines()[0]) from error
    if device == "cpu":
        # Asynchronous dispatch starves on few cores: blocking is over 4x faster, with identical results.
        ms.runtime.launch_blocking()
    _keep_ctrl_c()
    return ms.float32 if device == "cpu" else ms.bfloat16


def _not_usable(device: str, reason: str) -> EngineError:
    return EngineError(
        f"MindSpore cannot use the device {device!r}: {reason}",
        where="--device",
        remedy="use --device cpu, or install CANN and its driver on this machine",
    )


def _keep_ctrl_c() -> None:
    """Undo what MindSpore does to Ctrl-C: its handler ends the process without any clean-up."""
    from mindspore import Tensor, nn

    if threading.current_thread() is not threading.main_thread():
        return
    handler = signal.getsignal(signal.SIGINT)
    # The handler is installed when the first cell is called.
    nn.Dense(1, 1)(Tensor([[0.0]]))
    signal.signal(signal.SIGINT, handler)
