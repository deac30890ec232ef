"""The weights of a hub's model, into msquant's own cache when they are asked for and not here."""

from pathlib import Path

from rich.filesize import decimal

from msquant.checkpoint.cache import cache_folder
from msquant.errors import HubError, OutputError
from msquant.hub.choose import find_snapshot
from msquant.hub.folder_download import download
from msquant.hub.listing import RemoteFile
from msquant.hub.transfer_events import HubProgress

_SUFFIXES = (".safetensors", ".json", ".model", ".txt", ".jinja", ".tiktoken")


def fetch_model(hub_id: str, progress: HubProgress | None = None) -> Path:
    """Download what quantizing a model takes into the cache, or what is missing of it; returns the folder.

    Only files of the repository's root that msquant reads: weights in safetensors, configs and tokenizer. The
    same weights in other formats, and code, stay where they are.

    Args:
        hub_id: `organisation/name`.
        progress: callbacks; `stage` is told the size before the first byte.

    Raises:
        HubError: it is on no hub, not allowed, not reachable, without safetensors, or stays wrong.
        OutputError: the disk of the cache is too small or cannot be written.
    """
    progress = progress or HubProgress()
    progress.stage(f"{hub_id} is not on this machine; asking for it")
    snapshot = find_snapshot(hub_id, note=progress.stage)
    files = [file for file in snapshot.files if _is_read(file)]
    if not any(file.path.endswith(".safetensors") for file in files):
        raise HubError(
            "holds no weights in safetensors",
            where=hub_id,
            remedy="choose a repository that does, or convert them and name their folder with --source",
        )
    folder = cache_folder() / "models" / hub_id
    total = decimal(sum(file.size for file in files), precision=1)
    progress.stage(
        f"downloading {total} in {len(files)} files, commit {snapshot.commit[:10]}, "
        f"from {snapshot.hub.title} into {folder}"
    )
    try:
        return download(snapshot, files, folder, progress=progress).folder
    except OutputError as error:
        raise OutputError(
            error.what,
            where=error.where,
            remedy="free some space, name a folder on another disk in MSQUANT_CACHE, or download with "
            f"msquant download {hub_id} --output FOLDER and name that with --source",
        ) from error


def _is_read(file: RemoteFile) -> bool:
    # Mistral publishes all weights a second time as consolidated.safetensors.
    other_layout = file.path.startswith("consolidated")
    return "/" not in file.path and file.path.endswith(_SUFFIXES) and not other_layout
