"""What `summarize` says of folders of every kind."""

from pathlib import Path

import numpy as np
import pytest

from msquant.checkpoint.writer import write_json, write_shard
from msquant.errors import CheckpointError
from msquant.formats.summary import summarize
from tests.formats.folders import change_json, write_folder


def test_a_quantized_folder(tmp_path: Path) -> None:
    floating = "model.layers.1.mlp.down_proj"
    summary = summarize(write_folder(tmp_path / "m", float_modules=(floating,)), verify_hashes=True)
    assert summary.findings == []
    assert (summary.quantization, summary.architecture, summary.dtype) == (
        "golden-stick",
        "LlamaForCausalLM",
        "bfloat16",
    )
    modules = {module.name: module for module in summary.modules}
    q = modules["model.layers.0.self_attn.q_proj"]
    assert (q.layer, q.kind, q.scheme, q.dtype, q.shape) == (0, "self_attn.q_proj", "W8A8", "I8", (16, 16))
    assert q.nbytes == 16 * 16 + 16 * 4 + 16 * 4 + 16 * 2 + 16
    assert q.weight_scale is not None
    assert 0.9e-4 < q.weight_scale[0] < q.weight_scale[1] < 1.1e-2
    assert q.input_scale is not None
    assert q.input_scale[0] == q.input_scale[1]
    assert modules[floating].scheme == "FLOAT"
    assert modules[floating].weight_scale is None
    assert modules["model.norm"].layer is None
    linear = 16 * 16 * 2 + 8 * 16 * 2 + 24 * 16 * 3
    assert summary.quantized_parameters == 2 * linear - 24 * 16
    assert summary.parameters == 2 * (linear + 32) + 16 + 32 * 16
    assert [(layer.index, layer.alphas, layer.error) for layer in summary.layers] == [
        (0, {"qkv": 0.55}, 1e-3),
        (1, {"qkv": 1.55}, 1e-3),
    ]
    assert len(summary.kinds()["mlp.up_proj", "W8A8", "I8", (24, 16)]) == 2


def test_layers_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    layers = [
        module.layer for module in summarize(write_folder(tmp_path / "m", num_hidden_layers=11)).modules
    ]
    numbers = [layer for layer in layers if layer is not None]
    assert numbers == sorted(numbers)
    assert max(numbers) == 10


def test_a_model_in_floating_point_is_listed(tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", {"a.weight": np.ones((2, 3), np.float16), "b": np.ones(4)})
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    summary = summarize(tmp_path)
    assert (summary.quantization, summary.findings, summary.nbytes) == (None, [], 12 + 32)
    assert [module.name for module in summary.modules] == ["a", "b"]


def test_a_result_without_its_description_is_not_taken_for_floating_point(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / "quantization_description.json").unlink()
    summary = summarize(folder)
    assert summary.quantization == "golden-stick"
    assert any("found none" in finding.problem for finding in summary.findings)


def test_a_broken_folder_is_summarized_as_far_as_it_can_be_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / "model-00002-of-00003.safetensors").unlink()
    summary = summarize(folder)
    assert summary.modules == []
    assert any(finding.where == "model-00002-of-00003.safetensors" for finding in summary.findings)


@pytest.mark.parametrize("layers", [3, [3], [{}], [{"index": "x"}], [{"index": 0, "groups": [{}]}]])
def test_a_manifest_with_strange_layers_does_no_harm(tmp_path: Path, layers: object) -> None:
    folder = write_folder(tmp_path / "m")
    change_json(folder / "msquant.json", lambda manifest: manifest.update(layers=layers))
    assert summarize(folder).layers == []


def test_other_formats_and_no_format_are_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        summarize(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="missing"):
        summarize(tmp_path)
    write_shard(tmp_path / "model.safetensors", {"a.weight": np.ones((2, 3), np.float16)})
    write_json(tmp_path / "config.json", {"quantization_config": {"quant_method": "quip"}})
    with pytest.raises(CheckpointError, match="'quip'"):
        summarize(tmp_path)
