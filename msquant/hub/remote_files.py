"""The files of a hub's repository as an fsspec filesystem, so that `datasets` reads parts of them in place.

Every request is one of `HttpClient`: the token goes to the hub alone, proxies and certificates are those of
a download, and what fails is tried again as there.
"""

from typing import Any, ClassVar
from urllib.parse import quote, unquote

from fsspec import AbstractFileSystem, register_implementation
from fsspec.spec import AbstractBufferedFile

from msquant.errors import HubError
from msquant.hub.http import HttpClient
from msquant.hub.listing import Snapshot
from msquant.hub.retry import Transient, WrongFile

PROTOCOL = "msquant-hub"
BLOCK_BYTES = 1 << 18
"""Read at least at once; twice that is kept."""


def remote_address(snapshot: Snapshot, path: str) -> str:
    """The address by which fsspec opens a file of a repository, in this process.

    Args:
        snapshot: the repository at one commit.
        path: of a file in it.
    """
    register_implementation(PROTOCOL, RepositoryFiles, clobber=True)
    root = f"{snapshot.hub.name}/{quote(snapshot.repository, safe='')}/{snapshot.commit}"
    RepositoryFiles.snapshots[root] = snapshot
    return f"{PROTOCOL}://{root}/{quote(path)}"


def read_remote(snapshot: Snapshot, path: str) -> bytes:
    """The whole content of a small file of a repository. Raises HubError."""
    with RepositoryFiles().open(remote_address(snapshot, path), "rb") as file:
        content: bytes = file.read()
    return content


class RepositoryFiles(AbstractFileSystem):
    """Read-only files of the repositories that `remote_address` was asked for."""

    protocol = PROTOCOL
    snapshots: ClassVar[dict[str, Snapshot]] = {}

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """Name, size in bytes and type; the digest as `ETag`, by which caches know the content."""
        snapshot, name = self._find(path)
        file = next((file for file in snapshot.files if file.path == name), None)
        if file is None:
            raise FileNotFoundError(path)
        return {"name": path, "size": file.size, "type": "file", "ETag": file.digest}

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        """The file itself: folders are not listed."""
        entry = self.info(path)
        return [entry if detail else entry["name"]]

    def url(self, path: str) -> tuple[Snapshot, str]:
        """The repository of a file, and the file's address at its hub."""
        snapshot, name = self._find(path)
        return snapshot, snapshot.hub.file_url(snapshot, name)

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> "RepositoryFile":
        kwargs["block_size"] = BLOCK_BYTES
        return RepositoryFile(self, path, mode, **kwargs)

    def _find(self, path: str) -> tuple[Snapshot, str]:
        parts = self._strip_protocol(path).split("/", 3)
        if len(parts) < 4 or "/".join(parts[:3]) not in self.snapshots:
            raise FileNotFoundError(path)
        return self.snapshots["/".join(parts[:3])], unquote(parts[3])


class RepositoryFile(AbstractBufferedFile):
    """A file that is read by ranges."""

    DEFAULT_BLOCK_SIZE = BLOCK_BYTES

    def _fetch_range(self, start: int, end: int) -> bytes:
        snapshot, url = self.fs.url(self.path)
        client = snapshot.hub.client
        try:
            return client.patiently(lambda: _read_range(client, url, start, end))
        except WrongFile as error:
            raise HubError(
                f"a file is not what the hub lists: {error}", where=url, remedy="try again later"
            ) from error


def _read_range(client: HttpClient, url: str, start: int, end: int) -> bytes:
    content = bytearray()
    with client.open(url, {"Range": f"bytes={start}-{end - 1}"}) as response:
        if response.status_code != 206 and start:
            raise HubError(
                "the host of this file sends it whole only, which can be more than is wanted",
                where=url,
                remedy="download the dataset, and name its folder",
            )
        while len(content) < end - start and (
            piece := client.read_piece(response, end - start - len(content))
        ):
            content += piece
    if len(content) < end - start:
        raise Transient("the connection was closed within the file")
    return bytes(content)
