"""The CPU's model against the MindSpore cells and transformers, for every family."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.errors import CheckpointError
from msquant.formats.golden_stick.reader import GoldenStickCheckpoint
from msquant.inference.batch import BatchModel
from msquant.inference.cpu.cpu_model import CpuModel
from msquant.inference.mindspore_model import MindSporeModel
from msquant.models.config_json import read_config
from tests.fixtures import tiny_families, tiny_model
from tests.fixtures.tiny_families import write_tiny
from tests.fixtures.tiny_model import VOCABULARY_SIZE, write_tiny_llama
from tests.models.folders import with_config
from tests.models.test_network import ROPE_CASES, SHAPE_CASES, torch_logits

TOLERANCE = 1e-4
LENGTH = 32


@pytest.fixture(autouse=True)
def _no_outliers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outlier channels amplify float32 rounding: with them, torch's own logits are off by up to 1.4e-4."""
    monkeypatch.setattr(tiny_model, "OUTLIER_FACTOR", 1.0)


def tokens_of(length: int = LENGTH, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY_SIZE, length).tolist()


def float_model(folder: Path) -> CpuModel:
    return CpuModel(read_config(folder), Checkpoint.open(folder))


def decode(model: BatchModel, tokens: list[int], steps: list[int]) -> NDArray[np.float32]:
    """Logits after each piece of the given lengths, and then after each token."""
    cache, rows, past = model.new_cache(), [], 0
    for step in steps + [1] * (len(tokens) - sum(steps)):
        rows.append(model.next_logits([(cache, tokens[past : past + step])])[0])
        past += step
    return np.stack(rows)


@pytest.mark.parametrize("family", tiny_families.SETTINGS)
def test_every_family_equals_its_cells(family: str, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", family)
    cells = MindSporeModel(read_config(folder), Checkpoint.open(folder), "cpu")
    found = decode(float_model(folder), tokens_of(), [17, 9])
    np.testing.assert_allclose(found, decode(cells, tokens_of(), [17, 9]), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", [*SHAPE_CASES, *ROPE_CASES])
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path, **(SHAPE_CASES | ROPE_CASES)[case])
    expected = torch_logits(folder, np.array([tokens_of()]))[0]
    model = float_model(folder)
    whole = model.next_logits([(model.new_cache(), tokens_of())])[0]
    np.testing.assert_allclose(whole, expected[-1], rtol=0, atol=TOLERANCE)
    if case != "dynamic":
        found = decode(model, tokens_of(), [11])
        np.testing.assert_allclose(found, expected[10:], rtol=0, atol=TOLERANCE)


@pytest.mark.usefixtures("product")
def test_quantized_sequences_of_a_batch_do_not_depend_on_one_another(tiny_quantized: Path) -> None:
    config = read_config(tiny_quantized)
    model = CpuModel(config, GoldenStickCheckpoint.open(tiny_quantized))
    prompts = [tokens_of(length, seed=length) for length in (30, 1, 7)]

    def logits_of(sequences: list[list[int]]) -> NDArray[Any]:
        caches = [model.new_cache() for _ in sequences]
        first = model.next_logits(list(zip(caches, sequences, strict=True)))
        second = model.next_logits([(cache, [5]) for cache in caches])
        return np.stack([first, second], axis=1)

    together = logits_of(prompts)
    assert np.abs(together[0] - together[1]).max() > 1
    for row, prompt in enumerate(prompts):
        # The head is in floating point, and of other shape.
        np.testing.assert_allclose(together[row], logits_of([prompt])[0], rtol=0, atol=1e-4)


def test_a_cache_grows_without_losing_what_it_holds(tiny_llama: Path) -> None:
    model = float_model(tiny_llama)
    tokens = tokens_of(200)
    whole = model.next_logits([(model.new_cache(), tokens)])[0]
    one_by_one = decode(model, tokens, [])[-1]
    np.testing.assert_allclose(one_by_one, whole, rtol=0, atol=1e-3)


def test_an_untied_embedding_of_another_width_is_named(tmp_path: Path) -> None:
    untied = write_tiny_llama(tmp_path / "untied", tie_word_embeddings=False)
    folder = with_config(untied, tmp_path / "model", vocab_size=511)
    with pytest.raises(CheckpointError, match=r"\[512, 64\].* \[511, 64\]"):
        float_model(folder)
