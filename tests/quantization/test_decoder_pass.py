"""What a decoder layer gives to the next one, and in how many rounds its experts are read."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from msquant.algorithms import make_algorithm
from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.hidden_states import HiddenStateStore
from msquant.errors import CheckpointError
from msquant.kernels import golden_stick
from msquant.models.config_json import read_config
from msquant.models.device import use_device
from msquant.quantization.decoder_pass import DecoderPass
from tests.fixtures.policies import rules
from tests.fixtures.tiny_families import write_tiny

LENGTH = 16


class Discard:
    """A sink for tests that look at something else."""

    def tensor(self, name: str, values: Any) -> None: ...

    def linear(self, module: str, linear: Any) -> None: ...


def run(
    folder: Path, scratch: Path, hidden: list[np.ndarray], budget: int, layer: int = 1, **options: int
) -> tuple[list[np.ndarray], list[str]]:
    """Outputs of a layer, by default 1, which has experts, and what was said to go on."""
    dtype = use_device()
    golden_stick.set_log_level(verbose=False)
    policy = make_algorithm(smooth_alpha=(0.5,), schemes=rules(skip=["kv_b_proj"], dynamic=["mlp."]))
    steps: list[str] = []
    outputs: list[np.ndarray] = []
    config = read_config(folder)
    store = HiddenStateStore(scratch, budget)
    source = Checkpoint.open(folder)
    decoder = DecoderPass(config, source, policy, LENGTH, dtype, store, steps.append, **options)
    decoder.run(layer, hidden, outputs.append, Discard())
    return outputs, steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "deepseek", "deepseek_v3")


def test_a_small_budget_takes_more_rounds_to_the_same_outputs(folder: Path, tmp_path: Path) -> None:
    hidden = [np.random.default_rng(i).normal(size=(2, LENGTH, 64)).astype(np.float32) for i in range(3)]
    whole, at_once = run(folder, tmp_path / "a", hidden, 1 << 30)
    parts, in_rounds = run(folder, tmp_path / "b", hidden, 4 * hidden[0].nbytes)
    assert sum(step.startswith("computing expert 1/") for step in at_once) == 1
    assert sum(step.startswith("computing expert 1/") for step in in_rounds) == 3
    for one, other in zip(whole, parts, strict=True):
        assert one.shape == other.shape == (2, LENGTH, 64)
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layer", [0, 1])
def test_samples_of_their_own_length_are_computed_as_if_alone(
    folder: Path, tmp_path: Path, layer: int
) -> None:
    rng = np.random.default_rng(0)
    hidden = [rng.normal(size=(2, length, 64)).astype(np.float32) for length in (LENGTH, 9, 5)]
    together, _ = run(folder, tmp_path / "a", hidden, 1 << 30, layer)
    assert [output.shape for output in together] == [batch.shape for batch in hidden]
    for place, batch in enumerate(hidden):
        (alone,), _ = run(folder, tmp_path / str(place), [batch], 1 << 30, layer)
        np.testing.assert_allclose(together[place], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layer", [0, 1])
def test_spare_samples_pass_through_in_floating_point(folder: Path, tmp_path: Path, layer: int) -> None:
    rng = np.random.default_rng(0)
    hidden = [rng.normal(size=(2, LENGTH, 64)).astype(np.float32) for _ in range(3)]
    searched, _ = run(folder, tmp_path / "a", hidden, 1 << 30, layer)
    spared, _ = run(folder, tmp_path / "b", hidden, 1 << 30, layer, searched=1)
    for one, other in zip(searched, spared, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)


def test_outputs_that_overflow_are_refused(folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(folder, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.shared_experts.down_proj.weight"] *= np.float32(1e38)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    hidden = [np.random.default_rng(0).normal(size=(1, LENGTH, 64)).astype(np.float32)]
    with pytest.raises(CheckpointError, match=r"model.layers.1: computes NaN or infinity"):
        run(model, tmp_path / "scratch", hidden, 1 << 30)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("algorithm", ["osl", "smoothquant", "rtn"])
@pytest.mark.parametrize("dynamic", [["mlp."], []])
def test_outputs_alone_have_the_bytes_that_quantization_gives_on_the_way(
    folder: Path, tmp_path: Path, layer: int, algorithm: str, dynamic: list[str]
) -> None:
    if layer == 1 and not dynamic:
        pytest.skip("experts have a scale per token")
    rng = np.random.default_rng(0)
    hidden = [rng.normal(size=(2, length, 64)).astype(np.float32) for length in (LENGTH, LENGTH, 9)]
    dtype = use_device()
    golden_stick.set_log_level(verbose=False)
    policy = make_algorithm(algorithm=algorithm, schemes=rules(skip=["kv_b_proj"], dynamic=dynamic))
    source, store = Checkpoint.open(folder), HiddenStateStore(tmp_path, 1 << 30)
    decoder = DecoderPass(read_config(folder), source, policy, LENGTH, dtype, store, searched=2)
    outputs: dict[str, list[bytes]] = {"run": [], "compute": []}
    decoder.run(layer, hidden, lambda output: outputs["run"].append(output.tobytes()), Discard())
    decoder.compute(layer, hidden, lambda output: outputs["compute"].append(output.tobytes()))
    assert outputs["compute"] == outputs["run"]
    assert len(outputs["run"]) == 3
