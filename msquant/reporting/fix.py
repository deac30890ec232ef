"""The commands that make a folder once more, with the parts that add most noise in floating point."""

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msquant.algorithms import DEFAULT
from msquant.checkpoint.results import MANIFEST_NAME
from msquant.errors import RecipeError
from msquant.formats.registry import folder_format
from msquant.formats.summary import ModuleSummary, Summary
from msquant.recipe.recipe import Recipe, recipe_text, validate_recipe
from msquant.reporting.data import Command, Fix, RankedRow, Ranking
from msquant.reporting.manifest_data import Manifest, printable
from msquant.schemes import FLOAT, parse_scheme

_LAYERS, _PART, _MATRICES = 3, 4, 6
"""How many are spared: so many decoder layers and no more than a fourth of all, or so many matrices."""
_SUFFIX = "-spared"
_END = "RECIPE"
_UNSAFE = re.compile(r"[^\w.-]+", re.ASCII)


def fix(
    folder: Path, summary: Summary, manifest: Manifest, config: Mapping[str, Any], ranking: Ranking
) -> Fix | None:
    """The worst layers or matrices of a folder, and what makes it again without quantizing them.

    Args:
        folder: the checkpoint.
        summary: of it.
        manifest: of it.
        config: the content of its `config.json`.
        ranking: what costs most.

    Returns:
        None where the folder does not say how it was made, or who serves it does not run such a mix.
    """
    form = folder_format(folder)
    rows = _worst(ranking)
    recipe = _recipe(manifest, [pattern for row in rows for pattern in row.patterns])
    if form is None or recipe is None:
        return None
    spared = {module.name: module for module in summary.modules if _is_spared(module, recipe)}
    schemes = {
        module.name: FLOAT if module.name in spared else parse_scheme(module.scheme)
        for module in summary.modules
        if len(module.shape) == 2
    }
    if not spared or any(form.check(schemes, config)):
        return None
    text = recipe_text(recipe, defaults=False)
    name = f"{_UNSAFE.sub('-', folder.resolve().name).lstrip('-') or 'model'}{_SUFFIX}"
    lines = [
        f"cat > {name}.yaml <<'{_END}'",
        *printable(text).rstrip("\n").splitlines(),
        _END,
        f"msquant quantize {name}.yaml --output {name}",
        f"msquant report {shlex.quote(printable(str(folder)))} {name}",
    ]
    return Fix(
        spared=tuple(row.name for row in rows),
        algorithm=recipe.quantization.algorithm,
        share=math.fsum(row.share for row in rows),
        nbytes=sum(2 * math.prod(module.shape) - module.nbytes for module in spared.values()),
        command=Command("Quantize it again so, and compare both", tuple(lines)),
    )


def _recipe(manifest: Manifest, patterns: Sequence[str]) -> Recipe | None:
    """The manifest's recipe with linears of these names in floating point, by the algorithm that loses least.

    None where the manifest has no valid recipe.
    """
    try:
        recipe = validate_recipe({**manifest.recipe, "description": ""}, MANIFEST_NAME)
        rules = (*((pattern, FLOAT) for pattern in patterns), *recipe.quantization.schemes)
        return recipe.replace("quantization", algorithm=DEFAULT, schemes=rules)
    except RecipeError:
        return None


def _worst(ranking: Ranking) -> list[RankedRow]:
    """The first few layers; or so many of the first groups as have a few matrices, and may be in float."""
    layers = [row for row in ranking.rows if not row.scheme]
    rows = layers[: max(1, min(_LAYERS, len(layers) // _PART))]
    matrices = 0
    for row in ranking.rows[len(layers) :]:
        if row.float_bytes is not None and matrices + len(row.patterns) <= _MATRICES:
            rows.append(row)
            matrices += len(row.patterns)
    return rows


def _is_spared(module: ModuleSummary, recipe: Recipe) -> bool:
    return not parse_scheme(module.scheme).is_float and recipe.quantization.scheme(module.name).is_float
