"""A model's name, as a person types it, to a folder that holds it."""

from collections.abc import Callable
from pathlib import Path

from msquant.errors import ModelError
from msquant.hub.bundled import SMOLLM2_NAME, smollm2_folder

BUNDLED_MODELS = {SMOLLM2_NAME: smollm2_folder}


def resolve_model(name: str, progress: Callable[[int, int], None] | None = None) -> Path:
    """Return the Hugging Face folder of a model.

    Args:
        name: a bundled model's name (`smollm2-135m`) or a local folder that holds `config.json`. A bundled
            name wins; write `./smollm2-135m` for a folder that is called the same.
        progress: called with the number of tensors done and their total while a bundled model is converted.

    Raises:
        ModelError: there is no such model, the folder holds none, or the bundled model is not installed.
        OutputError: the bundled model cannot be written into the cache.
    """
    if name in BUNDLED_MODELS:
        return BUNDLED_MODELS[name](progress)
    bundled = " or ".join(BUNDLED_MODELS)
    folder = Path(name).expanduser()
    if not name or not folder.exists():
        raise ModelError(
            "no such model: it is neither the name of a bundled model nor a local folder",
            where=name or "model",
            remedy=f"Give the path of a Hugging Face model folder, or {bundled}.",
        )
    if not folder.is_dir():
        raise ModelError(
            "a model is a folder, and this is a file",
            where=folder,
            remedy="Give the folder that holds config.json and the .safetensors files.",
        )
    if not (folder / "config.json").is_file():
        raise ModelError(
            "the folder holds no config.json, so it is not a Hugging Face model",
            where=folder,
            remedy=f"Give the folder that holds config.json and the .safetensors files, or {bundled}.",
        )
    return folder
