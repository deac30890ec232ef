"""Quantizing SmolLM2-135M with OSL, 16 x 128 calibration tokens: time and memory of the whole process."""

from typing import Any

from benchmarks.rows import row
from benchmarks.smollm2 import quantized

MAX_SECONDS, MAX_BYTES = 300, 2.5e9


def measure() -> list[dict[str, Any]]:
    """Run the command and account for it."""
    result = quantized()
    seconds, peak = result["wall_seconds"], result["peak_memory_bytes"]
    return [
        row("wall time, s", round(seconds, 1), f"< {MAX_SECONDS}", seconds < MAX_SECONDS),
        row("peak memory, GB", round(peak / 1e9, 2), f"< {MAX_BYTES / 1e9}", peak < MAX_BYTES),
        row("size before, MB", round(result["source_bytes"] / 1e6, 1)),
        row("size after, MB", round(result["output_bytes"] / 1e6, 1)),
    ]
