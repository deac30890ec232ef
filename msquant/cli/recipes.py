"""`msquant recipes`: what comes with msquant, to look at, to copy and to check one's own."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msquant.cli import console

if TYPE_CHECKING:
    from msquant.recipe.recipe import Recipe

recipes = typer.Typer(
    name="recipes",
    help="List, show and copy the recipes that come with msquant, and check your own.",
    epilog="Example: msquant recipes copy deepseek-r1 mine.yaml",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Name = Annotated[
    str,
    typer.Argument(
        help="A recipe's name, its model's hub id, or a pattern that matches one name.", show_default=False
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@recipes.command("list")
def list_recipes(
    pattern: Annotated[str, typer.Argument(help="Only names like this: deepseek-r1-distill-*")] = "*",
    as_json: AsJson = False,
) -> None:
    """List the recipes that come with msquant by family, and what each was tried on.

    Example: msquant recipes list 'deepseek-r1-distill-*'
    """
    from msquant.recipe.listing import list_shipped

    found = list_shipped(pattern)
    if as_json:
        console.print_json(
            [
                {
                    "name": each.name,
                    "model": each.recipe.model,
                    "description": each.recipe.description,
                    "family": each.family,
                    "modelling_code": each.has_code,
                    "evidence": each.evidence,
                }
                for each in found
            ]
        )
        return
    rows: list[list[str]] = []
    family = None
    for each in found:
        if each.family != family:
            family = each.family
            rows.append([f"{family}:", "", ""])
        rows.append([each.name, each.recipe.description, each.evidence])
    caption = (
        "run: the tests quantize it with its own weights. planned: names, sizes and schemes were worked "
    )
    caption += "out from the published config.json; no weights of it were at hand."
    columns = ["name", "description", "evidence"]
    console.print_table("Recipes", columns, rows, caption=caption, unbroken=["name"])
    console.print_next("msquant recipes show NAME")


@recipes.command("show")
def show_recipe(name: Name, as_json: AsJson = False) -> None:
    """Print a recipe as it is written; with --json, all its values, defaults included.

    Example: msquant recipes show deepseek-r1
    """
    from msquant.recipe.recipe import find_shipped_recipe, load_recipe

    path = find_shipped_recipe(name)
    recipe = load_recipe(path)
    if as_json:
        console.print_json({"name": path.stem, "recipe": _values(recipe)})
    else:
        console.print_document(path.read_text(encoding="utf-8").rstrip("\n"))


@recipes.command("copy")
def copy(
    name: Name,
    file: Annotated[Path, typer.Argument(help="The file to make, .yaml.", show_default=False)],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
) -> None:
    """Copy a recipe to a file, to change it.

    Example: msquant recipes copy deepseek-r1 mine.yaml
    """
    from msquant.recipe.recipe import copy_recipe

    copy_recipe(name, file, overwrite=overwrite)
    console.print_line(f"Wrote {file}. Next: change it, then msquant recipes validate {file}")


@recipes.command("validate")
def validate(
    file: Annotated[Path, typer.Argument(help="A recipe file, .yaml.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Check a recipe file: every key known, every value possible. Exits with 1 if not.

    Example: msquant recipes validate mine.yaml
    """
    from msquant.recipe.recipe import load_recipe

    recipe = load_recipe(file)
    if as_json:
        console.print_json({"valid": True, "recipe": _values(recipe)})
    else:
        console.print_line(f"Valid: {file}, for {recipe.model}.")


def _values(recipe: "Recipe") -> dict[str, Any]:
    return recipe.model_dump(mode="json")
