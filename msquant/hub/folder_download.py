"""A repository of a hub to a verified folder.

The commit is resolved first and everything is of that commit. Files are fetched beside their places, hashed
while they arrive, and get their names when they are verified; `config.json` and the index come last. A marker
in the folder says what is there, so that an interrupted download continues, an incomplete folder is known to
be so, and a finished one is recognised without reading it again.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from msquant.checkpoint.disk import require_free_space
from msquant.checkpoint.download_marker import DownloadMarker, MarkedFile
from msquant.checkpoint.folder_files import require_own_files
from msquant.checkpoint.results import remember_folder
from msquant.errors import CheckpointError, HubError, OutputError
from msquant.hub.hashing import DiskCheck
from msquant.hub.job import Job
from msquant.hub.listing import RemoteFile, Snapshot
from msquant.hub.partial import PartialFile, allocated_bytes, partial_key
from msquant.hub.target import Inventory, TargetFolder, new_marker
from msquant.hub.transfer import Transfer
from msquant.hub.transfer_events import HubProgress, Meter

WORKERS = 8
"""Connections at once."""

_SAVE_SECONDS = 1.0
_SHOWN = 5


@dataclass(frozen=True)
class DownloadResult:
    """A finished download.

    Attributes:
        folder: where the files are.
        hub: `modelers` or `huggingface`.
        endpoint: the hub's address.
        repository: `organisation/name`.
        revision: what was asked for.
        commit: what that was.
        files: how many files were asked for.
        nbytes: of all of them.
        fetched: the files of which not everything had come before, or not as it should be.
        received_bytes: what came over the network.
        seconds: wall time.
    """

    folder: Path
    hub: str
    endpoint: str
    repository: str
    revision: str
    commit: str
    files: int
    nbytes: int
    fetched: list[str]
    received_bytes: int
    seconds: float


def download(
    snapshot: Snapshot,
    files: Sequence[RemoteFile],
    target: Path,
    *,
    workers: int = WORKERS,
    verify: bool = False,
    progress: HubProgress | None = None,
) -> DownloadResult:
    """Fetch files of a snapshot into a folder, or what is missing there of them, and verify each.

    Args:
        snapshot: from `find_snapshot`.
        files: those of it that are wanted, from `select_files`.
        target: the folder.
        workers: connections at once.
        verify: hash also the files that an earlier download has verified, and fetch those that changed.
        progress: callbacks.

    Raises:
        HubError: the hub refuses or does not answer; or files stay wrong, which are named.
        OutputError: there is not enough disk, it cannot be written, or the folder holds something else.
        KeyboardInterrupt: Ctrl-C; what is here stays, and the same call continues.
    """
    started = time.monotonic()
    progress = progress or HubProgress()
    with TargetFolder(target, progress.stage) as folder:
        before = folder.marker(snapshot)
        found = folder.inventory(files, before, verify=verify)
        if found.unknown:
            _check_unknown(folder, found, progress)
        _refuse_conflicts(folder, found, before, snapshot)
        marker = new_marker(snapshot, files, found.good, before)
        _refuse_mixture(folder, marker, snapshot)
        fetched: list[str] = []
        received = 0
        if found.missing:
            remember_folder(folder.path, "download")
            fetched, received = _fetch(folder, found, marker, snapshot, workers, progress)
            folder.release([file.path for file in files])
            _check_all_there(folder, files, marker)
        if marker.obsolete:
            # Said before it is done, so that a kill on the way leaves nothing that looks whole.
            marker.write(folder.path)
            folder.remove_obsolete(marker.obsolete)
            marker.obsolete = {}
        marker.complete = True
        if marker != before:
            marker.write(folder.path)
        folder.remove_leftovers(set())
        _name_others(folder, progress)
    return DownloadResult(
        folder=folder.path,
        hub=snapshot.hub.name,
        endpoint=snapshot.hub.client.endpoint,
        repository=snapshot.repository,
        revision=snapshot.revision,
        commit=snapshot.commit,
        files=len(files),
        nbytes=sum(file.size for file in files),
        fetched=fetched,
        received_bytes=received,
        seconds=time.monotonic() - started,
    )


def _check_all_there(folder: TargetFolder, files: Sequence[RemoteFile], marker: DownloadMarker) -> None:
    """The last look before a folder is called complete."""
    found = folder.inventory(files, marker, verify=False)
    if lost := [*found.missing, *found.unknown]:
        raise OutputError(
            "was changed or removed by another process during the download",
            where=folder.path / lost[0].path,
            remedy="run the same command again",
        )


def _check_unknown(folder: TargetFolder, found: Inventory, progress: HubProgress) -> None:
    """Hash the files that nobody vouches for, and sort them into good and missing ones."""
    check = DiskCheck(folder.path, found.unknown)
    total = sum(file.size for file in found.unknown)
    meter = Meter("verifying", total, len(found.unknown))
    check.run(lambda: progress.update(meter.state(check.checked, len(check.good), check.checked)))
    for file in found.unknown:
        if file.path in check.good:
            found.good[file.path] = check.good[file.path].st_mtime_ns
        else:
            found.missing.append(file)
            found.conflicts.append(file)
    if wrong := len(found.unknown) - len(check.good):
        progress.stage(f"{wrong} of {len(found.unknown)} files have another content than listed")


def _refuse_conflicts(
    folder: TargetFolder, found: Inventory, before: DownloadMarker | None, snapshot: Snapshot
) -> None:
    """Never replace what a person put there: only files of an earlier download are."""
    if before is not None or not found.conflicts:
        return
    others = f" and {len(found.conflicts) - 1} others" if found.conflicts[1:] else ""
    raise OutputError(
        f"holds another {found.conflicts[0].path}{others} than {snapshot.repository}, and is no copy of it",
        where=folder.path,
        remedy="name another folder with --output",
    )


def _name_others(folder: TargetFolder, progress: HubProgress) -> None:
    """Say it now if every command will refuse the folder for what is in it besides the download."""
    try:
        require_own_files(folder.path)
    except CheckpointError as error:
        progress.stage(f"{error.where} {error.what}; {error.remedy}")


def _refuse_mixture(folder: TargetFolder, marker: DownloadMarker, snapshot: Snapshot) -> None:
    """Leave no files of two commits in a folder, and remove none unasked that the new commit has, too.

    What the new commit does not list at all is removed when its own files are complete.
    """
    listed = {file.path for file in snapshot.files}
    left = sorted(name for name in marker.obsolete if name in listed and (folder.path / name).exists())
    if left:
        others = f" and {len(left) - 1} others" if left[1:] else ""
        raise OutputError(
            f"holds {left[0]}{others} of an earlier commit: {snapshot.commit[:10]} has another content, "
            "and it is not asked for",
            where=folder.path,
            remedy="ask for it too, with other --include and --exclude; name another folder with --output; "
            "or remove it from this one",
        )


def _fetch(
    folder: TargetFolder,
    found: Inventory,
    marker: DownloadMarker,
    snapshot: Snapshot,
    workers: int,
    progress: HubProgress,
) -> tuple[list[str], int]:
    """Fetch what is missing; returns the files that came, and the bytes that came over the network."""
    folder.remove_leftovers({partial_key(file) for file in found.missing})
    # Before the files' segments are laid out: sizes that are only said take memory only where there is room.
    require_free_space(
        folder.path, sum(file.size - allocated_bytes(folder.partial, file) for file in found.missing)
    )
    # Small files first: what is wrong with a repository shows in its config, not after hours.
    jobs = [
        Job(file, PartialFile(folder.partial, file), folder.place(file.path))
        for file in sorted(found.missing, key=lambda file: (file.size > (16 << 20), file.path))
    ]
    # All of these has come before; it is only to be verified.
    came = {job for job in jobs if job.file.size and job.partial.present == job.file.size}
    marker.write(folder.path)
    folder.hold_back(list(found.good))
    saved = time.monotonic()

    def verified(job: Job, modified: int) -> None:
        nonlocal saved
        file = job.file
        marker.files[file.path] = MarkedFile(file.size, file.algorithm, file.digest, modified)
        if time.monotonic() - saved > _SAVE_SECONDS:
            marker.write(folder.path)
            saved = time.monotonic()

    transfer = Transfer(snapshot, jobs, workers, verified)
    here = sum(entry.size for entry in marker.files.values() if entry.mtime_ns is not None)
    total = sum(entry.size for entry in marker.files.values())
    meter = Meter("downloading", total, len(marker.files))
    ready = len(marker.files) - len(jobs)
    try:
        transfer.run(
            lambda: progress.update(
                meter.state(here + transfer.present, ready + transfer.finished, transfer.received)
            )
        )
    except (Exception, KeyboardInterrupt) as error:
        error.add_note(
            f"{ready + transfer.finished} of {len(marker.files)} files are verified in {folder.path}; "
            "the same command continues with the rest"
        )
        # What the marker cannot say, on a full disk for example, is hashed again by the next call.
        with suppress(OutputError):
            marker.write(folder.path)
        raise
    marker.write(folder.path)
    if transfer.failed:
        names = ", ".join(transfer.failed[:_SHOWN])
        more = f" and {len(transfer.failed) - _SHOWN} more" if transfer.failed[_SHOWN:] else ""
        raise HubError(
            f"another content than listed, in {snapshot.hub.client.limits.corrupt_attempts} attempts: "
            f"{names}{more}",
            where=snapshot.repository,
            remedy="run the same command again later; the other files are verified and kept. If it stays so, "
            "the files are broken on the hub",
        )
    fetched = {job.file.path for job in jobs if job not in came or job.attempts}
    return [file.path for file in found.missing if file.path in fetched], transfer.received
