"""SmolLM2-135M, W8A8 per token: what an int8 key-value cache adds to the KL to the float model, by context.

One folder is quantized with `--cache int8` and computed by the embedded engine with and without its cache,
token after token of windows of 2,048: every token reads what is cached of all before it, and of itself. What
is added is the difference of both KL, a mean over the tokens at those places of the windows. The texts are
those of `texts.py`; calibration has 128 tokens in a sample, and has seen nothing of the Bible's kind.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rows import row
from benchmarks.smollm2 import float_folder, quantized
from benchmarks.texts import domains
from msquant.checkpoint.weights import WeightSource, with_cache
from msquant.inference.logprobs import log_softmax

WINDOWS, LENGTH, CHUNK = 2, 2048, 256
PLACES = (0, 512, 1024, 2048)
"""Where what is added is told apart."""
LIMITS = {"same": 0.002, "bible": 0.004}
"""Of what is added at the first places, of each text that is measured."""


class WithoutCache:
    """A source whose keys and values are in floating point."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def linear(self, module: str) -> Any:
        """The layer without scales of a cache."""
        return with_cache(self._source.linear(module), None)


def measure() -> list[dict[str, Any]]:
    """Quantize, and compare the predictions of both with the float model's."""
    options = ("--scheme", "W8A8_DYNAMIC", "--cache", "int8", "--format", "ascend", "--no-evaluate")
    folder = Path(quantized("osl", options, "c8")["folder"])
    return list(rows(folder))


def rows(folder: Path) -> Iterator[Any]:
    """A line for each text and part of the context of a folder with an int8 cache; the first has a limit."""
    from msquant.checkpoint.tokenizer import load_tokenizer
    from msquant.flows.engines import open_weights
    from msquant.inference.cpu.cpu_model import CpuModel
    from msquant.models.config_json import read_config

    config, source = read_config(folder), open_weights(folder)
    models = {
        "float": CpuModel(read_config(float_folder()), open_weights(float_folder())),
        "plain": CpuModel(config, WithoutCache(source)),
        "cached": CpuModel(config, source),
    }
    for name, tokens in domains(load_tokenizer(folder), WINDOWS, LENGTH).items():
        if name not in LIMITS:
            continue
        divergence = np.mean([_divergences(models, window) for window in tokens], axis=0)
        for start, stop in pairwise(PLACES):
            plain, cached = divergence[:, start:stop].mean(axis=1)
            limit = LIMITS[name] if not start else None
            met = None if limit is None else bool(cached - plain <= limit)
            target = "" if limit is None else f"added <= {limit}"
            measured = f"KL {plain:.5f}, with the cache {cached:.5f}: {cached - plain:+.5f} added"
            yield row(f"{name}, tokens {start} to {stop}", measured, target, met)


def _divergences(models: Mapping[str, Any], tokens: Any) -> Any:
    """KL(float || model) in nats of every token's prediction, `[2, T]`."""
    found = {name: _log_probabilities(model, tokens) for name, model in models.items()}
    parts = []
    for expected in found.pop("float"):
        weights = np.exp(expected)
        parts.append([(weights * (expected - next(other))).sum(axis=1) for other in found.values()])
    return np.concatenate(parts, axis=1)


def _log_probabilities(model: Any, tokens: Any) -> Iterator[Any]:
    """Of the token after each, some at a time, float64 `[CHUNK, V]`."""
    cache = model.new_cache()
    for start in range(0, len(tokens), CHUNK):
        part = tokens[start : start + CHUNK].tolist()
        yield log_softmax(model.logits(cache, part, len(part)))
