"""Perplexity against transformers on torch, in float64."""

import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msquant.checkpoint.reader import Checkpoint
from msquant.errors import CalibrationError, MsquantError
from msquant.evaluation import perplexity as module
from msquant.evaluation.perplexity import negative_log_likelihood, perplexity
from msquant.models.config import ModelConfig
from msquant.models.device import use_device
from tests.fixtures.tiny_model import write_tiny_llama


@pytest.fixture(scope="module")
def dtype() -> Any:
    return use_device("cpu")


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 512, (5, 40)).astype(np.int32)


def torch_perplexity(folder: Path, tokens: np.ndarray) -> float:
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ids = torch.tensor(tokens, dtype=torch.int64)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
    return float(loss.exp())


@pytest.mark.parametrize("tied", [True, False])
def test_equals_torch(
    tied: bool, dtype: Any, tokens: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny_llama(tmp_path / "model", tie_word_embeddings=tied)
    # Two sequences go through a layer together and the head takes 32 of 78 rows, so that both have a rest.
    monkeypatch.setattr(module, "LAYER_TOKENS", 80)
    monkeypatch.setattr(module, "HEAD_ROWS", 32)
    done: list[tuple[int, int]] = []
    found = perplexity(
        ModelConfig.from_folder(folder),
        Checkpoint.open(folder),
        tokens,
        dtype,
        lambda i, n: done.append((i, n)),
    )
    assert found == pytest.approx(torch_perplexity(folder, tokens), rel=1e-4)
    assert done == [(1, 2), (2, 2)]


def test_sequences_do_not_see_each_other(tiny_llama: Path, dtype: Any, tokens: np.ndarray) -> None:
    config, source = ModelConfig.from_folder(tiny_llama), Checkpoint.open(tiny_llama)
    together = perplexity(config, source, tokens[:3], dtype)
    logs = [math.log(perplexity(config, source, tokens[i : i + 1], dtype)) for i in range(3)]
    assert math.log(together) == pytest.approx(sum(logs) / 3, rel=1e-6)


def test_one_decoder_layer_in_memory(dtype: Any, tokens: np.ndarray, tmp_path: Path) -> None:
    """The layers' weights are read through NumPy, which tracemalloc sees: twice the layers, the same peak."""

    def peak(layers: int) -> int:
        folder = write_tiny_llama(
            tmp_path / str(layers), layers=layers, hidden_size=256, intermediate_size=1024
        )
        config, source = ModelConfig.from_folder(folder), Checkpoint.open(folder)
        tracemalloc.start()
        try:
            perplexity(config, source, tokens[:1], dtype)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1)
    layer_bytes = 4 * 3 * 256 * 1024
    assert peak(6) - peak(2) < layer_bytes


def test_negative_log_likelihood_of_extreme_logits() -> None:
    logits = np.array([[1000.0, 0.0], [-1000.0, 0.0]], np.float32)
    assert negative_log_likelihood(logits, np.array([1, 1])) == 1000.0
    assert negative_log_likelihood(logits[:1], np.array([0])) == 0.0


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (np.zeros((0, 8), np.int32), r"\[0, 8\]"),
        (np.zeros((2, 1), np.int32), r"\[2, 1\]"),
        (np.zeros(8, np.int32), r"\[8\]"),
        (np.full((1, 4), 512, np.int32), "512 is outside"),
        (np.full((1, 4), -1, np.int32), "-1 is outside"),
        (np.zeros((1, 257), np.int32), "257 tokens are longer"),
    ],
)
def test_unusable_tokens(tiny_llama: Path, dtype: Any, bad: np.ndarray, what: str) -> None:
    with pytest.raises(CalibrationError, match=what):
        perplexity(ModelConfig.from_folder(tiny_llama), Checkpoint.open(tiny_llama), bad, dtype)


@pytest.mark.parametrize("factor", [3e38, 1e6])
def test_logits_that_overflow(tiny_llama: Path, dtype: Any, tokens: np.ndarray, factor: float) -> None:
    """Infinite logits, and finite ones of which the perplexity is beyond float64."""

    class Huge(Checkpoint):
        def tensor(self, name: str) -> Any:
            values = super().tensor(name).astype(np.float64)
            with np.errstate(over="ignore"):
                return (values * (factor if name == "model.norm.weight" else 1)).astype(np.float32)

    opened = Checkpoint.open(tiny_llama)
    source = Huge(opened.folder, opened.shards, opened.weight_map)
    with pytest.raises(MsquantError, match="NaN or infinity"):
        perplexity(ModelConfig.from_folder(tiny_llama), source, tokens, dtype)
