"""Decoding SmolLM2-135M in W8A8 at batch 1: the embedded engine beside vLLM's INT8 kernels on the same CPU.

Both generate 64 tokens after the same 16, greedily, in turn and several times, and the median counts: so what
else the machine does hits both. The first token is left out of the rate. vLLM runs as `msquant run --engine
vllm` runs it, from the same weights in the compressed-tensors format, in both dtypes of activations.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.command import msquant
from benchmarks.rows import row
from benchmarks.smollm2 import quantized

# Decided by a wide margin: elsewhere tokens part where two are nearly level, see `generation`.
PROMPT = "1, 2, 3, 4, 5, 6"
PROMPT_TOKENS, TOKENS = 16, 64
ROUNDS = 5
LOADS = 3
TOGETHER, TOGETHER_TOKENS = 64, 16
MAX_LOAD, MAX_FIRST, MIN_SHARE = 5.0, 1.0, 1 / 3
DTYPES = ("float32", "bfloat16")


def measure() -> list[dict[str, Any]]:
    """Load and decode with both engines."""
    return rows_of(Path(quantized()["folder"]))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """All rows of one W8A8 folder."""
    return [*_load_rows(folder), *_rate_rows(folder)]


def _load_rows(folder: Path) -> list[dict[str, Any]]:
    runs = []
    for _ in range(LOADS):
        command = [sys.executable, "-m", "benchmarks.decode_process", str(folder), PROMPT]
        runs.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    load, first = min(run["load"] for run in runs), min(run["first"] for run in runs)
    return [
        row("embedded: load in a new process, s", round(load, 2), f"< {MAX_LOAD:g}", load < MAX_LOAD),
        row("embedded: of it, CPU time, s", round(min(run["load_cpu"] for run in runs), 2)),
        row("embedded: first token after that, s", round(first, 2), f"< {MAX_FIRST:g}", first < MAX_FIRST),
        row("embedded: memory of the process, MB", round(runs[0]["memory"] / 1e6)),
    ]


def _rate_rows(folder: Path) -> list[dict[str, Any]]:
    from msquant.flows.generation import load_engine
    from msquant.inference.embedded import EmbeddedEngine

    embedded = load_engine(folder, "embedded")
    assert isinstance(embedded, EmbeddedEngine)
    ids = embedded.encode(PROMPT)
    assert len(ids) == PROMPT_TOKENS, "of SmolLM2's tokenizer"
    engines: dict[str, Any] = {"embedded": embedded}
    with tempfile.TemporaryDirectory(prefix="msquant-decode-") as scratch:
        missing = _start_vllm(folder, Path(scratch) / "compressed-tensors", engines)
        rates: dict[str, list[float]] = {name: [] for name in engines}
        tokens: dict[str, tuple[int, ...]] = {}
        for _ in range(ROUNDS + 1):
            for name, engine in engines.items():
                rate, tokens[name] = _decode(engine)
                rates[name].append(rate)
        for engine in engines.values():
            if engine is not embedded:
                engine.close()
    # The first round warms up.
    medians = {name: statistics.median(rate[1:]) for name, rate in rates.items()}
    with closing(embedded):
        together = _decode_together(embedded, ids)
    rows = [row(f"{name}: tokens/s", round(median, 1)) for name, median in medians.items()]
    rows.append(row(f"embedded: tokens/s of {TOGETHER} sequences together", round(together, 1)))
    if missing:
        return [*rows, row("vllm", f"not installed: {missing}")]
    share = medians["embedded"] / max(medians[name] for name in medians if name != "embedded")
    rows.append(row("embedded to the faster vllm", round(share, 2), f"> {MIN_SHARE:.2f}", share > MIN_SHARE))
    pairs = zip(tokens["embedded"], tokens["vllm float32"], strict=True)
    equal = next((i for i, (a, b) in enumerate(pairs) if a != b), TOKENS)
    rows.append(row("tokens equal to those of vllm float32", equal, str(TOKENS), equal == TOKENS))
    return rows


def _start_vllm(folder: Path, target: Path, engines: dict[str, Any]) -> str | None:
    """Add vLLM's engines, or say why they are not there."""
    from msquant.errors import EngineError
    from msquant.inference.environments import VLLM_CPU, require_ready
    from msquant.inference.vllm_cpu import VllmEngine

    try:
        require_ready(VLLM_CPU)
    except EngineError as error:
        return f"{error.what}; {error.remedy}"
    msquant("export", folder, "--format", "compressed-tensors", "--output", target)
    for dtype in DTYPES:
        engines[f"vllm {dtype}"] = VllmEngine(target, dtype)
    return None


def _decode(engine: Any) -> tuple[float, tuple[int, ...]]:
    """Tokens a second after the first, and the tokens."""
    from msquant.inference.engine_protocol import Sampling

    times: list[float] = []
    sampling = Sampling(max_tokens=TOKENS, ignore_eos=True)
    (completion,) = engine.generate([PROMPT], sampling, lambda *_: times.append(time.perf_counter()))
    # A token may be part of a character: then text comes with the next one.
    return (len(times) - 1) / (times[-1] - times[0]), completion.token_ids


def _decode_together(engine: Any, ids: list[int]) -> float:
    from msquant.inference.engine_protocol import Sampling

    sampling = Sampling(max_tokens=TOGETHER_TOKENS, ignore_eos=True)
    sequences = [engine.tokens(ids, sampling, i) for i in range(TOGETHER)]
    for sequence in sequences:
        next(sequence)
    started = time.perf_counter()
    count = sum(1 for _ in zip(*sequences, strict=True)) * TOGETHER
    return count / (time.perf_counter() - started)
