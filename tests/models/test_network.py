"""A whole model against transformers on torch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.errors import CheckpointError
from msquant.models.config_json import read_config
from msquant.models.network import CausalLM, Embedding
from msquant.zoo.bundled import smollm2_folder
from tests.fixtures import tiny_model
from tests.fixtures.tiny_families import transformers_model
from tests.fixtures.tiny_model import VOCABULARY_SIZE, write_tiny_llama
from tests.models.folders import Replaced, with_config

TOLERANCE = 1e-4
LENGTH = 48

ROPE_CASES: dict[str, dict[str, Any]] = {
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16},
    "yarn": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        "max_position_embeddings": 64,
    },
    "yarn-mscale": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "mscale": 1.0,
            "mscale_all_dim": 0.4,
        },
        "max_position_embeddings": 64,
    },
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "old-type-key": {"rope_scaling": {"type": "linear", "factor": 3.0}},
    "theta": {"rope_theta": 500000.0},
}
SHAPE_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases-untied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "wide-heads": {"head_dim": 32},
    "narrow-heads": {"head_dim": 8},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "sharded": {"max_shard_size": "100KB"},
}


@pytest.fixture(autouse=True)
def _no_outliers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outlier channels amplify float32 rounding: with them, torch's own logits are off by up to 1.4e-4."""
    monkeypatch.setattr(tiny_model, "OUTLIER_FACTOR", 1.0)


def random_tokens(batch: int = 2, length: int = LENGTH) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, VOCABULARY_SIZE, (batch, length))


def torch_model(folder: Path) -> Any:
    """The model of transformers with float64 products, so that the rounding compared is ours alone."""
    return transformers_model(folder).double()


