"""Tiny trained mixtures: experts with too few calibration tokens, before and after they are fed.

Of all routed experts of all layers, how many got fewer than 32 tokens by the router, and how many when those
below were given the tokens that came nearest to them, with the same tokens; and what that does to the KL
over the builtin evaluation texts. With `--max-samples` sampling goes on beside it.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.rows import row
from benchmarks.tiny_deepseek import trained_model
from benchmarks.tiny_qwen import trained_qwen3_moe

SAMPLES, LENGTH, BAR, SEEDS = 4, 48, 32, (0, 1, 2)


def measure() -> list[dict[str, Any]]:
    """Both models, three choices of calibration text each."""
    rows = []
    for name, folder in {"Qwen3-MoE": trained_qwen3_moe(), "DeepSeek-V3": trained_model()}.items():
        rows += _measure(name, folder)
    return rows


def _measure(name: str, folder: Path) -> list[dict[str, Any]]:
    from msquant.flows.comparison import compare

    with tempfile.TemporaryDirectory(prefix="msquant-") as scratch:
        ways: dict[str, list[Path]] = {"fed": [], "by the router": [], "8 by the router": []}
        for seed in SEEDS:
            place = Path(scratch) / str(seed)
            ways["fed"].append(_quantize(folder, place / "fed", seed))
            with _unfed():
                ways["by the router"].append(_quantize(folder, place / "plain", seed))
                ways["8 by the router"].append(_quantize(folder, place / "eight", seed, bar=8))
        more = _quantize(folder, Path(scratch) / "more", SEEDS[0], max_samples=4 * SAMPLES)
        models = [str(path) for paths in ways.values() for path in paths]
        result = compare(models, baseline=str(folder), sequences=2, sequence_length=256)
        scores = {str(model.folder): model.score for model in result.models}
        counts = [_below(path) for path in ways["fed"]]
        rows = []
        for way, paths in ways.items():
            kl = [scores[str(path)].overall.kl or 0.0 for path in paths]
            rows.append(row(f"{name}, {way}: KL", ", ".join(f"{value:.5f}" for value in kl)))
        before, after, experts = (sum(part) for part in zip(*counts, strict=True))
        text = f"{before} of {experts} before, {after} after"
        target = "at most a quarter"
        rows.append(row(f"{name}: experts below {BAR} tokens", text, target, after <= before / 4))
        first, spare = _below(ways["fed"][0])[0], _below(more)[0]
        rows.append(row(f"{name}: by the router, with 4 times the samples passing", f"{first} to {spare}"))
        return rows


def _quantize(folder: Path, output: Path, seed: int, bar: int = BAR, max_samples: int | None = None) -> Path:
    from msquant.flows.pipeline import quantize
    from msquant.recipe.recipe import default_recipe

    recipe = default_recipe(str(folder), json.loads((folder / "config.json").read_text()))
    recipe = recipe.replace("quantization", min_expert_tokens=bar, feed_forward_alpha=0.5)
    recipe = recipe.replace("evaluation", sequences=0)
    recipe = recipe.replace(
        "calibration", samples=SAMPLES, sequence_length=LENGTH, seed=seed, max_samples=max_samples
    )
    output.parent.mkdir(exist_ok=True)
    return quantize(recipe, output, remember=False).folder


@contextmanager
def _unfed() -> Iterator[None]:
    from msquant.quantization.feed_forward_pass import FeedForwardPass

    feed = FeedForwardPass.feed
    FeedForwardPass.feed = lambda *_: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        FeedForwardPass.feed = feed  # type: ignore[method-assign]


def _below(folder: Path) -> tuple[int, int, int]:
    """Experts below the bar by the router, those below it in the end, and all."""
    layers = json.loads((folder / "msquant.json").read_text())["layers"]
    experts = [layer["experts"] for layer in layers if "experts" in layer]
    before = sum(tokens < BAR for each in experts for tokens in each["tokens"])
    return before, sum(len(each["few_tokens"]) for each in experts), sum(len(e["tokens"]) for e in experts)
