"""A folder to a repository of a hub: what is not there yet, as one commit, and looked at afterwards."""

import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msquant.errors import CheckpointError, HubError
from msquant.hub.choose import interruptible
from msquant.hub.listing import Hub, NotFoundError, RemoteFile
from msquant.hub.partial import new_hash
from msquant.hub.retry import Stopped, Transient, WrongFile
from msquant.hub.transfer_events import HubProgress, Meter
from msquant.hub.uploads import BRANCH, HuggingFaceUploads, ModelersUploads, Uploads

WORKERS = 4
"""Files at once."""


@dataclass(frozen=True)
class UploadResult:
    """A finished upload.

    Attributes:
        hub: `modelers` or `huggingface`.
        endpoint: the hub's address.
        repository: `organisation/name`.
        commit: what holds all the files now.
        files: how many were to be there.
        nbytes: of all of them.
        sent: those that the repository did not hold already.
        seconds: wall time.
    """

    hub: str
    endpoint: str
    repository: str
    commit: str
    files: int
    nbytes: int
    sent: list[str]
    seconds: float


def upload(
    hub: Hub,
    repository: str,
    files: Mapping[str, Path | bytes],
    *,
    digests: Mapping[str, str],
    create: bool = False,
    private: bool = False,
    progress: HubProgress | None = None,
) -> UploadResult:
    """Put files into a repository; nothing of it is visible before all of it is there.

    Args:
        hub: with a token.
        repository: `organisation/name`.
        files: contents by their names.
        digests: the sha256 that files must have, of those where it is known.
        create: make the repository if it is not there.
        private: make it private then.
        progress: callbacks.

    Raises:
        HubError: there is no token, the hub refuses or does not answer, or holds something else afterwards.
        CheckpointError: a file is not what `digests` says; nothing is committed.
        KeyboardInterrupt: Ctrl-C; the hub keeps what is there, and the same call continues.
    """
    started = time.monotonic()
    progress = progress or HubProgress()
    if hub.client.token is None:
        raise HubError(
            "an upload needs a token that may write",
            where=hub.title,
            remedy="put it into HF_TOKEN or MODELERS_TOKEN, or use --token-file",
        )
    there = interruptible(lambda: _listing(hub, repository), hub)
    uploads = (ModelersUploads if hub.name == "modelers" else HuggingFaceUploads)(hub, repository)
    if there is None:
        if not create:
            raise HubError(
                "there is no such repository, or this account may not see it",
                where=f"{hub.title}: {repository}",
                remedy="check the name, or make it with --create",
            )
        progress.stage(f"creating {repository} on {hub.title}")
        interruptible(lambda: _persistent(hub, lambda: uploads.create(private)), hub)
        there = {}
    sending = _Sending(hub, uploads, files, digests, there)
    try:
        sending.run(progress)
        if sending.additions:
            progress.stage("committing")
            additions = list(sending.additions.values())
            interruptible(lambda: _persistent(hub, lambda: uploads.commit(additions)), hub)
    except KeyboardInterrupt as error:
        error.add_note("nothing is visible yet; the hub keeps what it has, and the same command continues")
        raise
    progress.stage("checking what the hub holds now")
    commit = interruptible(lambda: _check(hub, repository, sending), hub)
    return UploadResult(
        hub=hub.name,
        endpoint=hub.client.endpoint,
        repository=repository,
        commit=commit,
        files=len(files),
        nbytes=sum(map(_size, files.values())),
        sent=sorted(sending.additions),
        seconds=time.monotonic() - started,
    )


class _Sending:
    """Hashes files and sends those that are not there, several at once."""

    def __init__(
        self,
        hub: Hub,
        uploads: Uploads,
        files: Mapping[str, Path | bytes],
        digests: Mapping[str, str],
        there: Mapping[str, RemoteFile],
    ) -> None:
        self._hub, self._uploads, self.files = hub, uploads, files
        self._digests, self._there = digests, there
        self._names: queue.SimpleQueue[str] = queue.SimpleQueue()
        for name in files:
            self._names.put(name)
        self._done: dict[str, int] = {}
        self._error: BaseException | None = None
        self.additions: dict[str, Any] = {}
        self.sha256: dict[str, str] = {}

    def run(self, progress: HubProgress) -> None:
        total = sum(map(_size, self.files.values()))
        meter = Meter("uploading", total, len(self.files))
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(WORKERS)]
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads) and self._error is None:
                time.sleep(0.1)
                done = sum(list(self._done.values()))
                progress.update(meter.state(done, len(self._done), done))
        except BaseException:
            self._hub.client.abort()
            raise
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while self._error is None and not self._hub.client.stop.is_set():
            try:
                name = self._names.get_nowait()
            except queue.Empty:
                return
            try:
                self._send(name)
            except Stopped:
                return
            except BaseException as error:
                self._error = error

    def _send(self, name: str) -> None:
        source = self.files[name]
        addition = self._uploads.addition(name, source)
        self.sha256[name] = addition.upload_info.sha256.hex()
        if self._digests.get(name, self.sha256[name]) != self.sha256[name]:
            raise CheckpointError(
                "is not what was written: its sha256 is another than in msquant.json",
                where=source if isinstance(source, Path) else name,
                remedy="quantize again, or copy the folder again",
            )
        if not _is_there(self._there.get(name), source, self.sha256[name]):
            _persistent(self._hub, lambda: self._uploads.send(addition))
            self.additions[name] = addition
        self._done[name] = _size(source)


def _persistent(hub: Hub, call: Any) -> None:
    """Call until it works. Raises HubError when the hub refuses or all attempts were in vain, Stopped."""
    failures = 0
    while True:
        try:
            call()
            return
        except Transient as error:
            failures += 1
            if failures >= hub.client.limits.attempts:
                raise hub.client.unreachable(error) from error
            hub.client.pause(error, failures)


def _listing(hub: Hub, repository: str) -> dict[str, RemoteFile] | None:
    """The files of the branch; None if there is no such repository."""
    try:
        return {file.path: file for file in hub.snapshot(repository, BRANCH).files}
    except NotFoundError:
        return None


def _is_there(remote: RemoteFile | None, source: Path | bytes, sha256: str) -> bool:
    if remote is None or remote.size != _size(source):
        return False
    if remote.algorithm == "sha256":
        return remote.digest == sha256
    digest = new_hash(remote.algorithm, remote.size)
    digest.update(source if isinstance(source, bytes) else source.read_bytes())
    return bool(digest.hexdigest() == remote.digest)


def _check(hub: Hub, repository: str, sending: _Sending) -> str:
    """Hold the listing against what was sent, and ask for the last byte of each large file; the commit."""
    snapshot = hub.snapshot(repository, BRANCH)
    remote = {file.path: file for file in snapshot.files}
    for name, source in sending.files.items():
        wrong = not _is_there(remote.get(name), source, sending.sha256[name])
        if not wrong and remote[name].algorithm == "sha256" and name in sending.additions:
            last = remote[name].size - 1
            url = hub.file_url(snapshot, name)
            try:
                with hub.client.open(url, {"Range": f"bytes={last}-{last}"}) as response:
                    wrong = response.status_code not in (200, 206) or not hub.client.read_piece(response, 1)
            except WrongFile:
                wrong = True
        if wrong:
            raise HubError(
                f"{name} is not there as it was sent",
                where=f"{hub.title}: {repository}",
                remedy="run the same command again: it sends what is missing",
            )
    return snapshot.commit


def _size(source: Path | bytes) -> int:
    return len(source) if isinstance(source, bytes) else source.stat().st_size