def torch_logits(folder: Path, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    with torch.no_grad():
        return torch_model(folder)(torch.from_numpy(tokens)).logits.numpy()


def our_model(folder: Path, dtype: Any) -> CausalLM:
    return CausalLM(read_config(folder), Checkpoint.open(folder), dtype)


def decode(model: CausalLM, tokens: NDArray[np.int64], steps: list[int]) -> NDArray[np.float32]:
    """Logits of all tokens, fed in chunks of the given lengths and then one by one."""
    cache, past, parts = model.new_cache(), 0, []
    for step in steps + [1] * (tokens.shape[1] - sum(steps)):
        parts.append(model.logits(tokens[:, past : past + step], cache, past=past))
        past += step
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("case", SHAPE_CASES)
def test_logits_and_cached_decoding_equal_transformers(case: str, tmp_path: Path, dtype: Any) -> None:
    folder = write_tiny_llama(tmp_path, **SHAPE_CASES[case])
    tokens = random_tokens()
    model, expected = our_model(folder, dtype), torch_logits(folder, tokens)
    logits = model.logits(tokens)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(decode(model, tokens, [29, 11]), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", ROPE_CASES)
def test_rope_variants_equal_transformers(case: str, tmp_path: Path, dtype: Any) -> None:
    folder = write_tiny_llama(tmp_path / "variant", **ROPE_CASES[case])
    tokens = random_tokens()
    expected = torch_logits(folder, tokens)
    plain = torch_logits(write_tiny_llama(tmp_path / "plain"), tokens)
    assert np.abs(expected - plain).max() > 0.1, "this case would test nothing"
    model = our_model(folder, dtype)
    np.testing.assert_allclose(model.logits(tokens), expected, rtol=0, atol=TOLERANCE)
    if case != "dynamic":
        np.testing.assert_allclose(decode(model, tokens, [40]), expected, rtol=0, atol=TOLERANCE)


def test_dynamic_rope_keeps_the_rotation_of_cached_keys_as_transformers_does(
    tmp_path: Path, dtype: Any
) -> None:
    folder = write_tiny_llama(tmp_path, **ROPE_CASES["dynamic"])
    tokens = random_tokens(batch=1, length=32)
    reference, parts, cache = torch_model(folder), [], None
    with torch.no_grad():
        for start, stop in [(0, 24)] + [(i, i + 1) for i in range(24, 32)]:
            answer = reference(torch.from_numpy(tokens[:, start:stop]), past_key_values=cache, use_cache=True)
            cache = answer.past_key_values
            parts.append(answer.logits.numpy())
    expected = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(
        decode(our_model(folder, dtype), tokens, [24]), expected, rtol=0, atol=TOLERANCE
    )


def test_sequences_of_a_batch_do_not_mix(tiny_llama: Path, dtype: Any) -> None:
    tokens = random_tokens()
    model = our_model(tiny_llama, dtype)
    together = model.logits(tokens)
    assert np.abs(together[0] - together[1]).max() > 1
    for row in range(2):
        alone = model.logits(tokens[row : row + 1])[0]
        np.testing.assert_allclose(together[row], alone, rtol=0, atol=TOLERANCE)


class RowsAlone(Replaced):
    """Refuses to give whole tables."""

    def __init__(self, source: Checkpoint) -> None:
        super().__init__(source, {})
        self.asked: list[list[int]] = []

    def tensor(self, name: str) -> NDArray[np.float32]:
        raise AssertionError(f"{name} was read as a whole")

    def rows(self, name: str, indices: NDArray[np.integer]) -> NDArray[np.float32]:
        self.asked.append(indices.tolist())
        return super().rows(name, indices)


def test_the_embedding_reads_the_rows_of_its_tokens_once(tiny_llama: Path, dtype: Any) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    source = RowsAlone(checkpoint)
    embedding = Embedding(read_config(tiny_llama), source, dtype)
    tokens = np.array([[7, 3, 7], [500, 3, 7]])
    hidden = embedding(tokens)
    assert source.asked == [[3, 7, 500]]
    np.testing.assert_array_equal(hidden.asnumpy(), checkpoint.tensor("model.embed_tokens.weight")[tokens])


def test_an_embedding_of_another_width_is_named(tiny_llama: Path, tmp_path: Path, dtype: Any) -> None:
    folder = with_config(tiny_llama, tmp_path / "model", hidden_size=48, head_dim=16)
    embedding = Embedding(read_config(folder), Checkpoint.open(folder), dtype)
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight has shape \[512, 64\].* \[512, 48\]"):
        embedding(np.array([[1, 2]]))


def test_last_only_returns_the_last_tokens_logits(tiny_llama: Path, dtype: Any) -> None:
    tokens = random_tokens()
    model = our_model(tiny_llama, dtype)
    last = model.logits(tokens, last_only=True)
    assert last.shape == (2, 1, VOCABULARY_SIZE)
    np.testing.assert_allclose(last, model.logits(tokens)[:, -1:], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_half_precision_storage_computes_in_float32(stored: str, tmp_path: Path, dtype: Any) -> None:
    folder = write_tiny_llama(tmp_path, dtype=stored)
    assert read_config(folder).dtype == stored
    tokens = random_tokens()
    logits = our_model(folder, dtype).logits(tokens)
    np.testing.assert_allclose(logits, torch_logits(folder, tokens), rtol=0, atol=TOLERANCE)


def test_logits_with_outlier_channels_equal_transformers(tiny_llama: Path, dtype: Any) -> None:
    tokens = random_tokens()
    expected = torch_logits(tiny_llama, tokens)
    atol = 2e-5 * np.abs(expected).max()
    np.testing.assert_allclose(our_model(tiny_llama, dtype).logits(tokens), expected, rtol=0, atol=atol)


def test_smollm2_logits_equal_transformers(dtype: Any) -> None:
    folder = smollm2_folder()
    text = "The capital of France is Paris. To import a module, Python first looks for it in sys.modules."
    tokens = np.array([AutoTokenizer.from_pretrained(folder)(text).input_ids])
    logits, expected = our_model(folder, dtype).logits(tokens), torch_logits(folder, tokens)
    error = np.abs(logits - expected)
    # The logits reach 40; the worst of a million of torch's own float32 ones is off by 0.7e-4 to 1.6e-4.
    assert error.max() < 1e-5 * np.abs(expected).max()
    assert (error > TOLERANCE).mean() < 1e-4
    assert np.sqrt(np.mean(error**2)) < TOLERANCE / 5
    np.testing.assert_array_equal(logits.argmax(axis=-1), expected.argmax(axis=-1))
