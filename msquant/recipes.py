"""Recipes: everything that affects a result, typed and closed, found by name in configs/ or by path."""

import difflib
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import msquant
from msquant.errors import RecipeError
from msquant.quantization.policy import QuantizationPolicy

SUFFIXES = (".yaml", ".yml")


class CalibrationSettings(BaseModel):
    """Which tokens the ranges and the search are computed on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field("builtin", description="builtin, or a local .txt, .jsonl or .parquet file.")
    text_field: str = Field("text", description="The field that holds the text, in .jsonl and .parquet.")
    samples: int = Field(16, ge=1, description="How many sequences.")
    sequence_length: int = Field(128, ge=2, description="Tokens in each.")
    seed: int = Field(0, ge=0, description="Seed of the choice of sequences.")


class Recipe(BaseModel):
    """A model and what to do with it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str = Field("", description="One line for people.")
    model: str = Field(description="A bundled model's name, or a local Hugging Face folder.")
    quantization: QuantizationPolicy = Field(default_factory=QuantizationPolicy)
    calibration: CalibrationSettings = Field(default_factory=CalibrationSettings)
    format: Literal["golden-stick"] = Field("golden-stick", description="The checkpoint contract to write.")

    def replace(self, section: str, **values: Any) -> "Recipe":
        """A copy with those values that are not None put into a section.

        Raises:
            RecipeError: a value is not valid.
        """
        raw = self.model_dump()
        raw[section].update({key: value for key, value in values.items() if value is not None})
        return validate_recipe(raw, "the options given")


def find_recipe(name: str) -> Recipe:
    """Load a recipe by its name in `configs/`, by its path, or make the default one for a model's folder.

    Raises:
        RecipeError: there is none of that name, or it is not valid.
    """
    path = Path(name).expanduser()
    if path.suffix in SUFFIXES:
        return load_recipe(path)
    known = shipped_recipes()
    if name in known:
        return load_recipe(known[name])
    if path.is_dir():
        return Recipe(model=str(path))
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise RecipeError(
        f"{name!r} is neither a recipe nor a folder",
        remedy=f"{hint}recipes: {', '.join(known)}; or give a recipe file (.yaml) or a model's folder",
    )


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        RecipeError: it cannot be read, or a key or value is not valid; names the nearest known key.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"cannot be read as YAML: {error}", where=path) from error
    return validate_recipe(raw, path)


def validate_recipe(raw: Any, where: str | Path) -> Recipe:
    """Build a recipe from plain data.

    Raises:
        RecipeError: a key or value is not valid.
    """
    if not isinstance(raw, dict):
        raise RecipeError(f"holds a {type(raw).__name__}, a mapping is expected", where=where)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        problems = [_problem(detail) for detail in error.errors()]
        raise RecipeError("; ".join(problems), where=where) from error


@cache
def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with msquant, by name."""
    package = Path(msquant.__file__).parent
    # In the wheel the folder lies in the package, in a checkout beside it.
    folder = next(f for f in (package / "configs", package.parent / "configs") if f.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _problem(detail: Any) -> str:
    place = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        known = _known_keys(detail["loc"][:-1])
        close = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
        return f"unknown key {place} ({hint})"
    return f"{place}: {detail['msg']} (it is {detail['input']!r})"


def _known_keys(section: tuple[Any, ...]) -> list[str]:
    model: type[BaseModel] = Recipe
    for part in section:
        annotation = model.model_fields[part].annotation
        assert isinstance(annotation, type)
        model = annotation
    return list(model.model_fields)
