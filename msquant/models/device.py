"""Where MindSpore computes, and in which dtype."""

import os
import signal
import threading
from functools import cache
from typing import Any

from msquant.errors import EngineError

DEVICES = ("cpu", "ascend")


def silence_libraries() -> None:
    """Keep the warnings of MindSpore and transformers off the terminal; for before either is imported.

    Errors still show, and a variable that the user has set wins.
    """
    os.environ.setdefault("GLOG_v", "3")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


@cache
def use_device(device: str = "cpu") -> Any:
    """Prepare MindSpore for eager execution on `device` and return the compute dtype.

    float32 on the CPU, which has no bfloat16 matrix product; bfloat16 on Ascend. Call it before MindSpore
    computes anything: the device of a process cannot be changed afterwards.

    Raises:
        EngineError: the device is unknown or not there.
    """
    if device not in DEVICES:
        raise EngineError(f"device {device!r} is unknown", remedy=f"use one of: {', '.join(DEVICES)}")
    # Read by MindSpore when a network is built: without it PyNative compiles every cell.
    os.environ["ENFORCE_EAGER"] = "true"
    import mindspore as ms

    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        ms.set_device({"cpu": "CPU", "ascend": "Ascend"}[device])
    except (RuntimeError, ValueError) as error:
        raise EngineError(
            f"MindSpore cannot use the device {device!r}: {str(error).splitlines()[0]}",
            remedy="use --device cpu, or install CANN and its driver on this machine",
        ) from error
    if device == "cpu":
        # Asynchronous dispatch starves on few cores: blocking is over 4x faster, with identical results.
        ms.runtime.launch_blocking()
    _keep_ctrl_c()
    return ms.float32 if device == "cpu" else ms.bfloat16


def _keep_ctrl_c() -> None:
    """Undo what MindSpore does to Ctrl-C: its handler ends the process without any clean-up."""
    from mindspore import Tensor, nn

    if threading.current_thread() is not threading.main_thread():
        return
    handler = signal.getsignal(signal.SIGINT)
    # The handler is installed when the first cell is called.
    nn.Dense(1, 1)(Tensor([[0.0]]))
    signal.signal(signal.SIGINT, handler)
