"""Promises of accuracy: in how many of models x servers x bounds they were kept, and how small the folder is.

One run of `msquant quantize --max-kl` each, as a process of its own. A promise is kept where the greatest KL
over the verdict texts is within the bound; one that msquant says it cannot keep (exit code 3) counts as
missed. CPU seconds stand beside those of a plain quantization for the same server.

`MSQUANT_PROMISE=tiny-qwen3/vllm/0.02,smollm2-135m/vllm/0.02` measures these alone.
"""

import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.command import msquant
from benchmarks.rows import row
from benchmarks.smollm2 import float_folder
from benchmarks.tiny_qwen import trained_qwen3, trained_qwen3_moe

MODELS: dict[str, Callable[[], Path]] = {
    "smollm2-135m": float_folder,
    "tiny-qwen3": trained_qwen3,
    "tiny-qwen3-moe": trained_qwen3_moe,
}
SERVERS: dict[str, tuple[str, ...]] = {
    "smollm2-135m": ("vllm", "vllm-ascend", "vllm-mindspore"),
    "tiny-qwen3": ("vllm", "vllm-ascend", "vllm-mindspore"),
    # vLLM-MindSpore serves no qwen3_moe.
    "tiny-qwen3-moe": ("vllm", "vllm-ascend"),
}
BOUNDS = (0.01, 0.02, 0.05)
KEPT, TIMES = 0.95, 3.0


def measure() -> list[dict[str, Any]]:
    """A line a run, and what came of all of them."""
    rows, kept, reachable = [], 0, 0
    plain: dict[tuple[str, str], float] = {}
    for model, server, bound in _wanted():
        with tempfile.TemporaryDirectory(prefix="msquant-") as scratch:
            folder = MODELS[model]()
            if (model, server) not in plain:
                plain[model, server] = _plain_seconds(folder, server, Path(scratch))
            print(f"{model} for {server} within {bound}", flush=True)
            started, cpu = time.monotonic(), _child_seconds()
            arguments = ("--max-kl", bound, "--for", server, "--output", Path(scratch) / "out")
            found = msquant("quantize", folder, *arguments, expected=(0, 3))
            cpu = _child_seconds() - cpu
            reachable += 1
            kept += bool(found["kept"])
            rows.append(row(f"{model}, {server}, KL <= {bound}", _described(found)))
            times = cpu / plain[model, server]
            seconds = f"{cpu:.0f} ({times:.1f} times plain), {time.monotonic() - started:.0f} s of wall time"
            met = times <= TIMES if model == "smollm2-135m" else None
            rows.append(row("  CPU seconds", seconds, f"<= {TIMES:g} times" if met is not None else "", met))
    part = kept / max(1, reachable)
    rows.append(row("promises kept", f"{kept} of {reachable}", f">= {KEPT:.0%}", part >= KEPT))
    return rows


def _wanted() -> list[tuple[str, str, float]]:
    if given := os.environ.get("MSQUANT_PROMISE"):
        parts = [word.split("/") for word in given.split(",")]
        return [(model, server, float(bound)) for model, server, bound in parts]
    return [(model, server, bound) for model in MODELS for server in SERVERS[model] for bound in BOUNDS]


def _described(found: dict[str, Any]) -> str:
    said = "kept" if found["kept"] else f"not kept: {found['reason']}"
    best = next((each for each in found["rounds"] if each["number"] == found["round"]), None)
    if best is None:
        return said
    linears = ", ".join(f"{count} {word}" for word, count in best["schemes"].items())
    worst = {name: max(best[name].values()) for name in ("predicted", "choice", "verdict")}
    return (
        f"{said} in {len(found['rounds'])} rounds; predicted {worst['predicted']:.4f}, choice "
        f"{worst['choice']:.4f}, verdict {worst['verdict']:.4f}; {best['nbytes'] / 1e6:.1f} MB; {linears}"
    )


def _plain_seconds(folder: Path, server: str, scratch: Path) -> float:
    """CPU seconds of a plain quantization for that server by the model's own recipe."""
    before = _child_seconds()
    msquant("quantize", folder, "--for", server, "--output", scratch / "plain")
    return _child_seconds() - before


def _child_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
