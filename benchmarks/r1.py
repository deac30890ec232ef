"""DeepSeek-R1 at full size: one dense and one mixture-of-experts layer, and what all 61 would take.

The layers are written in FP8 first, 12.1 GB, unless the folder named by MSQUANT_R1_FOLDER holds them already.
`msquant quantize` with the recipe of deepseek-r1 is then measured as a process of its own, and once more in
this process to see where the time of the layer with experts goes. Every part is given in seconds and in
multiples of what reading that layer's 11.5 GB twice takes here, with the page cache dropped before: its
experts are read twice, to compute the floating-point outputs and to be quantized. The layer begins with
nothing of it in the page cache; what is there for the second reading depends on the machine's memory.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.command import msquant
from benchmarks.layer_profile import drop_page_cache, profile_last_layer, read_plainly
from benchmarks.r1_layers import write_r1_layers
from benchmarks.rows import row

DENSE_LAYERS, MOE_LAYERS = 3, 58
MAX_BYTES, TOLERANCE = 6e9, 0.25
SAMPLES, SEQUENCE_LENGTH = 4, 128


def measure() -> list[dict[str, Any]]:
    """Write the layers, plan, quantize and profile; some 30 GB of disk are needed for a while."""
    work = Path(tempfile.mkdtemp(prefix="msquant-r1-"))
    try:
        given = os.environ.get("MSQUANT_R1_FOLDER")
        model = Path(given) if given else work / "model"
        if not (model / "config.json").is_file():
            write_r1_layers(model)
        return _measure(model, work)
    finally:
        shutil.rmtree(work)


def _measure(model: Path, work: Path) -> list[dict[str, Any]]:
    recipe = _recipe(work / "layers.yaml", str(model))
    published = _recipe(work / "deepseek-r1.yaml", "deepseek-ai/DeepSeek-R1")
    output = work / "out"
    plan = msquant("plan", recipe, "--output", output)
    # It does not fit this disk, perhaps, and says so with its exit code.
    whole = msquant("plan", published, "--output", output, expected=(0, 1))
    drop_page_cache(model)
    result = msquant("quantize", recipe, "--output", output)
    sizes = layer_bytes(output)
    shutil.rmtree(output)
    return [
        *_measured(result, sizes),
        *_planned(plan, whole, result, sizes),
        *_profiled(recipe, model, output),
    ]


def _recipe(path: Path, model: str) -> Path:
    """What msquant does to DeepSeek-R1, with fewer tokens."""
    from msquant.recipe.recipe import find_recipe

    recipe = {
        "model": model,
        "quantization": find_recipe("deepseek-r1").quantization.model_dump(mode="json"),
        "calibration": {"samples": SAMPLES, "sequence_length": SEQUENCE_LENGTH},
    }
    # JSON is YAML.
    path.write_text(json.dumps(recipe))
    return path


def layer_bytes(folder: Path) -> list[int]:
    """Bytes of the shards of each decoder layer, none of which shares one with another."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards: dict[int, set[str]] = {}
    for name, shard in index["weight_map"].items():
        if name.startswith("model.layers."):
            shards.setdefault(int(name.split(".")[2]), set()).add(shard)
    return [sum((folder / shard).stat().st_size for shard in shards[layer]) for layer in sorted(shards)]


def _extrapolated(dense: float, moe: float) -> float:
    return DENSE_LAYERS * dense + MOE_LAYERS * moe


def _measured(result: dict[str, Any], sizes: list[int]) -> list[dict[str, Any]]:
    peak, seconds = result["peak_memory_bytes"], result["layer_seconds"]
    return [
        row("peak memory, GB", round(peak / 1e9, 2), f"< {MAX_BYTES / 1e9:.0f}", peak < MAX_BYTES),
        row("both layers and all else, s", round(result["seconds"], 1)),
        row("dense layer, s", round(seconds[0], 1)),
        row("layer with experts, s", round(seconds[1], 1)),
        row("dense layer, GB", round(sizes[0] / 1e9, 2)),
        row("layer with experts, GB", round(sizes[1] / 1e9, 2)),
        row("61 layers, hours", round(_extrapolated(*seconds) / 3600, 2)),
        row("61 layers, GB", round(_extrapolated(*sizes) / 1e9, 1)),
    ]


def _planned(
    plan: dict[str, Any], whole: dict[str, Any], result: dict[str, Any], sizes: list[int]
) -> list[dict[str, Any]]:
    """What `msquant plan` foretold, beside what came; of the whole model, its decoder layers."""
    seconds = result["layer_seconds"]
    hours, gigabytes = _extrapolated(*seconds) / 3600, _extrapolated(*sizes) / 1e9
    layers = [part for part in whole["parts"] if part["kind"] in ("dense", "experts")]
    dense, moe = (part["seconds"] for part in plan["parts"][:2])
    whole_layers = {side: sum(part["seconds"][side] for part in layers) for side in ("low", "high")}
    return [
        _beside("plan: peak memory, GB", plan["peak_memory"] / 1e9, result["peak_memory_bytes"] / 1e9),
        _around("plan: both layers and all else, s", plan["seconds"], result["seconds"]),
        _around("plan: dense layer, s", dense, seconds[0]),
        _around("plan: layer with experts, s", moe, seconds[1]),
        _around("plan of deepseek-r1: 61 layers, s", whole_layers, 3600 * hours),
        _beside(
            "plan of deepseek-r1: 61 layers, GB", sum(p["output_bytes"] for p in layers) / 1e9, gigabytes
        ),
        row("plan of deepseek-r1: all of it, s", _range(whole["seconds"])),
        row("plan of deepseek-r1: all of it, GB", round(whole["output_bytes"] / 1e9, 1)),
    ]


def _beside(what: str, planned: float, measured: float) -> dict[str, Any]:
    near = abs(planned / measured - 1) <= TOLERANCE
    return row(what, round(planned, 2), f"within {TOLERANCE:.0%} of {measured:.2f}", near)


def _around(what: str, planned: dict[str, float], measured: float) -> dict[str, Any]:
    inside = planned["low"] <= measured <= planned["high"]
    return row(what, _range(planned), f"around {measured:.0f}", inside)


def _range(planned: dict[str, float]) -> str:
    return f"{planned['low']:.0f} to {planned['high']:.0f}"


def _profiled(recipe: Path, model: Path, output: Path) -> list[dict[str, Any]]:
    """Where the time of the last layer goes."""
    profile = profile_last_layer(recipe, output)
    config = json.loads((model / "config.json").read_text())
    prefix = f"model.layers.{config['num_hidden_layers'] - 1}."
    drop_page_cache(model)
    (size, cold), (_, again) = read_plainly(model, prefix), read_plainly(model, prefix)
    twice = 2 * cold

    def part(name: str, seconds: float) -> dict[str, Any]:
        return row(f"layer with experts: {name}, s", f"{seconds:.1f} ({seconds / twice:.2f} x)")

    return [
        row(f"plain reading of its {size / 1e9:.2f} GB, page cache dropped before, s", round(cold, 1)),
        row("and at once again, s", round(again, 1)),
        part("all, beside plain reading twice (x)", profile.total),
        *(part(name, seconds) for name, seconds in profile.parts.items()),
    ]
