"""The serving section that a folder is run with."""

import json
from pathlib import Path
from typing import Any

import pytest

from msquant.errors import CheckpointError, RecipeError
from msquant.flows.serving_checks import serving_settings
from msquant.inference.serving_settings import ServingSettings
from msquant.recipe.recipe import find_recipe


def folder_with(path: Path, manifest: Any) -> Path:
    (path / "msquant.json").write_text(json.dumps(manifest))
    return path


def test_a_folder_has_the_section_of_its_recipe(tmp_path: Path) -> None:
    recipe = find_recipe("deepseek-r1")
    folder = folder_with(tmp_path, {"recipe": recipe.model_dump(mode="json")})
    assert serving_settings(folder) == recipe.serving
    assert serving_settings(folder, changes={"head_address": "10.0.0.1", "nodes": None}) == (
        recipe.serving.changed({"head_address": "10.0.0.1"})
    )


def test_another_recipe_s_section_takes_its_place(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"recipe": find_recipe("deepseek-r1").model_dump(mode="json")})
    other = find_recipe("deepseek-r1-dp4-tp4-ep4").serving
    assert serving_settings(folder, "deepseek-r1-dp4-tp4-ep4") == other
    file = tmp_path / "mine.yaml"
    file.write_text("model: m\nserving: {tensor_parallel_size: 2}\n")
    assert serving_settings(folder, str(file)).tensor_parallel_size == 2


@pytest.mark.parametrize("manifest", [{}, {"recipe": None}, {"recipe": {"model": "m"}}])
def test_a_folder_that_has_none_gets_the_defaults(tmp_path: Path, manifest: dict[str, Any]) -> None:
    assert serving_settings(folder_with(tmp_path, manifest)) == ServingSettings()
    assert serving_settings(tmp_path / "elsewhere") == ServingSettings()


def test_a_folder_of_others_cannot_bring_a_variable_of_its_choice(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"recipe": {"serving": {"environment": {"LD_PRELOAD": "x"}}}})
    with pytest.raises(RecipeError, match=r"msquant\.json: serving\.environment"):
        serving_settings(folder)


def test_bad_values(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"options given: serving\.nodes"):
        serving_settings(tmp_path, changes={"nodes": 0})
    with pytest.raises(RecipeError, match="neither a recipe nor a folder"):
        serving_settings(tmp_path, "deepseek-r2")
    (tmp_path / "msquant.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"msquant\.json"):
        serving_settings(tmp_path)
