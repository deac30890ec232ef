"""Recipes are found by name or path, and closed."""

from pathlib import Path

import pytest

from msquant.errors import RecipeError
from msquant.recipes import Recipe, find_recipe, load_recipe, shipped_recipes


def test_every_shipped_recipe_is_valid() -> None:
    recipes = {name: load_recipe(path) for name, path in shipped_recipes().items()}
    assert "smollm2-135m" in recipes
    assert all(recipe.description for recipe in recipes.values())


def test_a_name_a_file_and_a_folder(tmp_path: Path) -> None:
    assert find_recipe("smollm2-135m").model == "smollm2-135m"
    file = tmp_path / "mine.yaml"
    file.write_text("model: smollm2-135m\ncalibration: {samples: 3}\n")
    assert find_recipe(str(file)).calibration.samples == 3
    assert find_recipe(str(tmp_path)) == Recipe(model=str(tmp_path))


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(RecipeError, match="neither a recipe nor a folder") as caught:
        find_recipe("smollm-135m")
    assert "did you mean smollm2-135m?" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("model: a\nquantisation: {}\n", "unknown key quantisation (did you mean quantization?)"),
        ("model: a\ncalibration: {sample: 3}\n", "unknown key calibration.sample (did you mean samples?)"),
        ("model: a\ncalibration: {zzz: 3}\n", "unknown key calibration.zzz (known: source"),
        ("model: a\ncalibration: {samples: 0}\n", "calibration.samples: Input should be greater than"),
        ("model: a\nquantization: {algorithm: awq}\n", "quantization.algorithm: Input should be 'osl'"),
        ("model: a\nquantization: {smooth_alpha: [0.5, 1.5]}\n", "quantization.smooth_alpha.1"),
        ("model: a\nquantization: {smooth_alpha: [0.5, 0.2]}\n", "ascending"),
        ("model: a\nquantization: {weight_clip_ratio: [0]}\n", "quantization.weight_clip_ratio.0"),
        ("description: no model\n", "model: Field required"),
        ("- a\n- list\n", "holds a list"),
        ("model: [\n", "cannot be read as YAML"),
        ("!!python/object/apply:os.system ['true']\n", "cannot be read as YAML"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert complaint in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        find_recipe(str(tmp_path / "none.yaml"))


def test_options_replace_only_what_is_given() -> None:
    recipe = Recipe(model="a").replace("calibration", samples=5, seed=None)
    assert recipe.calibration.samples == 5
    assert recipe.calibration.seed == 0
    with pytest.raises(RecipeError, match=r"the options given: calibration\.samples"):
        recipe.replace("calibration", samples=-1)
