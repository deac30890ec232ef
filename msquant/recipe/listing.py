"""The recipes that come with msquant, by family, with what is known of each."""

from dataclasses import dataclass
from typing import Literal

from msquant.families import find_family
from msquant.hub.models import BUNDLED_MODELS
from msquant.hub.published import published_kind
from msquant.recipe.recipe import Recipe, load_recipe, matching_recipes

# SmolLM2's; its `config.json` comes with its weights.
_BUNDLED_KIND = "llama"


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe that comes with msquant.

    Attributes:
        name: of the recipe.
        recipe: its content.
        family: `model_type` of its model.
        evidence: `run` for a model whose weights come with msquant, which tests quantize whole; `planned` for
            one of which the published `config.json` alone is here, whose tensors, sizes and schemes tests
            work out from that.
    """

    name: str
    recipe: Recipe
    family: str
    evidence: Literal["run", "planned"]

    @property
    def has_code(self) -> bool:
        """Whether msquant computes the layers of its family; else it is quantized without calibration."""
        return find_family(self.family) is not None


def list_shipped(pattern: str = "*") -> list[ShippedRecipe]:
    """The recipes whose name matches a shell pattern, by family and then by name.

    Raises:
        RecipeError: none does.
    """
    found = []
    for name, path in matching_recipes(pattern).items():
        recipe = load_recipe(path)
        kind = published_kind(recipe.model)
        evidence: Literal["run", "planned"] = "run" if recipe.model in BUNDLED_MODELS else "planned"
        found.append(ShippedRecipe(name, recipe, kind or _BUNDLED_KIND, evidence))
    return sorted(found, key=lambda each: (each.family, each.name))
