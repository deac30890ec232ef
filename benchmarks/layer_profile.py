"""Where the time of quantizing the last decoder layer of a model goes, and what reading the layer takes."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.profiler import Label, Profiler

READ_BYTES = 8 << 20
# What waits for the threads that read and convert.
WAITING = "waiting"
READING = "reading"
GOLDEN_STICK = "golden-stick, all else"
REST = "all else"

_FEED_FORWARD = "msquant.quantization.feed_forward_pass"


def _search(around: str, smoother: Any, name: str, layer: Any, group: Any, *_: Any) -> str:
    return f"search of {group.name}"


FUNCTIONS: dict[str, Label] = {
    "msquant.checkpoint.float_rows:FloatRows._read": WAITING,
    "msquant.checkpoint.float_rows:dequantize": "dequantizing",
    "msquant.checkpoint.float_rows:to_float": "dequantizing",
    "msquant.quantization.decoder_pass:DecoderPass._compute": "attention in floating point and in int8",
    f"{_FEED_FORWARD}:FeedForwardPass.forward": "experts in floating point",
    f"{_FEED_FORWARD}:FeedForwardPass.quantize": "experts in int8",
    "msquant.kernels.weight_rounding:quantize_weight": "quantizing experts",
    f"{_FEED_FORWARD}:column_maxima": "ranges for smoothing",
    "gc:collect": "collecting garbage",
    "msquant.algorithms.smoothers:FastOSLSmoother._search_best_ratio": _search,
    "msquant.algorithms.held_out:HeldOutSmoother._search_best_ratio": _search,
    "msquant.algorithms.smoothers:Batch.__init__": "search, what its groups share",
    "msquant.algorithms.clip:FastClipLinearCell._search_best_clip": "clip search",
    # golden-stick computes the block only to capture what goes into its linears.
    "msquant.models.layers:DecoderLayer.construct": (
        lambda around, *_: "golden-stick's captures" if around == GOLDEN_STICK else around
    ),
    "mindspore_gs.ptq.algo_modules.mindone:OSLSmoother.process": "golden-stick's smoother",
    "mindspore_gs.ptq.algo_modules.mindone:LinearClipper.process": "golden-stick's clipper",
    "mindspore_gs.ptq.algo_modules:Quantizer.process": "golden-stick's quantizer",
    "mindspore_gs.ptq:PTQ.apply": GOLDEN_STICK,
    "msquant.checkpoint.shard_stream:ShardStream._put": "writing",
    "msquant.checkpoint.shard_stream:publish": "writing",
    "msquant.checkpoint.shard_stream:file_sha256": "hashing",
    "msquant.checkpoint.hidden_states:HiddenStatesWriter.append": "hidden states",
    "msquant.checkpoint.hidden_states:HiddenStates._read": "hidden states",
}


@dataclass(frozen=True)
class LayerProfile:
    """Where the time of one layer went.

    Attributes:
        total: seconds of the layer, until it is journaled.
        parts: seconds by part, which add up to the total.
    """

    total: float
    parts: dict[str, float]


def profile_last_layer(recipe: Path, output: Path) -> LayerProfile:
    """Quantize a model in this process, with its last layer read from a cold page cache as far as that goes.

    Args:
        recipe: a recipe file of a local model of two layers or more.
        output: the folder to make.
    """
    from msquant.flows.pipeline import Progress, quantize
    from msquant.recipe.recipe import load_recipe

    settings = load_recipe(recipe).replace("evaluation", sequences=0)
    model = Path(settings.model)
    last = json.loads((model / "config.json").read_text())["num_hidden_layers"] - 1
    marks: list[float] = []
    parts: dict[str, float] = {}

    def finished(record: dict[str, Any]) -> None:
        marks.append(time.perf_counter())
        if record["index"] == last - 1:
            drop_page_cache(model)
            profiler.reset()
            marks[:] = [time.perf_counter()]
        elif record["index"] == last:
            profiler.share(WAITING)
            parts.update(profiler.seconds)

    with Profiler(FUNCTIONS) as profiler:
        profiler.replace("msquant.checkpoint.shard:Shard.reading", lambda f: _timed_reading(profiler, f))
        quantize(settings, output, progress=Progress(layer=finished))
    began, ended = marks
    total = ended - began
    parts[REST] = total - sum(parts.values())
    return LayerProfile(total, dict(sorted(parts.items(), key=lambda item: -item[1])))


def _timed_reading(profiler: Profiler, function: Callable[..., Any]) -> Callable[..., Any]:
    @contextmanager
    def reading(*args: Any) -> Iterator[Callable[..., Any]]:
        with function(*args) as read:
            yield profiler.timed(READING, read)

    return reading


def drop_page_cache(folder: Path) -> None:
    """Ask the system to forget what it holds of a folder's files; it may decline."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_plainly(folder: Path, prefix: str) -> tuple[int, float]:
    """Read the tensors under a prefix as they lie on disk.

    Returns:
        Their bytes, and the seconds it took.
    """
    from msquant.checkpoint.checkpoint_reader import Checkpoint

    checkpoint = Checkpoint.open(folder)
    buffer = memoryview(bytearray(READ_BYTES))
    total = 0
    started = time.perf_counter()
    for shard in checkpoint.shards.values():
        entries = [entry for name, entry in shard.entries.items() if name.startswith(prefix)]
        with shard.path.open("rb", buffering=0) as file:
            for entry in sorted(entries, key=lambda entry: entry.offset):
                file.seek(entry.offset)
                left = entry.nbytes
                while left:
                    left -= file.readinto(buffer[: min(left, READ_BYTES)])
                total += entry.nbytes
    return total, time.perf_counter() - started
