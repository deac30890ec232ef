"""What the comparison with peers measures, reads and writes down; the peers themselves are not run."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from benchmarks import peers
from benchmarks.peers import _target
from benchmarks.peers.environments import PACKAGES
from benchmarks.peers.folders import read_folder
from benchmarks.peers.jobs import (
    EIGHT_BITS,
    FOUR_BIT_SCHEMES,
    FOUR_BITS,
    INT4_EXPERTS,
    Job,
    Result,
    _float_copy,
    numbers_of,
)
from benchmarks.peers.process import Measured, run_measured
from benchmarks.peers.results import load_results, save_results
from benchmarks.peers.table import _rows, write_table

WEIGHT = torch.arange(-6, 6, dtype=torch.int8).reshape(3, 4)
SCALE = torch.tensor([0.5, 0.25, 2.0])


def test_a_process_is_measured(tmp_path: Path) -> None:
    code = "import time; x = b'1' * 80_000_000\nwhile time.process_time() < 0.2: pass"
    measured = run_measured([sys.executable, "-c", code], tmp_path / "log", {})
    assert measured.error is None
    assert 0.2 < measured.cpu_seconds < 20
    assert 80e6 < measured.peak_memory < 300e6


@pytest.mark.parametrize("message", ["no such scheme", "no such scheme:\\n  static"])
def test_the_error_of_a_process_is_its_own(tmp_path: Path, message: str) -> None:
    code = f"print('fine'); raise ValueError('{message}')"
    measured = run_measured([sys.executable, "-c", code], tmp_path / "log", {})
    assert measured.error == "ValueError: " + message.replace("\\n ", "")


def test_what_follows_an_error_is_not_its_own_and_the_folder_is_nowhere(tmp_path: Path) -> None:
    code = "import sys; print('ValueError: not', sys.argv[1]); print('x.py:1: UserWarning: old'); sys.exit(1)"
    measured = run_measured([sys.executable, "-c", code, tmp_path / "model"], tmp_path / "log", {})
    assert measured.error == "ValueError: not model"


@pytest.mark.parametrize("static", [True, False])
def test_both_formats_are_read_as_the_same_linear(tmp_path: Path, static: bool) -> None:
    linear, norm = "model.layers.0.mlp.up_proj", {"model.norm.weight": torch.ones(4)}
    ours = {f"{linear}.weight": WEIGHT, f"{linear}.weight_scale": SCALE[:, None]} | norm
    ascend = {f"{linear}.weight": WEIGHT, f"{linear}.weight_scale": SCALE[:, None]} | norm
    if static:
        ours |= {f"{linear}.input_scale": torch.tensor([0.5])}
        ours |= {f"{linear}.input_zero_point": torch.tensor([-3], dtype=torch.int8)}
        ascend |= {
            f"{linear}.input_scale": torch.tensor([0.5]),
            f"{linear}.input_offset": torch.tensor([-3.0]),
        }
        ascend |= {f"{linear}.deq_scale": SCALE * 0.5, f"{linear}.quant_bias": torch.zeros(3).int()}
    found = []
    for name, tensors, config in (("a", ours, {"quantization_config": {}}), ("b", ascend, {})):
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        if not config:
            (folder / "quant_model_description.json").write_text("{}")
        captured = read_folder(folder)
        assert list(captured.tensors) == ["model.norm.weight"]
        found.append(captured.linears[linear])
    for one in found:
        np.testing.assert_array_equal(one.weight, WEIGHT.numpy())
        np.testing.assert_allclose(one.weight_scale, SCALE.numpy(), rtol=1e-6)
        assert one.is_static == static
        if static:
            assert (one.input_scale.tolist(), one.input_offset.tolist()) == ([0.5], [-3])


def _packed(values: NDArray[np.int64]) -> torch.Tensor:
    """Eight of the last axis in each int32, the first one in the lowest bits, written out one by one."""
    words = np.zeros((values.shape[0], values.shape[1] // 8), np.int64)
    for row, column in np.ndindex(values.shape):
        words[row, column // 8] |= int(values[row, column]) << 4 * (column % 8)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32).copy())


@pytest.mark.parametrize("form", ["pack-quantized", "gptq", "gptq_v2"])
def test_packed_weights_are_read_as_what_they_stand_for(tmp_path: Path, form: str) -> None:
    rng = np.random.default_rng(0)
    values, zeros = rng.integers(0, 16, (8, 16)), rng.integers(1, 16, (8, 2))
    scales = rng.random((8, 2)).astype(np.float32)
    expected = (values.reshape(8, 2, 8) - zeros[:, :, None]) * scales[:, :, None]
    config = {"quantization_config": {"checkpoint_format": form}}
    if form == "pack-quantized":
        tensors = {
            "a.weight_packed": _packed(values),
            "a.weight_shape": torch.tensor([8, 16]),
            "a.weight_scale": torch.from_numpy(scales),
            "a.weight_zero_point": _packed(zeros.T).T.contiguous(),
        }
    else:
        tensors = {
            "a.qweight": _packed(values).T.contiguous(),
            "a.qzeros": _packed((zeros - (form == "gptq")).T),
            "a.scales": torch.from_numpy(scales.T.copy()),
            "a.g_idx": torch.arange(16, dtype=torch.int32) // 8,
        }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    captured = read_folder(tmp_path)
    assert list(captured.tensors) == ["a.weight"]
    np.testing.assert_allclose(captured.tensors["a.weight"], expected.reshape(8, 16), rtol=1e-6)


def test_int4_weights_with_int8_inputs_are_read_from_both_formats(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(-8, 8, (4, 6)).astype(np.int8)
    halves = (values[1::2] << 4) | (values[::2] & 15)
    scale = torch.rand(4, 1)
    found = []
    for name, weight, extra in (("ct", values, {}), ("ascend", halves, {"a.scale_bias": torch.zeros(4, 1)})):
        folder = tmp_path / name
        folder.mkdir()
        tensors = {"a.weight": torch.from_numpy(weight.copy()), "a.weight_scale": scale, **extra}
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"quantization_config": {}}))
        if extra:
            (folder / "quant_model_description.json").write_text("{}")
        found.append(read_folder(folder).linears["a"])
    for linear in found:
        assert str(linear.scheme) == "W4A8_DYNAMIC"
        np.testing.assert_array_equal(linear.weight, values)


def test_a_folder_of_no_known_format_is_refused(tmp_path: Path) -> None:
    save_file({"a.weight": WEIGHT}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="neither a description"):
        read_folder(tmp_path)


def test_peers_get_the_model_in_float32_with_an_index(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    save_file({"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.ones(1)}, model / "model.safetensors")
    (model / "config.json").write_text('{"torch_dtype": "bfloat16", "vocab_size": 4}')
    copy = _float_copy(model, tmp_path / "copy")
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {"a": "model.safetensors", "b": "model.safetensors"}
    assert {tensor.dtype for tensor in load_file(copy / "model.safetensors").values()} == {torch.float32}
    assert json.loads((copy / "config.json").read_text()) == {"torch_dtype": "float32", "vocab_size": 4}


def result(peer: str, kl: float | None, error: str | None = None) -> Result:
    values = {} if kl is None else {"same": kl, "bible": kl}
    measured = Measured(3.4, 2.0, 10**9, error)
    job = Job("tiny", "static", peer)
    return Result(job, measured, values, values, values, 10**6, error, "2026-11-23")


def test_the_table_shows_figures_and_errors() -> None:
    rows = list(_rows([result("msquant", 0.25), result("AutoRound", None, "a|b")]))
    assert rows[2] == "| msquant | 0.25, 0.25 | 0.25, 0.25 | 0.25, 0.25 | 3 | 2 | 1.0 | 1.0 |"
    assert rows[3] == "| AutoRound | failed: `a/b` |  |  | 3 | 2 | 1.0 |  |"


def test_a_run_of_some_models_keeps_what_was_measured_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MSQUANT_CACHE", str(tmp_path))
    (tmp_path / "benchmarks" / "peers").mkdir(parents=True)
    assert load_results() == {}
    found = [result("msquant", 0.25), result("AutoRound", None, "no")]
    save_results({("tiny", "static"): found})
    assert load_results() == {("tiny", "static"): found}


def test_a_run_of_some_settings_keeps_the_other_sections_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.peers.table.versions", lambda peer: f"{peer} 1")
    (tmp_path / "zh-CN").mkdir()
    document = tmp_path / "peers.md"
    document.write_text("# Old\n\ntext\n\n## tiny-qwen3, dynamic\n\nas it was\n\n## gone, static\n\nno\n")
    job = Job("tiny-qwen3", "static", "msquant")
    write_table([[replace(result("msquant", 0.25), job=job)]], tmp_path)
    written = document.read_text()
    assert "## tiny-qwen3, static\n\nMeasured on 2026-11-23." in written
    assert written.endswith("## tiny-qwen3, dynamic\n\nas it was\n")
    assert "Old" not in written
    assert "## tiny-qwen3，静态（static）\n\n测于 2026-11-23。" in (tmp_path / "zh-CN/peers.md").read_text()  # noqa: RUF001
    write_table([], tmp_path)
    assert document.read_text() == written


@pytest.mark.parametrize("scheme", FOUR_BIT_SCHEMES)
def test_other_peers_are_told_a_scheme_in_numbers(scheme: str) -> None:
    told = numbers_of(scheme)
    groups = {"W4A16_G64_ASYM": 64, "W4A16_G128": 128}
    assert told == {
        "weight_bits": 4,
        "group_size": groups.get(scheme),
        "symmetric": "ASYM" not in scheme,
        "input_bits": 8 if "A8" in scheme else None,
        "experts_alone": False,
    }
    assert numbers_of(INT4_EXPERTS) == numbers_of("W4A8_DYNAMIC") | {"experts_alone": True}


def test_every_peer_has_a_script_and_an_environment() -> None:
    for peer in (*EIGHT_BITS, *FOUR_BITS):
        assert peer.is_ours or (Path(peers.__path__[0]) / peer.script).is_file()
        assert peer.is_ours or peer.environment in PACKAGES


def test_msquant_has_to_be_first_on_every_text() -> None:
    ours, peer, failed = (
        result("msquant", 0.2),
        result("llm-compressor", 0.3),
        result("AutoRound", None, "no"),
    )
    assert _target(ours, [ours, peer, failed])[1] is True
    assert _target(ours, [ours, result("llm-compressor", 0.1)])[1] is False
    assert _target(peer, [ours, peer]) == ("", None)


def test_the_cpu_seconds_are_bounded_beside_llm_compressor() -> None:
    def timed(peer: str, seconds: float) -> Result:
        measured = Measured(seconds, seconds, 10**9, None)
        return Result(Job("smollm2-135m", "static", peer), measured, {"same": 0.1}, {}, {}, 1, None, "")

    theirs = timed("llm-compressor", 100.0)
    for ours, met in (("msquant smoothquant", 149.0), True), (("msquant smoothquant", 151.0), False):
        assert _target(timed(*ours), [timed(*ours), theirs]) == (
            "at most 1.5 times llm-compressor's CPU seconds",
            met,
        )
