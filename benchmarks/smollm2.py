"""The real model that the benchmarks share, and its quantized folder, made once."""

import json
import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

from msquant.checkpoint.cache import cache_folder
from msquant.hub.bundled import smollm2_folder

SAMPLES, SEQUENCE_LENGTH = 16, 128


def float_folder() -> Path:
    """The unquantized model."""
    return smollm2_folder()


def _hide_progress_bars() -> None:
    """Keep the progress bars of transformers out of the tables."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@cache
def quantized() -> dict[str, Any]:
    """Run `msquant quantize smollm2-135m --algo osl` as a process of its own, once.

    Returns:
        What `--json` printed, with `wall_seconds` and `peak_memory_bytes` of the whole process as the
        operating system accounts for them.
    """
    float_folder()
    _hide_progress_bars()
    output = cache_folder() / "benchmarks" / "smollm2-135m-osl"
    command = [sys.executable, "-m", "msquant", "quantize", "smollm2-135m", "--algo", "osl", "--json"]
    command += ["--samples", str(SAMPLES), "--sequence-length", str(SEQUENCE_LENGTH)]
    command += ["--output", str(output), "--overwrite"]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return {
        **json.loads(printed),
        "wall_seconds": time.monotonic() - started,
        "peak_memory_bytes": usage.ru_maxrss * 1024,
    }
