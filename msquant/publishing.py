"""The flow of `msquant upload`: a folder that keeps its contract, a model card, and a hub."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from msquant.checkpoint.file_names import STATE_FOLDER
from msquant.checkpoint.folder_files import listed_files
from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.results import MANIFEST_NAME
from msquant.errors import CheckpointError, ModelError
from msquant.formats.summary import summarize
from msquant.hub.choose import make_hub
from msquant.hub.names import is_hub_id
from msquant.hub.progress import HubProgress
from msquant.hub.upload import UploadResult, upload
from msquant.model_card import model_card

HUBS = ("modelers", "huggingface")
CARD_NAME = "README.md"

# What people add to a folder for other people; no engine reads it.
_DOCUMENTS = (CARD_NAME, "LICENSE*", "NOTICE*", ".gitattributes")


@dataclass(frozen=True)
class Publication:
    """What would be uploaded.

    Attributes:
        files: contents by their names; the card is there as bytes where the folder has none.
        digests: the sha256 of files as the folder's manifest gives them.
        left_out: files that are in the folder and are no part of it, as its manifest or the record of its
            download does not list them.
    """

    files: Mapping[str, Path | bytes]
    digests: Mapping[str, str]
    left_out: Sequence[str]


def prepare(folder: Path, repository: str, license_name: str) -> Publication:
    """Look a folder over and collect what belongs into a repository.

    Args:
        folder: a checkpoint.
        repository: `organisation/name`.
        license_name: for the card, which is written where the folder has no README.md.

    Raises:
        ModelError: that is not the name of a repository.
        CheckpointError: `msquant inspect` would not accept the folder, or it holds links.
    """
    if not is_hub_id(repository):
        raise ModelError(
            f"{repository!r} is not the name of a repository",
            remedy="write it as organisation/name, for example MindSpore-Lab/DeepSeek-R1-W8A8",
        )
    findings = summarize(folder).findings
    if findings:
        raise CheckpointError(
            f"breaks its format: {findings[0].where}: {findings[0].problem}",
            where=folder,
            remedy=f"see all of it with: msquant inspect {folder}",
        )
    files: dict[str, Path | bytes] = {}
    left_out: list[str] = []
    listed = listed_files(folder)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.split("/")[0] in (STATE_FOLDER, ".git", ".cache"):
            continue
        if path.is_symlink():
            raise CheckpointError("is a link", where=path, remedy="put the file itself there")
        if not path.is_file():
            continue
        if listed is None or name in listed or any(fnmatchcase(name, pattern) for pattern in _DOCUMENTS):
            files[name] = path
        else:
            left_out.append(name)
    digests: dict[str, str] = {}
    if MANIFEST_NAME in files:
        manifest = read_json(folder / MANIFEST_NAME)
        digests = {name: entry["sha256"] for name, entry in manifest.get("files", {}).items()}
        if CARD_NAME not in files:
            files[CARD_NAME] = model_card(manifest, repository, license_name).encode()
    return Publication(files, digests, left_out)


def publish(
    folder: Path,
    repository: str,
    hub: str,
    *,
    create: bool = False,
    private: bool = False,
    license_name: str = "other",
    token_file: Path | None = None,
    progress: HubProgress | None = None,
) -> UploadResult:
    """Upload a folder that `msquant inspect` accepts.

    Args:
        folder: a checkpoint.
        repository: `organisation/name`.
        hub: `modelers` or `huggingface`.
        create: make the repository if it is not there.
        private: make it private then.
        license_name: for the generated card.
        token_file: holds the hub's token, in place of the environment's.
        progress: callbacks.

    Raises:
        MsquantError: as `prepare` and `upload`; or there is no such hub.
    """
    if hub not in HUBS:
        raise ModelError(f"there is no hub {hub!r}", where="--hub", remedy=f"use one of: {', '.join(HUBS)}")
    progress = progress or HubProgress()
    progress.stage(f"inspecting {folder}")
    found = prepare(folder, repository, license_name)
    if found.left_out:
        progress.stage(f"left out, as it is no part of the result: {', '.join(found.left_out)}")
    client = make_hub(hub, token_file)
    return upload(
        client,
        repository,
        found.files,
        digests=found.digests,
        create=create,
        private=private,
        progress=progress,
    )
