"""What a hub lists, before anything of it is trusted."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from msquant.checkpoint.disk import shown_sizes
from msquant.errors import HubError
from msquant.hub.bounds import MAX_FILE_BYTES
from msquant.hub.http import HttpClient

Algorithm = Literal["sha256", "git-sha1"]
RepositoryKind = Literal["model", "dataset"]


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository.

    Attributes:
        path: its name below the repository's root, with `/`.
        size: in bytes.
        algorithm: what the digest was made with: `sha256` of the content (LFS), or `git-sha1` of the blob.
        digest: in hexadecimal.
    """

    path: str
    size: int
    algorithm: Algorithm
    digest: str


@dataclass(frozen=True)
class Snapshot:
    """The files of a repository at one commit.

    Attributes:
        hub: where it is.
        repository: `organisation/name`.
        revision: what was asked for.
        commit: what that was when it was asked.
        reference: how the hub is asked for files: the commit, or the branch where it knows no commits.
        files: in the hub's order.
    """

    hub: "Hub"
    repository: str
    revision: str
    commit: str
    reference: str
    files: tuple[RemoteFile, ...]


class Hub(Protocol):
    """A place that models come from.

    Attributes:
        name: as `--hub` takes it.
        title: for people.
        client: makes its requests.
    """

    name: str
    title: str
    client: HttpClient

    def snapshot(self, repository: str, revision: str) -> Snapshot:
        """Resolve a revision to its commit and list that. Raises HubError, Stopped."""
        ...

    def file_url(self, snapshot: Snapshot, path: str) -> str:
        """Where the content of a file is."""
        ...


class NotFoundError(HubError):
    """The hub knows no such repository, or does not show it to this person."""


def hexadecimal(value: Any, length: int) -> str | None:
    """The value in lower case if it is a hexadecimal string of that length, else None."""
    if isinstance(value, str) and len(value) == length and set(value.lower()) <= set("0123456789abcdef"):
        return value.lower()
    return None


def remote_file(path: Any, size: Any, digest: Any, where: str) -> RemoteFile:
    """An entry of a listing, checked.

    Args:
        path: as listed; `names.check_names` judges it later.
        size: bytes of the content.
        digest: 64 hexadecimal digits of a sha256, or 40 of a git blob's sha1.
        where: the address of the listing.

    Raises:
        HubError: a value is of another kind, or the file larger than any.
    """
    sha256, sha1 = hexadecimal(digest, 64), hexadecimal(digest, 40)
    if not isinstance(path, str) or type(size) is not int or size < 0 or not (sha256 or sha1):
        raise HubError(f"the entry of {path!r} has no size or no hash that could be verified", where=where)
    if size > MAX_FILE_BYTES:
        listed, most = shown_sizes(size, MAX_FILE_BYTES)
        raise HubError(
            f"lists {path!r} with {listed}, the largest file that is taken has {most}",
            where=where,
            remedy="do not use this repository, and tell its hub",
        )
    if sha256:
        return RemoteFile(path, size, "sha256", sha256)
    return RemoteFile(path, size, "git-sha1", str(sha1))


def refuse_kind(kind: Any, path: Any, where: str) -> HubError:
    """The error for an entry that is neither a file nor a folder."""
    return HubError(
        f"lists {path!r} as a {kind}: only plain files are downloaded",
        where=where,
        remedy="leave it out with --exclude if the model works without it"
        if kind in ("submodule", "commit")
        else "tell the owner of the repository to replace it by a file",
    )


def entries(document: Any, where: str) -> Iterator[dict[str, Any]]:
    """The objects of a JSON list. Raises HubError if it is another thing."""
    if not isinstance(document, list) or not all(isinstance(entry, dict) for entry in document):
        raise HubError("the listing has another form than expected", where=where)
    yield from document
