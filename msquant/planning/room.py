"""Whether what a model will become has room, before the model is downloaded."""

import os
from pathlib import Path

from msquant.checkpoint.disk import free_bytes
from msquant.errors import ModelError, OutputError
from msquant.planning.plan import make_plan
from msquant.recipes import Recipe


def require_room(recipe: Recipe, output: Path, source: str | None, cache: Path) -> None:
    """Refuse to begin with weights that are downloaded for hours and have no room to be quantized.

    A model whose config is not published here is let through: what it takes is known only afterwards.

    Args:
        recipe: what will be done.
        output: the folder that will be made.
        source: as `make_plan` takes it.
        cache: where the weights will go.

    Raises:
        OutputError: the output's disk is too small, or the one disk for both; names all numbers.
    """
    try:
        plan = make_plan(recipe, output, source=source)
    except ModelError:
        return
    together = _device(output) == _device(cache)
    needed = plan.disk_bytes + (plan.source_bytes if together and plan.source is None else 0)
    free = free_bytes(output.absolute())
    if free is not None and free < needed:
        both = f" and {plan.source_bytes:,} for the weights" if needed > plan.disk_bytes else ""
        raise OutputError(
            f"{free:,} bytes are free on its disk, {plan.disk_bytes:,} are needed{both}",
            where=output,
            remedy="free some space, or choose other disks with --output and MSQUANT_CACHE",
        )


def _device(path: Path) -> int:
    """The number of the disk that holds a path or will."""
    return next(os.stat(each).st_dev for each in (path.absolute(), *path.absolute().parents) if each.exists())
