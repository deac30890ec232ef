"""What the comparison with peers measures, reads and writes down; the peers themselves are not run."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.peers import _target
from benchmarks.peers.folders import read_folder
from benchmarks.peers.jobs import Job, Result, _float_copy
from benchmarks.peers.process import Measured, run_measured
from benchmarks.peers.results import load_results, save_results
from benchmarks.peers.table import _rows

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
