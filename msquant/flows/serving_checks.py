"""Which serving settings a folder is run with: its own recipe's, another recipe's, or changed ones."""

import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.results import MANIFEST_NAME
from msquant.errors import EngineError, RecipeError
from msquant.formats.servers import Parallelism, ServedModel, Server, ServerName
from msquant.formats.verdicts import best_refusal, served_model, servers_of
from msquant.inference.serving_settings import ServingSettings
from msquant.recipe.recipe import find_recipe


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


def require_served(
    folder: Path,
    name: ServerName,
    split: Parallelism,
    *,
    version: str | None = None,
    backends: Collection[str] = (),
) -> None:
    """Refuse a quantized folder that a server would refuse or serve wrongly, before it starts.

    Args:
        folder: the model folder; one in floating point is not looked at.
        name: of the server.
        split: how it is to be served.
        version: that is installed here; all known ones count where it is unknown.
        backends: in lower case, those that may be used; all where there is none.

    Raises:
        EngineError: names the server, its version, what stands against it, and what to do.
        CheckpointError: a file is missing or damaged.
    """
    model = served_model(folder)
    if model is None:
        return
    servers = servers_of(model, name)
    servers = [server for server in servers if not backends or server.backend.lower() in backends]
    servers = [server for server in servers if server.version == version] or servers
    if servers:
        _require(folder, model, servers, split)


def require_server(folder: Path, name: ServerName, tensor_parallel: int | None = None) -> None:
    """Refuse a quantized folder that no version of a server serves.

    Args:
        folder: the model folder; one in floating point is not looked at.
        name: of the server.
        tensor_parallel: NPUs that share each matrix; by default what the folder's serving section says.

    Raises:
        EngineError: names the server, what stands against it, and what to do.
        CheckpointError, RecipeError: a file is missing or damaged, as for `serving_settings`.
    """
    if (model := served_model(folder)) is not None:
        split = Parallelism(tensor_parallel) if tensor_parallel else parallelism(serving_settings(folder))
        _require(folder, model, servers_of(model, name), split)


def _require(folder: Path, model: ServedModel, servers: Sequence[Server], split: Parallelism) -> None:
    found = best_refusal(servers, model, split)
    if found is not None:
        server, refusal = found
        raise EngineError(
            f"{server} with tensor_parallel_size {split.tensor} cannot serve this: {refusal.where}: "
            f"{refusal.problem}",
            where=folder,
            remedy=refusal.remedy.replace("FOLDER", shlex.quote(str(folder))),
        )


def parallelism(settings: ServingSettings) -> Parallelism:
    """How a serving section splits a model."""
    return Parallelism(
        settings.tensor_parallel_size, settings.data_parallel_size, settings.expert_parallel_size
    )


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
