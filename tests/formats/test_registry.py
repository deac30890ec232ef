"""Formats by name, one that is added included, and the one that a folder is in."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.tensor_spec import TensorSpec
from msquant.checkpoint.weights import QuantizedLinear
from msquant.errors import RecipeError
from msquant.formats import registry
from msquant.formats.base import Format
from msquant.formats.compressed_tensors.section import make_section
from msquant.formats.registry import (
    find_format,
    folder_format,
    format_names,
    marked_formats,
    model_format,
    parse_formats,
    register,
)
from msquant.schemes import FLOAT, W8A8, W8A16, Scheme
from tests.formats.expert_folders import random_linear
from tests.formats.folders import write_folder

_WORDS: Mapping[Scheme, str] = {FLOAT: "plain", W8A16: "int8"}


@dataclass(frozen=True)
class ToyFormat(Format):
    """Weights alone, and a file that says so."""

    name = "toy"
    engine = "Toy"
    server = "vllm"
    marker = "toy.json"
    dtypes = ("bfloat16",)
    words = _WORDS

    def part_specs(
        self, module: str, shape: tuple[int, ...], scheme: Scheme, dtype: str
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"weight": ("I8", shape), "scale": ("F32", shape[:1])}

    def encode_parts(
        self, module: str, linear: QuantizedLinear, dtype: str, bias: NDArray[Any] | None
    ) -> dict[str, NDArray[Any]]:
        return {"weight": linear.weight, "scale": linear.weight_scale}

    def open(self, folder: Path) -> Checkpoint:
        return Checkpoint.open(folder)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> type[Format]:
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    return register(ToyFormat)


def test_a_format_that_is_not_registered_is_refused() -> None:
    assert format_names() == ("golden-stick", "compressed-tensors", "ascend")
    with pytest.raises(RecipeError, match="'toy' is not a format"):
        find_format("toy")
    with pytest.raises(RecipeError, match="use one of: golden-stick, compressed-tensors, ascend"):
        parse_formats("toy")
    with pytest.raises(ValueError, match="is expected"):
        registry._known([{}])


def test_a_registered_format_is_known_by_name_and_marker(toy: type[Format], tmp_path: Path) -> None:
    assert parse_formats("toy, ascend") == ("toy", "ascend")
    assert model_format("toy", {}) == ToyFormat()
    assert marked_formats()["toy.json"] is toy
    assert toy.serve_command("m") == "vllm serve m --quantization toy"
    (tmp_path / "toy.json").write_text("{}")
    found = folder_format(tmp_path)
    assert found == ToyFormat()
    assert found is not None
    assert found.consumer == "Toy"


@pytest.mark.parametrize("bias", [False, True])
def test_the_base_stores_a_layer_and_plans_the_same_tensors(bias: bool) -> None:
    form = ToyFormat()
    linear = random_linear("up_proj", (3, 4), W8A16, bias=bias)
    tensors = form.encode_linear("up_proj", linear, "bfloat16")
    specs = form.linear_specs("up_proj", (3, 4), W8A16, "bfloat16", bias)
    assert {spec.name: spec for spec in specs} == {n: TensorSpec.of(n, a) for n, a in tensors.items()}
    assert ("up_proj.bias" in tensors) == bias
    np.testing.assert_array_equal(tensors["up_proj.weight"], linear.weight)


def test_the_base_refuses_schemes_without_a_word_and_what_stays_float() -> None:
    found = [str(one) for one in ToyFormat().check({"a.up_proj": W8A8, "lm_head": W8A16, "b": FLOAT}, {})]
    assert found == [
        "a.up_proj: is W8A8: in this format msquant writes FLOAT, W8A16 for Toy",
        "lm_head: is W8A16: Toy takes the output head in floating point only",
    ]


def test_the_base_checks_what_all_formats_have_in_common(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    assert ToyFormat().validate(folder) == []
    assert ToyFormat().notes({}) == []
    (folder / "config.json").unlink()
    assert any(one.where == "config.json" for one in ToyFormat().validate(folder))


def test_the_files_of_a_folder_without_a_manifest_tell_its_format(tmp_path: Path) -> None:
    assert folder_format(tmp_path) is None
    description = tmp_path / "quant_model_description.json"
    description.write_text("{}")
    form = folder_format(tmp_path)
    assert form is not None
    assert form.name == "golden-stick"
    description.write_text('{"version": "1.0.0"}')
    form = folder_format(tmp_path)
    assert form is not None
    assert form.name == "ascend"
    # vLLM reads its section before any file beside it.
    section = make_section({"model.layers.0.mlp.up_proj": W8A8}, [])
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": section}))
    form = folder_format(tmp_path)
    assert form is not None
    assert form.name == "compressed-tensors"
