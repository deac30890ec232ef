"""`msquant quantize --calibration none` beside copying the same shards while hashing them, in one run.

Shards of experts as large as DeepSeek-R1's, in bfloat16 and in FP8 with a scale a block, become W8A8 per
token for vllm-ascend. The copy reads 8 MB at a time, hashes and writes them, and syncs each file, as one
thread; what msquant does besides is to round, and to hash what it writes as well as what it reads.
Everything lies in memory (tmpfs) where there is room, for a disk that writes 0.2 GB/s would be all that is
measured. The rounds alternate, and the best of each counts; the time of msquant is that of the work, without
the start of the process. Seconds of the processor are beside it, those of msquant with the start: on a busy
machine they alone say what a change has brought.
"""

import hashlib
import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from benchmarks.command import msquant
from benchmarks.rows import row
from msquant.checkpoint.writer import write_shard

ROUNDS = 3
SHARDS, EXPERTS = 4, 12
HIDDEN, INNER, BLOCK = 7168, 2048, 128
PIECE_BYTES = 8 << 20
MIN_RATIO, MAX_BYTES = 0.6, 2e9
# A model_type that msquant does not know: nothing but names and shapes tells what the tensors are.
CONFIG: dict[str, Any] = {
    "architectures": ["UnknownForCausalLM"],
    "model_type": "unknown_moe",
    "hidden_size": HIDDEN,
    "num_hidden_layers": SHARDS,
    "vocab_size": 1024,
    "torch_dtype": "bfloat16",
}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}


def measure() -> list[dict[str, Any]]:
    """Quantize and copy either source, several times."""
    rows = []
    for name in ("BF16", "FP8"):
        with _folder() as folder:
            size = write_model(folder / "model", fp8=name == "FP8")
            copied, quantized, peak = float("inf"), float("inf"), 0
            copying, quantizing = float("inf"), float("inf")
            for _ in range(ROUNDS):
                before = time.process_time()
                copied = min(copied, copy_and_hash(folder / "model", folder / "copy"))
                copying = min(copying, time.process_time() - before)
                before = _children_seconds()
                options = ("--calibration", "none", "--format", "ascend", "--no-evaluate", "--overwrite")
                result = msquant("quantize", folder / "model", *options, "--output", folder / "out")
                quantized, peak = min(quantized, result["seconds"]), max(peak, result["peak_memory_bytes"])
                quantizing = min(quantizing, _children_seconds() - before)
            ratio = copied / quantized
            rows += [
                row(f"{name}: copied and hashed, GB/s", round(size / copied / 1e9, 2)),
                row(f"{name} to W8A8, of the source, GB/s", round(size / quantized / 1e9, 2)),
                row(f"{name}: of the copy", round(ratio, 2), f">= {MIN_RATIO}", ratio >= MIN_RATIO),
                row(
                    f"{name}: seconds of the processor a GB, copied; quantized",
                    f"{copying * 1e9 / size:.2f}; {quantizing * 1e9 / size:.2f}",
                ),
                row(
                    f"{name}: peak memory, GB", round(peak / 1e9, 2), f"< {MAX_BYTES / 1e9}", peak < MAX_BYTES
                ),
            ]
    rows.append(row("load of the machine, 1 min", round(os.getloadavg()[0], 2)))
    return rows


def _children_seconds() -> float:
    """Of the processor, of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder in memory if there is room for a model, its copy and its result, else on disk."""
    needed = 3 * 2 * SHARDS * EXPERTS * 3 * HIDDEN * INNER
    memory = Path("/dev/shm")
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fits = memory.is_dir() and min(shutil.disk_usage(memory).free, available) > needed
    with tempfile.TemporaryDirectory(prefix="msquant-model-free-", dir=memory if fits else None) as folder:
        yield Path(folder)


def write_model(folder: Path, *, fp8: bool) -> int:
    """Write a model of random experts, a layer a shard; returns the bytes of its shards."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    weights = (generator.standard_normal((INNER, HIDDEN)) / 64).astype(np.float32)
    names: dict[str, str] = {}
    for layer in range(SHARDS):
        tensors: dict[str, NDArray[Any]] = {}
        for expert in range(EXPERTS):
            for part in ("gate_proj", "up_proj", "down_proj"):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{part}.weight"
                matrix = weights if part != "down_proj" else np.ascontiguousarray(weights.T)
                if fp8:
                    tensors[name] = (matrix * 4096).astype(ml_dtypes.float8_e4m3fn)
                    blocks = (matrix.shape[0] // BLOCK, matrix.shape[1] // BLOCK)
                    tensors[f"{name}_scale_inv"] = np.full(blocks, 2.0**-12, np.float32)
                else:
                    tensors[name] = matrix.astype(ml_dtypes.bfloat16)
        file_name = f"model-{layer + 1:05d}-of-{SHARDS:05d}.safetensors"
        write_shard(folder / file_name, tensors)
        names |= dict.fromkeys(tensors, file_name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (folder / "config.json").write_text(json.dumps(CONFIG | ({"quantization_config": FP8} if fp8 else {})))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def copy_and_hash(source: Path, target: Path) -> float:
    """Seconds that copying the shards takes while their sha256 is made."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    buffer = bytearray(PIECE_BYTES)
    started = time.monotonic()
    for path in sorted(source.glob("*.safetensors")):
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as reading, (target / path.name).open("wb", buffering=0) as writing:
            while count := reading.readinto(buffer):
                piece = memoryview(buffer)[:count]
                digest.update(piece)
                writing.write(piece)
            os.fsync(writing.fileno())
        digest.hexdigest()
    return time.monotonic() - started
