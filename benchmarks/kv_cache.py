"""What an int8 key-value cache adds to the KL of W8A8 per token to the float model.

Of SmolLM2-135M by context: one folder is quantized with `--cache int8` and computed by the embedded engine
with and without its cache, token after token of eight windows of 512 and of two of 2,048: every token reads
what is cached of all before it, and of itself. What is added is the difference of both KL, a mean over the
tokens of the windows, or of those at some places. Of the trained tiny Qwen3 and DeepSeek-V3, whose latent
state is cached, on windows of 512, beside the KL without the cache. The texts are those of `texts.py`;
calibration has 128 tokens in a sample, and has seen nothing of the Bible's kind. `MSQUANT_CACHES=Qwen3`
measures one of the models.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.command import msquant
from benchmarks.rows import row
from benchmarks.smollm2 import SAMPLES, SEQUENCE_LENGTH, float_folder, quantized
from benchmarks.texts import SEQUENCE_LENGTH as TEXT_LENGTH
from benchmarks.texts import SEQUENCES, domains
from benchmarks.tiny_deepseek import trained_model
from benchmarks.tiny_qwen import trained_qwen3
from msquant.checkpoint.weights import WeightSource, with_cache
from msquant.inference.logprobs import log_softmax

CHUNK = 256
SHORT, LONG = (8, 512), (2, 2048)
"""Windows of SmolLM2 and the tokens of each."""
PLACES = (0, 512, 1024, 2048)
"""Where what is added to SmolLM2's KL on long windows is told apart."""
LIMITS = {"same": 0.002, "bible": 0.004}
"""Of what is added on short windows, of each text that is measured."""
TINY: dict[str, Callable[[], Path]] = {"Qwen3": trained_qwen3, "DeepSeek-V3": trained_model}
TINY_LIMIT = 0.1
"""Of what is added, in parts of the KL without the cache."""
OPTIONS = ("--scheme", "W8A8_DYNAMIC", "--cache", "int8", "--format", "ascend", "--no-evaluate")


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
    found: list[dict[str, Any]] = []
    for name in os.environ.get("MSQUANT_CACHES", ",".join(["SmolLM2", *TINY])).split(","):
        if name == "SmolLM2":
            found += rows(Path(quantized("osl", OPTIONS, "c8")["folder"]))
        else:
            found += tiny_rows(name, TINY[name]())
    return found


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    """A line for each text of SmolLM2's folder, with a limit, and for each part of a long context."""
    for name, divergence in divergences(float_folder(), folder, LIMITS, *SHORT):
        plain, cached = divergence.mean(axis=1)
        yield _row(f"SmolLM2, {name}, {SHORT[0]} x {SHORT[1]}", plain, cached, LIMITS[name])
    for name, divergence in divergences(float_folder(), folder, LIMITS, *LONG):
        for start, stop in pairwise(PLACES):
            plain, cached = divergence[:, start:stop].mean(axis=1)
            yield _row(f"SmolLM2, {name}, tokens {start} to {stop}", plain, cached, None)


def tiny_rows(name: str, model: Path) -> Iterator[dict[str, Any]]:
    """A line for each text of a trained tiny model."""
    with tempfile.TemporaryDirectory(prefix="msquant-kv-cache-") as parent:
        folder = Path(parent) / "out"
        samples = ("--samples", SAMPLES, "--sequence-length", SEQUENCE_LENGTH)
        msquant("quantize", model, "--algo", "osl", *samples, *OPTIONS, "--output", folder)
        for text, divergence in divergences(model, folder, None, SEQUENCES, TEXT_LENGTH):
            plain, cached = divergence.mean(axis=1)
            yield _row(f"tiny {name}, {text}", plain, cached, TINY_LIMIT * plain)


def _row(name: str, plain: float, cached: float, limit: float | None) -> dict[str, Any]:
    measured = f"KL {plain:.3g}, with the cache {cached:.3g}: {cached - plain:+.2g} added"
    target = "" if limit is None else f"added <= {limit:.2g}"
    return row(name, measured, target, None if limit is None else bool(cached - plain <= limit))


def divergences(
    reference: Path, folder: Path, texts: Mapping[str, Any] | None, windows: int, length: int
) -> Iterator[tuple[str, Any]]:
    """By text, KL(float || model) of each place without and with the cache, mean of windows, `[2, length]`.

    Args:
        reference: folder of the float model.
        folder: of the quantized one, with a cache.
        texts: the names of those that are measured; None for all.
        windows: of each text.
        length: tokens of each.
    """
    from msquant.checkpoint.tokenizer import load_tokenizer
    from msquant.flows.engines import open_weights
    from msquant.inference.cpu.cpu_model import CpuModel
    from msquant.models.config_json import read_config

    config, source = read_config(folder), open_weights(folder)
    models = {
        "float": CpuModel(read_config(reference), open_weights(reference)),
        "plain": CpuModel(config, WithoutCache(source)),
        "cached": CpuModel(config, source),
    }
    for name, tokens in domains(load_tokenizer(folder), windows, length).items():
        if texts is None or name in texts:
            yield name, np.mean([_divergences(models, window) for window in tokens], axis=0)


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
