"""The full-size layers: their tensors are those of transformers' model, and what is written can be read."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM

from benchmarks import r1_layers


def test_tensors_are_those_of_the_architecture() -> None:
    config = r1_layers.FULL.config(dense=1, moe=1)
    del config["quantization_config"]
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**config))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    listed = {name: (dtype, shape) for name, dtype, shape in r1_layers.tensors(1, 1)}
    assert expected == {name: shape for name, (_, shape) in listed.items() if not name.endswith("_scale_inv")}
    fp8 = {name for name, (dtype, _) in listed.items() if dtype == "F8_E4M3"}
    assert fp8 == {name for name in expected if "_proj" in name}
    for name in fp8:
        rows, columns = expected[name]
        assert listed[f"{name}_scale_inv"] == ("F32", (-(-rows // 128), -(-columns // 128)))


SMALL = r1_layers.Sizes(hidden=256, heads=2, dense=384, expert=128, experts=3, per_token=2, groups=1)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(r1_layers, "POOL_BYTES", 2_000_000)
    monkeypatch.setattr(r1_layers, "PIECE_BYTES", 100_000)
    monkeypatch.setattr(r1_layers, "MAX_SHARD_BYTES", 1_500_000)


@pytest.mark.usefixtures("small")
def test_a_small_one_is_written_and_read(tmp_path: Path) -> None:
    folder = r1_layers.write_r1_layers(tmp_path / "a", sizes=SMALL)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [path.name for path in sorted(folder.glob("*.safetensors"))]
    assert len(shards) > 2
    tensors = {}
    for shard in shards:
        stored = load_file(folder / shard)
        assert {index["weight_map"][name] for name in stored} == {shard}
        tensors |= stored
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        name: shape for name, _, shape in r1_layers.tensors(1, 1, SMALL)
    }
    name = "model.layers.1.mlp.experts.2.down_proj.weight"
    codes, scale = tensors[name].float(), tensors[f"{name}_scale_inv"]
    weight = codes * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.isfinite(weight).all()
    assert 300 < codes.abs().max() <= 448
    assert float(weight.std()) * 128**0.5 == pytest.approx(1, abs=0.4)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert len(AutoTokenizer.from_pretrained(folder)) <= r1_layers.FULL.vocabulary
    again = r1_layers.write_r1_layers(tmp_path / "b", sizes=SMALL)
    assert all((again / shard).read_bytes() == (folder / shard).read_bytes() for shard in shards)


@pytest.mark.usefixtures("small")
def test_a_full_disk_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(r1_layers, "MAX_SHARD_BYTES", np.iinfo(np.int64).max // 2)
    with pytest.raises(SystemExit, match="do not fit"):
        r1_layers.write_r1_layers(tmp_path, sizes=SMALL)
    assert not any(tmp_path.iterdir())
