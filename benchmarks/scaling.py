"""Two workers of one core beside one process of one core: SmolLM2-135M by osl, in one run.

The machine should do nothing else: both are seconds of time. The evaluation is left out: it is not shared.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.command import msquant
from benchmarks.rows import row
from benchmarks.smollm2 import float_folder
from msquant.checkpoint.writer import file_sha256

MIN_RATIO = 1.8


def measure() -> list[dict[str, Any]]:
    """Quantize with one and with two; their shards must have the same bytes."""
    model, cores = float_folder(), sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        return [row("cores", len(cores), ">= 2", False)]
    seconds: dict[int, float] = {}
    shards: dict[int, list[str]] = {}
    with tempfile.TemporaryDirectory(prefix="msquant-scaling-") as folder:
        for workers in (1, 2):
            output = Path(folder) / str(workers)
            with bound_to(cores[:workers]):
                options = ("--algo", "osl", "--workers", workers, "--no-evaluate")
                result = msquant("quantize", model, "--output", output, *options)
            seconds[workers] = result["seconds"]
            shards[workers] = [file_sha256(path) for path in sorted(output.glob("*.safetensors"))]
    ratio = seconds[1] / seconds[2]
    return [
        row("one process on one core, s", round(seconds[1], 1)),
        row("two workers of one core, s", round(seconds[2], 1)),
        row("times faster", round(ratio, 2), f">= {MIN_RATIO}", ratio >= MIN_RATIO),
        row("the same bytes", shards[1] == shards[2], "True", shards[1] == shards[2]),
    ]


@contextmanager
def bound_to(cores: list[int]) -> Iterator[None]:
    """Within the block this process and those that it starts keep to some cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
