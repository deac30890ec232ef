"""MindFormers' own loader takes the folder, and every parameter is what was meant.

Needs, beside msquant: pip install --no-deps mindformers==1.7.0 deprecated wrapt jieba rouge-chinese tiktoken
mindpet tensorboardX
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from msquant.checkpoint.weights import QuantizedLinear
from msquant.formats.golden_stick import GoldenStickCheckpoint
from msquant.schemes import FLOAT, W8A8, Scheme
from tests.formats.expert_folders import DEEPSEEK, schemes_of, write_experts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("mindformers") is None, reason="mindformers is not installed"
    ),
]

ROOT = Path(__file__).parents[2]
CONFIG = {**DEEPSEEK, "n_routed_experts": 4, "hidden_size": 32}
ROPE = [0, 2, 1, 3]


def run_loader(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.formats.mindformers_loader", folder, folder.with_suffix(".npz")]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "RUN_MODE": "predict"}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder.parent, env=environment, timeout=300
    )


def loaded(folder: Path) -> dict[str, np.ndarray]:
    run = run_loader(folder)
    assert run.returncode == 0, run.stderr[-3000:]
    with np.load(folder.with_suffix(".npz")) as file:
        values = dict(file)
    assert values.pop("_messages").tolist() == ["These parameters are not loaded in the network: set()"]
    return values


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mindformers") / "m"
    write_experts(path, CONFIG)
    return path


@pytest.fixture(scope="module")
def parameters(folder: Path) -> dict[str, np.ndarray]:
    return loaded(folder)


def linear(folder: Path, module: str) -> QuantizedLinear:
    found = GoldenStickCheckpoint.open(folder).linear(module)
    assert isinstance(found, QuantizedLinear)
    return found


def bfloat16(values: np.ndarray) -> np.ndarray:
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows with the last four of each head as even, then odd."""
    head = rows.reshape(heads, -1, *rows.shape[1:]).copy()
    head[:, -4:] = head[:, -4:][:, ROPE]
    return head.reshape(rows.shape)


def test_attention_is_loaded_with_rotary_rows_by_halves(
    folder: Path, parameters: dict[str, np.ndarray]
) -> None:
    source, target = "model.layers.1.self_attn", "decoder.layers.1.self_attention"
    query, first, latent = (
        linear(folder, f"{source}.{name}") for name in ("q_b_proj", "q_a_proj", "kv_a_proj_with_mqa")
    )
    weight = parameters[f"{target}.linear_q_up_proj.weight"]
    np.testing.assert_array_equal(weight, halves(query.weight, 2))
    assert (weight != query.weight).any()
    np.testing.assert_array_equal(
        parameters[f"{target}.linear_qkv_down_proj.weight"],
        np.concatenate([halves(latent.weight, 1), first.weight]),
    )
    down = f"{target}.linear_qkv_down_proj"
    assert latent.input_scale is not None
    assert latent.input_offset is not None
    np.testing.assert_allclose(
        parameters[f"{down}.deq_scale"],
        np.concatenate([halves(latent.weight_scale, 1), first.weight_scale]) * latent.input_scale,
        rtol=3e-7,
    )
    assert (parameters[f"{down}.input_scale"] == latent.input_scale).all()
    assert (parameters[f"{down}.input_offset"] == latent.input_offset).all()
    np.testing.assert_array_equal(
        parameters[f"{down}.quant_bias"],
        -int(latent.input_offset[0]) * parameters[f"{down}.weight"].sum(axis=1),
    )


def test_experts_are_loaded_with_their_scales(folder: Path, parameters: dict[str, np.ndarray]) -> None:
    source, target = "model.layers.1.mlp", "decoder.layers.1.mlp"
    names = [
        (f"{source}.experts.{index}", parameters[f"{target}.experts.weight1"][index].T, index)
        for index in range(4)
    ]
    for name, weight, index in names:
        gate, up, down = (linear(folder, f"{name}.{part}_proj") for part in ("gate", "up", "down"))
        np.testing.assert_array_equal(weight, np.concatenate([gate.weight, up.weight]))
        np.testing.assert_array_equal(parameters[f"{target}.experts.weight2"][index].T, down.weight)
        scales = np.concatenate([gate.weight_scale, up.weight_scale])
        np.testing.assert_array_equal(
            parameters[f"{target}.experts.linear_fc1.w_scale"][index], bfloat16(scales)
        )
        np.testing.assert_array_equal(
            parameters[f"{target}.experts.linear_fc2.w_scale"][index], bfloat16(down.weight_scale)
        )
    for name, loaded_as in (
        ("mlp.shared_experts.down_proj", "mlp.shared_experts.linear_fc2"),
        ("self_attn.o_proj", "self_attention.linear_proj"),
    ):
        weight = parameters[f"decoder.layers.1.{loaded_as}.weight"]
        np.testing.assert_array_equal(weight, linear(folder, f"model.layers.1.{name}").weight)


def test_the_rest_is_loaded_in_floating_point(folder: Path, parameters: dict[str, np.ndarray]) -> None:
    source = GoldenStickCheckpoint.open(folder)
    for target, name in (
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("decoder.final_layernorm.weight", "model.norm.weight"),
        ("output_layer.weight", "lm_head.weight"),
        ("decoder.layers.1.mlp.router.weight", "model.layers.1.mlp.gate.weight"),
        ("decoder.layers.1.mlp.router.expert_bias", "model.layers.1.mlp.gate.e_score_correction_bias"),
        (
            "decoder.layers.0.self_attention.kv_layernorm.weight",
            "model.layers.0.self_attn.kv_a_layernorm.weight",
        ),
    ):
        np.testing.assert_array_equal(parameters[target], source.tensor(name))


def test_projections_in_floating_point_are_reordered_too(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_b_proj"
    write_experts(tmp_path / "m", CONFIG, schemes={**schemes_of(CONFIG), name: FLOAT})
    weight = loaded(tmp_path / "m")["decoder.layers.0.self_attention.linear_q_up_proj.weight"]
    source = GoldenStickCheckpoint.open(tmp_path / "m").tensor(f"{name}.weight")
    np.testing.assert_array_equal(weight, halves(source, 2))


@pytest.mark.parametrize(
    ("part", "scheme"), [("mlp.experts", FLOAT), ("mlp.experts", W8A8), ("kv_b_proj", W8A8)]
)
def test_what_the_rules_refuse_does_not_load(
    tmp_path: Path, part: str, scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rules are no stricter than the loader."""
    monkeypatch.setattr("msquant.formats.folder_plan._check_runs", lambda *arguments: None)
    schemes = {**schemes_of(CONFIG), "model.layers.0.self_attn.kv_b_proj": FLOAT}
    chosen = {name: scheme if part in name and ".2." not in name else old for name, old in schemes.items()}
    write_experts(tmp_path / "m", CONFIG, schemes=chosen)  # type: ignore[arg-type]
    assert run_loader(tmp_path / "m").returncode != 0
