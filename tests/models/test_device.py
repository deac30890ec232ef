"""Choosing a device."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import mindspore as ms
import pytest

from msquant.errors import EngineError
from msquant.models.device import require_device, use_device

_ASCEND_PROBE = """
from msquant.errors import EngineError
from msquant.models.device import use_device
try:
    use_device("ascend")
except EngineError as error:
    print(error)
"""


def test_the_cpu_computes_in_float32(dtype: Any) -> None:
    assert dtype == ms.float32
    assert use_device("cpu") == ms.float32, "choosing the same device again is allowed"


def test_an_unknown_device_names_the_known_ones() -> None:
    with pytest.raises(EngineError, match="device 'tpu' is unknown") as caught:
        use_device("tpu")
    assert caught.value.remedy == "did you mean cpu? use one of: cpu, ascend"
    assert caught.value.where == "--device"
    with pytest.raises(EngineError) as caught:
        require_device("npu")
    assert caught.value.remedy == "did you mean ascend? use one of: cpu, ascend"


@pytest.mark.skipif(Path("/dev/davinci_manager").exists(), reason="an NPU is here")
def test_ascend_without_an_npu_is_an_error_with_a_remedy() -> None:
    # In its own process, because MindSpore keeps what it was told about devices.
    command = [sys.executable, "-c", _ASCEND_PROBE]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert "MindSpore cannot use the device 'ascend'" in output
    assert "use --device cpu" in output
