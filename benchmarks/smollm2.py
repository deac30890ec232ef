"""The real model that the benchmarks share, and its quantized folder, made once."""

import time
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.command import msquant
from msquant.checkpoint.cache import cache_folder
from msquant.zoo.bundled import smollm2_folder

SAMPLES, SEQUENCE_LENGTH = 16, 128


def float_folder() -> Path:
    """The unquantized model."""
    return smollm2_folder()


def _hide_progress_bars() -> None:
    """Keep the progress bars of transformers out of the tables."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@cache
def quantized(
    algorithm: str | None = "osl-golden-stick", options: tuple[str, ...] = (), name: str | None = None
) -> dict[str, Any]:
    """Run `msquant quantize smollm2-135m` as a process of its own, once for each algorithm and its options.

    Args:
        algorithm: what `--algo` is given; None is the recipe's own.
        options: more of the command's.
        name: of the folder, behind the model's; None for the algorithm's, which options must not share.

    Returns:
        What `--json` printed, its peak memory among it, with `wall_seconds` of the whole process.
    """
    float_folder()
    _hide_progress_bars()
    output = cache_folder() / "benchmarks" / f"smollm2-135m-{name or algorithm or 'default'}"
    started = time.monotonic()
    result = msquant(
        *("quantize", "smollm2-135m", *(["--algo", algorithm] if algorithm else [])),
        *("--samples", SAMPLES, "--sequence-length", SEQUENCE_LENGTH, *options),
        *("--output", output, "--overwrite", "--restart"),
    )
    return result | {"wall_seconds": time.monotonic() - started}
