"""Rotated models against the plain ones: another basis, the same function."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.models.config_json import read_config
from msquant.models.network import CausalLM
from msquant.models.rotated import RotatedWeights, untied
from msquant.models.rotation import Hadamard
from tests.fixtures import tiny_model
from tests.fixtures.fp8 import to_fp8
from tests.fixtures.tiny_families import write_tiny
from tests.models.test_families import CASES
from tests.models.test_network import random_tokens

TOLERANCE = 1e-4

EXTRA_CASES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    # Sizes of the stream, and of a head, that are no powers of two.
    "llama-uneven": ("llama", {"hidden_size": 144, "head_dim": 24}),
    "qwen2-uneven": ("qwen2", {"hidden_size": 48}),
}

# Norms behind the blocks of a layer do not let it be rotated, see test_rotated_folders.py.
ROTATED = [case for case, (model_type, _) in (CASES | EXTRA_CASES).items() if model_type != "glm4"]


@pytest.mark.parametrize("size", [1, 2, 7, 12, 64, 96, 128, 144, 576, 896, 1000, 7168])
def test_the_matrix_is_orthogonal_and_spreads_every_channel(size: int) -> None:
    matrix = Hadamard(size).rotate(np.eye(size, dtype=np.float32))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-5)
    assert np.abs(matrix).max() <= 1.0001 * (2 / size) ** 0.5
    np.testing.assert_allclose(Hadamard(size).undo(matrix), np.eye(size), atol=1e-6)


def test_a_power_of_two_is_a_hadamard_matrix_with_signs() -> None:
    matrix = 16 * Hadamard(256).rotate(np.eye(256, dtype=np.float32))
    assert np.array_equal(np.abs(matrix), np.ones((256, 256)))
    signs = np.sign(matrix[:, 0])
    assert 64 < np.count_nonzero(signs > 0) < 192


def test_columns_are_rotated_as_rows_are() -> None:
    values = np.random.default_rng(0).standard_normal((576, 5)).astype(np.float32)
    rotation = Hadamard(576)
    np.testing.assert_allclose(rotation.rotate_columns(values), rotation.rotate(values.T).T, atol=1e-6)


def rotated_model(folder: Path, dtype: Any) -> CausalLM:
    config = untied(read_config(folder))
    return CausalLM(config, RotatedWeights(config, Checkpoint.open(folder), Hadamard), dtype)


def relative_error(expected: Any, found: Any) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("case", ROTATED)
def test_the_rotated_float_model_equals_the_plain_one(case: str, tmp_path: Path, dtype: Any) -> None:
    model_type, settings = (CASES | EXTRA_CASES)[case]
    folder = write_tiny(tmp_path, model_type, **settings)
    config, tokens = read_config(folder), random_tokens()
    expected = CausalLM(config, Checkpoint.open(folder), dtype).logits(tokens)
    assert relative_error(expected, rotated_model(folder, dtype).logits(tokens)) < TOLERANCE


def test_an_fp8_source_is_rotated(tmp_path: Path, dtype: Any) -> None:
    plain = write_tiny(tmp_path / "plain", "deepseek_v3", dtype="bfloat16")
    folder = to_fp8(plain, tmp_path / "fp8", (32, 32))
    tokens = random_tokens()
    expected = CausalLM(read_config(folder), Checkpoint.open(folder), dtype).logits(tokens)
    assert relative_error(expected, rotated_model(folder, dtype).logits(tokens)) < TOLERANCE


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
def test_norms_become_ones_and_inner_norms_stay(model_type: str, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, model_type)
    config, checkpoint = read_config(folder), Checkpoint.open(folder)
    weights = RotatedWeights(config, checkpoint, Hadamard)
    inner = ("q_a_layernorm.weight", "kv_a_layernorm.weight", "e_score_correction_bias")
    for name, shape in config.shapes.items():
        values, stored = weights.tensor(name), checkpoint.tensor(name)
        assert values.shape == shape
        if name.endswith(inner):
            assert np.array_equal(values, stored), name
        elif name.endswith("norm.weight"):
            assert np.array_equal(values, np.ones(shape)), name
        elif not name.endswith("q_b_proj.weight"):
            assert not np.allclose(values, stored, atol=0.01), name


def test_outliers_are_spread_over_the_stream_and_over_each_head(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "llama")
    config, checkpoint = read_config(folder), Checkpoint.open(folder)
    weights = RotatedWeights(config, checkpoint, Hadamard)
    layer = "model.layers.0"

    def unevenness(matrix: Any, axis: int) -> float:
        norms = np.linalg.norm(matrix, axis=axis)
        return float(norms.max() / np.sqrt((norms**2).mean()))

    name = f"{layer}.mlp.gate_proj.weight"
    folded = checkpoint.tensor(name) * checkpoint.tensor(f"{layer}.post_attention_layernorm.weight")
    assert unevenness(folded, 0) > 2 * unevenness(weights.tensor(name), 0)
    name = f"{layer}.self_attn.v_proj.weight"
    assert unevenness(checkpoint.tensor(name), 1) > 1.5 * unevenness(weights.tensor(name), 1)


def test_rows_and_blocks_are_those_of_the_tensor(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "qwen2", tie_word_embeddings=True)
    config, checkpoint = untied(read_config(folder)), Checkpoint.open(folder)
    weights = RotatedWeights(config, checkpoint, Hadamard)
    assert "lm_head.weight" in weights
    assert "lm_head.weight" not in checkpoint
    for name in config.end_names:
        whole = weights.tensor(name)
        blocks = list(weights.row_blocks(name, 4 * 64 * 100))
        assert np.array_equal(np.concatenate([block for _, block in blocks]), whole)
        if whole.ndim > 1:
            assert len(blocks) > 1
        indices = np.array([5, 1, 5])
        assert np.array_equal(weights.rows(name, indices), whole[indices])


@pytest.fixture(autouse=True)
def _few_outliers(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Outlier channels amplify float32 rounding beyond the tolerance of equal models."""
    if "spread" not in request.node.name:
        monkeypatch.setattr(tiny_model, "OUTLIER_FACTOR", 1.0)
