"""Which files a folder is made of: what its marker and its manifest list, and nothing else.

A folder that msquant downloaded has a marker, one that it wrote has a manifest, a result that was downloaded
has both. What neither lists may be of another commit or of another model: engines and tokenizers that look
for files by their names would read it all the same, so it is refused and not passed over.
"""

from fnmatch import fnmatchcase
from pathlib import Path

from msquant.checkpoint.download_marker import DownloadMarker, require_complete
from msquant.checkpoint.file_names import is_file_name
from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.results import MANIFEST_NAME
from msquant.errors import CheckpointError

# What msquant, transformers, vLLM or MindFormers take for a part of a model because of its name.
_READ = (
    *("*.safetensors", "*.safetensors.index.json"),
    *("config.json", "generation_config.json", MANIFEST_NAME),
    *("*quantization_description*.json", "*quant_model_description*.json"),
    *("tokenizer*.json", "*.model", "*.tiktoken", "vocab.json", "vocab.txt", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.*", "additional_chat_templates/*"),
)
_TEMPLATES = "additional_chat_templates"


def listed_files(folder: Path) -> frozenset[str] | None:
    """The paths of the files that a folder is made of; None if it says nothing of that.

    Raises:
        CheckpointError: the marker or the manifest is damaged.
    """
    marker = DownloadMarker.read(folder)
    downloaded = None if marker is None else frozenset(marker.files)
    if downloaded is None or MANIFEST_NAME in downloaded:
        written = manifest_files(folder)
        if downloaded is None or written is None:
            return written if downloaded is None else downloaded
        return downloaded & written
    return downloaded


def require_own_files(folder: Path) -> frozenset[str] | None:
    """Refuse a folder that is not what its marker or its manifest says it is made of; others pass.

    Returns:
        As `listed_files`.

    Raises:
        CheckpointError: its download is not complete; a file beside the listed ones would be read for a part
            of the model, which is named; the marker or the manifest is damaged.
    """
    require_complete(folder)
    listed = listed_files(folder)
    if listed is None:
        return None
    present = [*folder.iterdir(), *folder.glob(f"{_TEMPLATES}/*")]
    for name in sorted(path.relative_to(folder).as_posix() for path in present):
        if name not in listed and is_read(name):
            marker = DownloadMarker.read(folder)
            record = (
                MANIFEST_NAME if marker is None else f"the record of its download from {marker.repository}"
            )
            raise CheckpointError(
                f"does not belong to this model: {record} does not list it, but engines would read it",
                where=folder / name,
                remedy="move it to another folder, or remove it",
            )
    return listed


def is_read(name: str) -> bool:
    """Whether a file of a model folder is read, by us or by an engine, because of its name."""
    return any(fnmatchcase(name, pattern) for pattern in _READ)


def manifest_files(folder: Path) -> frozenset[str] | None:
    """The files that a manifest lists, and itself; None without one that lists any.

    Raises:
        CheckpointError: it cannot be read.
    """
    if not (folder / MANIFEST_NAME).is_file():
        return None
    files = read_json(folder / MANIFEST_NAME).get("files")
    if not isinstance(files, dict):
        # Nobody vouches for anything: what is broken about it is found by the rules of its format.
        return None
    return frozenset(filter(is_file_name, files)) | {MANIFEST_NAME}
