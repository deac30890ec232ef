"""The pages for users are in step with the code."""

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

import msquant
from msquant.algorithms import algorithm_names, find_algorithm, make_algorithm
from msquant.algorithms.base import Algorithm
from msquant.recipe.recipe import CalibrationSettings, Recipe, load_recipe, shipped_recipes

DOCS = Path(msquant.__file__).parents[1] / "docs" / "recipes.md"


def documented_keys(model: type[BaseModel], defaults: dict[str, Any]) -> list[str]:
    """The rows that the page on recipes must have for a section, from the fields themselves."""
    rows = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            continue
        default = (
            "required" if field.is_required() and model is not Algorithm else f"`{_short(defaults[name])}`"
        )
        rows.append(f"| `{name}` | {default} | {field.description} |")
    return rows


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 4:
        return f"[{value[0]}, {value[1]}, ..., {value[-1]}]"
    if isinstance(value, str):
        return value or '""'
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def test_the_page_on_recipes_has_every_key_with_its_default() -> None:
    defaults = Recipe(model="x").model_dump(mode="json")
    sections: list[tuple[type[BaseModel], dict[str, Any]]] = [(Recipe, defaults)]
    for name, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            sections.append((field.annotation, defaults[name]))
    assert len(sections) == 5
    assert CalibrationSettings in dict(sections)
    rows = [row for section in sections for row in documented_keys(*section)]
    common = set(Algorithm.model_fields)
    for name in algorithm_names():
        algorithm = make_algorithm(algorithm=name)
        own = documented_keys(type(algorithm), algorithm.model_dump(mode="json"))
        rows += [row for row in own if row.split("`")[1] not in common]
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    missing = [row for row in rows if row not in lines]
    assert not missing, "put these rows into docs/recipes.md:\n" + "\n".join(missing)
    assert len([line for line in lines if re.match(r"\| `\w+` \|", line)]) == len(rows)


def test_the_page_on_recipes_lists_the_shipped_ones() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for name, path in shipped_recipes().items():
        assert f"| `{name}` | `{load_recipe(path).model}` |" in text or name == "smollm2-135m"
    assert "`smollm2-135m`" in text


def test_the_page_on_algorithms_has_each_with_what_it_says_of_itself() -> None:
    text = DOCS.with_name("algorithms.md").read_text(encoding="utf-8")
    for name in algorithm_names():
        assert f"| `{name}` | {find_algorithm(name).summary} |" in text
