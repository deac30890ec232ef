"""A model's name, as a person types it, to a folder that holds it."""

import os
from collections.abc import Callable
from pathlib import Path

from msquant.checkpoint.cache import cache_folder
from msquant.checkpoint.download_marker import require_complete
from msquant.checkpoint.folder_files import require_own_files
from msquant.errors import CheckpointError, ModelError
from msquant.hub.names import is_hub_id
from msquant.hub.published import HUB_IDS, published_bytes, published_name
from msquant.hub.retry import UnreachableError
from msquant.zoo.bundled import SMOLLM2_NAME, smollm2_folder

BUNDLED_MODELS = {SMOLLM2_NAME: smollm2_folder}


def resolve_model(
    name: str,
    fetch: Callable[[str], Path] | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Path:
    """Return the Hugging Face folder of a model.

    Args:
        name: a bundled model's name (`smollm2-135m`), a local folder that holds `config.json`, or a hub id
            (`deepseek-ai/DeepSeek-R1`) whose weights are in msquant's or Hugging Face's cache. A bundled name
            wins, then a folder; write `./smollm2-135m` for a folder that is called like a bundled model.
        fetch: called with a hub id whose weights are not here or not whole, to download them, for example
            `fetch_model`; without it, nothing is downloaded.
        note: called with what takes a while.

    Raises:
        ModelError: there is no such model, the folder holds none, the weights are not on this machine, or the
            bundled model is not installed.
        CheckpointError: as `require_own_files`.
        MsquantError: whatever `fetch` raises.
        OutputError: the bundled model cannot be written into the cache.
    """
    if name in BUNDLED_MODELS:
        return BUNDLED_MODELS[name](note=note)
    folder = os.path.expanduser(name)
    if name and os.path.exists(folder):
        return _checked(Path(folder))
    hub_id = HUB_IDS.get(published_name(name) or "", name)
    if not is_hub_id(hub_id):
        raise ModelError(
            "no such model: it is neither a bundled model's name, a local folder nor a hub id (org/name)",
            where=name or "model",
            remedy=f"Give the path of a Hugging Face model folder, or {' or '.join(BUNDLED_MODELS)}.",
        )
    return _cached(hub_id, fetch)


def _checked(folder: Path) -> Path:
    if not folder.is_dir():
        raise ModelError(
            "a model is a folder, and this is a file",
            where=folder,
            remedy="Give the folder that holds config.json and the .safetensors files.",
        )
    require_own_files(folder)
    if not (folder / "config.json").is_file():
        raise ModelError(
            "the folder holds no config.json, so it is not a Hugging Face model",
            where=folder,
            remedy="Give the folder that holds config.json and the .safetensors files, or "
            f"{' or '.join(BUNDLED_MODELS)}.",
        )
    return folder


def _cached(hub_id: str, fetch: Callable[[str], Path] | None) -> Path:
    own = cache_folder() / "models" / hub_id
    folder = own if own.is_dir() else _hugging_face_cache(hub_id)
    whole = folder is not None and _is_whole(folder)
    if fetch is not None and not whole:
        try:
            return fetch(hub_id)
        except UnreachableError as error:
            raise _not_here(hub_id, f" {error.what}") from error
    if folder is None:
        raise _not_here(hub_id)
    if not whole:
        raise ModelError(
            f"the download of {hub_id} is incomplete: config.json or the .safetensors files are missing",
            where=folder,
            remedy=_download(hub_id),
        )
    return folder


def _is_whole(folder: Path) -> bool:
    try:
        require_complete(folder)
    except CheckpointError:
        return False
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _hugging_face_cache(hub_id: str) -> Path | None:
    """The snapshot of `main` in the cache that HF_HOME or HF_HUB_CACHE names, as it is; without a network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _not_here(hub_id: str, reason: str = "") -> ModelError:
    size = published_bytes(hub_id)
    about = f" They are about {size / 1e9:,.0f} GB." if size else ""
    return ModelError(
        f"the weights of this model are not on this machine.{about}{reason}",
        where=hub_id,
        remedy=_download(hub_id),
    )


def _download(hub_id: str) -> str:
    name = published_name(hub_id)
    then = f"msquant quantize {name} --source FOLDER" if name else "msquant quantize FOLDER"
    first = f"msquant plan {name} says what quantizing it needs. " if name else ""
    return f"{first}Where there is a network: msquant download {hub_id} --output FOLDER, then: {then}"
