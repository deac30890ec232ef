"""What `open_source` accepts and refuses, from headers alone: no tensor is read."""

import json
import shutil
import time
from collections.abc import Callable
from math import ceil, prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from msquant.errors import CheckpointError
from msquant.families import expected_shapes, extra_shapes
from msquant.flows.source import Source, open_source
from msquant.hub.published import published_config
from tests.fixtures.fp8 import QUANTIZED, to_fp8
from tests.fixtures.tiny_families import write_tiny
from tests.test_published_configs import R1_TENSORS

Tensors = dict[str, torch.Tensor]

BLOCK = (32, 32)
PREDICTION = "model.layers.2."
LAST = "model.layers.1.mlp.experts.7.down_proj.weight"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DeepSeek-V3 in FP8, in one shard without an index; copy it, never change it."""
    folder = tmp_path_factory.mktemp("published")
    write_tiny(folder / "bfloat16", "deepseek_v3", dtype="bfloat16", prediction_layers=1)
    to_fp8(folder / "bfloat16", folder / "fp8", BLOCK)
    (folder / "fp8" / "model.safetensors.index.json").unlink()
    return folder / "fp8"


@pytest.fixture
def model(published: Path, tmp_path: Path) -> Path:
    return shutil.copytree(published, tmp_path / "model")


def change(model: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = load_file(model / "model.safetensors")
    edit(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def refusal(model: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_source(str(model))
    assert caught.value.where
    assert caught.value.remedy
    return caught.value


def test_a_whole_model_is_accepted(published: Path) -> None:
    source = open_source(str(published))
    stored = load_file(published / "model.safetensors")
    assert source.folder == published
    assert len(source.extras) == 1
    assert all(name.startswith(PREDICTION) for name in source.extras[0])
    assert source.nbytes == sum(tensor.nbytes for tensor in stored.values())
    described = source.config.shapes.keys() | source.extras[0].keys()
    assert described == {name for name in stored if not name.endswith("_scale_inv")}


def test_one_without_its_prediction_layer_has_no_extras(model: Path) -> None:
    change(model, lambda t: [t.pop(name) for name in list(t) if name.startswith(PREDICTION)])
    assert open_source(str(model)).extras == []


def test_what_follows_from_the_config_may_be_stored(model: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change(model, lambda t: t.update({name: torch.ones(8)}))
    open_source(str(model))


@pytest.mark.parametrize("module", [LAST, PREDICTION + "self_attn.o_proj.weight"])
def test_a_missing_scale_is_refused_wherever_it_is(model: Path, module: str) -> None:
    change(model, lambda t: t.pop(f"{module}_scale_inv"))
    assert f"its scales {module}_scale_inv are missing" in refusal(model).what


@pytest.mark.parametrize(
    "edit",
    [lambda s: s[:-1], lambda s: s[:, :-1], lambda s: torch.cat([s, s]), lambda s: s[0], lambda s: s.sum()],
)
def test_a_scale_of_a_wrong_shape_is_refused(model: Path, edit: Callable[[torch.Tensor], Any]) -> None:
    name = LAST + "_scale_inv"
    change(model, lambda t: t.update({name: edit(t[name]).contiguous()}))
    shape = list(load_file(model / "model.safetensors")[name].shape)
    assert f"{name} has shape {shape}" in refusal(model).what


def test_scales_of_integers_are_refused(model: Path) -> None:
    name = LAST + "_scale_inv"
    change(model, lambda t: t.update({name: t[name].int()}))
    assert f"{name} is stored as I32" in refusal(model).what


def test_a_model_that_is_int8_already_is_refused(model: Path) -> None:
    change(model, lambda t: t.update({LAST: t[LAST].float().to(torch.int8)}))
    error = refusal(model)
    assert f"{LAST} is stored as I8" in error.what
    assert "unquantized" in str(error.remedy)


def test_an_fp8_vector_is_refused(model: Path) -> None:
    name = "model.layers.1.input_layernorm.weight"
    scale = {f"{name}_scale_inv": torch.ones(2)}
    change(model, lambda t: t.update({name: t[name].to(torch.float8_e4m3fn), **scale}))
    assert f"{name} is stored as F8_E4M3 of shape [64]: only matrices" in refusal(model).what


def test_scales_of_a_matrix_that_is_not_there_are_unknown(model: Path) -> None:
    name = "model.layers.1.mlp.experts.8.down_proj.weight_scale_inv"
    change(model, lambda t: t.update({name: torch.ones(2, 2)}))
    assert refusal(model).what == f"{name} is here, which config.json does not ask for"


def test_unknown_tensors_are_counted(model: Path) -> None:
    change(model, lambda t: t.update({"z": torch.ones(1), "b": torch.ones(2), "c": torch.ones(3)}))
    assert refusal(model).what == "b and 2 other tensors are here, which config.json does not ask for"


Headers = dict[str, dict[str, Any]]


def r1_headers() -> Headers:
    """The header of each shard of the published DeepSeek-R1, one layer a shard."""
    config = published_config("deepseek-r1")
    assert config is not None
    shapes = expected_shapes(config)
    assert shapes is not None
    shapes |= extra_shapes(config)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        tensors[name] = ("BF16", shape)
        if QUANTIZED.fullmatch(name):
            tensors[name] = ("F8_E4M3", shape)
            tensors[f"{name}_scale_inv"] = ("F32", tuple(ceil(size / 128) for size in shape))
        elif name.endswith("e_score_correction_bias"):
            tensors[name] = ("F32", shape)
    headers: Headers = {}
    for name, (dtype, shape) in tensors.items():
        shard = name.split(".")[2] if name.startswith("model.layers.") else "ends"
        header = headers.setdefault(f"{shard}.safetensors", {})
        start = next(reversed(header.values()))["data_offsets"][1] if header else 0
        end = start + prod(shape) * {"BF16": 2, "F8_E4M3": 1, "F32": 4}[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return headers


def write_headers(folder: Path, headers: Headers) -> Path:
    """Shards that are holes behind their headers: they take no room."""
    folder.mkdir()
    for file_name, header in headers.items():
        text = json.dumps(header).encode()
        path = folder / file_name
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        last = max(entry["data_offsets"][1] for entry in header.values())
        with path.open("r+b") as file:
            file.truncate(8 + len(text) + last)
    weight_map = {name: shard for shard, header in headers.items() for name in header}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(published_config("deepseek-r1")))
    return folder


def test_deepseek_r1_is_checked_at_once(tmp_path: Path) -> None:
    headers = r1_headers()
    model = write_headers(tmp_path / "whole", headers)
    started = time.process_time()
    source: Source = open_source(str(model))
    # 1.1 s where this was written; a slow and busy machine is no failure.
    assert time.process_time() - started < 30
    assert len(source.checkpoint.names()) == R1_TENSORS
    assert len(source.extras) == 1

    name = "model.layers.60.mlp.experts.255.up_proj.weight_scale_inv"
    headers["60.safetensors"][name]["dtype"] = "I32"
    assert f"{name} is stored as I32" in refusal(write_headers(tmp_path / "damaged", headers)).what
