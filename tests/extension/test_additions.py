"""An algorithm, a scheme, a family and a format are added through public points, and work together."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from msquant import algorithms, families
from msquant.algorithms import algorithm_names
from msquant.checkpoint.json_file import read_json
from msquant.cli.app import app
from msquant.families import model_types
from msquant.flows.generation import generate
from msquant.flows.pipeline import quantize
from msquant.formats import registry
from msquant.formats.summary import summarize
from msquant.inference.engine_protocol import Sampling
from msquant.recipe.recipe import Recipe, validate_recipe
from tests.extension.toys import DESCRIPTION, SIX_BITS, Shrink, ToyFormat, toy_family, write_toy

TOKENS = Sampling(max_tokens=8, temperature=0.0, ignore_eos=True)


@pytest.fixture(autouse=True)
def _added() -> Iterator[None]:
    """Register one of each, and take them away again for the tests of other files."""
    algorithms.register(Shrink)
    family = families.register(toy_family())
    registry.register(ToyFormat)
    yield
    del algorithms._REGISTERED["shrink"]
    del families._REGISTERED[family.model_type]
    del registry._REGISTERED[ToyFormat.name]


@pytest.fixture
def toy_folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """The tiny Llama under the names of the toy family."""
    return write_toy(tiny_llama, tmp_path / "toy")


def recipe(model: Path, **quantization: Any) -> Recipe:
    return validate_recipe(
        {
            "model": str(model),
            "format": "toy",
            "quantization": {"schemes": [{"output": "FLOAT"}, {"lm_head": "FLOAT"}, {"*": "W6A16"}]}
            | quantization,
            "calibration": {"samples": 2, "sequence_length": 32},
        },
        "test",
    )


def tensors(folder: Path) -> dict[str, Any]:
    return {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}


def test_all_of_them_quantize_a_model_together(toy_folder: Path, tmp_path: Path) -> None:
    shrunk = quantize(recipe(toy_folder, algorithm="shrink", ratio=0.25), tmp_path / "shrunk").folder
    nearest = quantize(recipe(toy_folder, algorithm="rtn"), tmp_path / "nearest").folder
    found, expected = tensors(shrunk), tensors(nearest)
    assert set(read_json(shrunk / DESCRIPTION).values()) == {"six bits"}
    assert set(summarize(shrunk).schemes()) == {"W6A16", "FLOAT"}
    scales = [name for name in expected if name.endswith(".weight_scale")]
    assert any(".attention.wq." in name for name in scales)
    for name in scales:
        weight = name.removesuffix("_scale")
        assert expected[weight].dtype == np.int8
        assert (expected[weight].min(), expected[weight].max()) in {(-32, 31), (-31, 31)}
        np.testing.assert_array_equal(found[weight], expected[weight])
        np.testing.assert_allclose(found[name], expected[name] / 4, rtol=1e-6)


def test_the_engine_runs_what_they_made(toy_folder: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """Under other names the same model makes the same tokens."""
    texts = []
    for model in (toy_folder, tiny_llama):
        folder = quantize(recipe(model, algorithm="rtn"), tmp_path / f"{model.name}-out").folder
        done = generate(folder, ["import"], TOKENS, engine="embedded")
        texts.append(done.completions[0].token_ids)
    assert texts[0] == texts[1]


def test_the_command_line_knows_them(toy_folder: Path, tmp_path: Path) -> None:
    names = (algorithm_names(), registry.format_names(), model_types())
    assert [word in known for word, known in zip(("shrink", "toy", "toy"), names, strict=True)] == [True] * 3
    folder = quantize(recipe(toy_folder, algorithm="shrink"), tmp_path / "out").folder
    run = CliRunner().invoke(app, ["inspect", str(folder), "--json"])
    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout)
    assert found["quantization"] == "toy"


def test_a_scheme_that_a_format_has_no_word_for_is_refused(toy_folder: Path, tmp_path: Path) -> None:
    from msquant.errors import RecipeError

    five = recipe(toy_folder, algorithm="rtn", schemes=[{"output": "FLOAT"}, {"*": "W5A16"}])
    with pytest.raises(RecipeError, match="W6A16 for Toy"):
        quantize(five, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert str(SIX_BITS) == "W6A16"
