"""Quantizing SmolLM2-135M, 16 x 128 calibration tokens: time and memory of the whole process.

With OSL, and with the recipe as it is.
"""

from typing import Any

from benchmarks.rows import row
from benchmarks.smollm2 import quantized

MAX_SECONDS, MAX_BYTES = 300, 2.5e9
DEFAULT_MAX_SECONDS = 180


def measure() -> list[dict[str, Any]]:
    """Run the command and account for it."""
    result = quantized()
    seconds, peak = result["wall_seconds"], result["peak_memory_bytes"]
    default = quantized(algorithm=None)
    default_seconds = default["wall_seconds"]
    return [
        row("wall time, s", round(seconds, 1), f"< {MAX_SECONDS}", seconds < MAX_SECONDS),
        row("peak memory, GB", round(peak / 1e9, 2), f"< {MAX_BYTES / 1e9}", peak < MAX_BYTES),
        row(
            "wall time of the recipe as it is, s",
            round(default_seconds, 1),
            f"< {DEFAULT_MAX_SECONDS}",
            default_seconds < DEFAULT_MAX_SECONDS,
        ),
        row("its peak memory, GB", round(default["peak_memory_bytes"] / 1e9, 2)),
        row("size before, MB", round(result["source_bytes"] / 1e6, 1)),
        row("size after, MB", round(result["output_bytes"] / 1e6, 1)),
    ]
