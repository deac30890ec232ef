"""Which serving settings a folder is run with: its own recipe's, another recipe's, or changed ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.results import MANIFEST_NAME
from msquant.errors import RecipeError
from msquant.inference.serving import ServingSettings
from msquant.recipes import find_recipe


def serving_settings(
    folder: Path, recipe: str | None = None, changes: Mapping[str, Any] | None = None
) -> ServingSettings:
    """The settings to serve a folder with.

    Args:
        folder: the model folder. Where it has no `msquant.json`, the defaults are those of an empty section.
        recipe: takes the section of this recipe (a name or a file) in place of the folder's.
        changes: values of the section, of the command line; those that are None stay as they are.

    Raises:
        RecipeError: there is no such recipe; the recipe's, the folder's or the changed section is not valid.
        CheckpointError: `msquant.json` cannot be read.
    """
    settings = _own_settings(folder / MANIFEST_NAME) if recipe is None else find_recipe(recipe).serving
    if not changes:
        return settings
    try:
        return settings.changed(changes)
    except ValidationError as error:
        raise _invalid(error, "the serving options given") from error


def _own_settings(manifest: Path) -> ServingSettings:
    if not manifest.is_file():
        return ServingSettings()
    recipe = read_json(manifest).get("recipe")
    section = recipe.get("serving", {}) if isinstance(recipe, dict) else {}
    try:
        return ServingSettings.model_validate(section)
    except ValidationError as error:
        raise _invalid(error, manifest) from error


def _invalid(error: ValidationError, where: str | Path) -> RecipeError:
    problems = [".".join(["serving", *map(str, e["loc"])]) + f": {e['msg']}" for e in error.errors()]
    return RecipeError("; ".join(problems), where=where)
