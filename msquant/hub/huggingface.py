"""The routes of the Hugging Face Hub, and what its refusals mean."""

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from msquant.errors import HubError
from msquant.hub.bounds import ListingBounds
from msquant.hub.http import HttpClient
from msquant.hub.listing import (
    NotFoundError,
    RemoteFile,
    RepositoryKind,
    Snapshot,
    entries,
    hexadecimal,
    refuse_kind,
    remote_file,
)
from msquant.hub.retry import Limits

_TOKEN = "put a token into HF_TOKEN, log in with `hf auth login`, or use --token-file"


class HuggingFaceHub:
    """The Hugging Face Hub, or a mirror that speaks its protocol.

    Args:
        endpoint: its address.
        token: the person's token, or None.
        limits: patience.
        kind: of its repositories, `model` or `dataset`.
    """

    name = "huggingface"
    title = "Hugging Face Hub"

    def __init__(
        self,
        endpoint: str,
        token: str | None = None,
        limits: Limits | None = None,
        kind: RepositoryKind = "model",
    ) -> None:
        self._kind = kind
        self.client = HttpClient(self.title, endpoint, "HF_ENDPOINT", token, self._explain, limits)

    def snapshot(self, repository: str, revision: str) -> Snapshot:
        """Resolve a revision to its commit and list that. Raises HubError, Stopped."""
        url = f"{self._api(repository)}/revision/{quote(revision, safe='')}"
        document, _ = self.client.json(url)
        commit = hexadecimal(document.get("sha"), 40) if isinstance(document, dict) else None
        if commit is None:
            raise HubError("the answer names no commit", where=url, remedy="check HF_ENDPOINT")
        return Snapshot(self, repository, revision, commit, commit, tuple(self._files(repository, commit)))

    def file_url(self, snapshot: Snapshot, path: str) -> str:
        """Where the content of a file is; large files are redirected to other hosts from there."""
        folder = "datasets/" if self._kind == "dataset" else ""
        place = f"{folder}{snapshot.repository}/resolve/{snapshot.reference}"
        return f"{self.client.endpoint}/{place}/{quote(path)}"

    def _api(self, repository: str) -> str:
        return f"{self.client.endpoint}/api/{self._kind}s/{repository}"

    def _files(self, repository: str, commit: str) -> Iterator[RemoteFile]:
        url: str | None = f"{self._api(repository)}/tree/{commit}"
        params: dict[str, str] | None = {"recursive": "true", "expand": "false"}
        bounds = ListingBounds(repository)
        while url is not None:
            bounds.ask(url)
            document, following = self.client.json(url, params)
            for entry in entries(document, url):
                kind, path = entry.get("type"), entry.get("path")
                bounds.count(path)
                if kind == "file":
                    lfs = entry.get("lfs")
                    lfs = lfs if isinstance(lfs, dict) else {}
                    size, digest = lfs.get("size", entry.get("size")), lfs.get("oid", entry.get("oid"))
                    yield remote_file(path, size, digest, url)
                elif kind != "directory":
                    raise refuse_kind(kind, path, url)
            url, params = following, None

    def _explain(self, status: int, headers: Mapping[str, str], body: Any) -> HubError:
        code = headers.get("X-Error-Code", "")
        token = self.client.token is not None
        if code == "GatedRepo":
            return HubError(
                "access to this repository must be granted first",
                where=self.title,
                remedy="ask for access on its web page, then try again with the token of the same account"
                if token
                else f"ask for access on its web page, then {_TOKEN}",
            )
        if code == "RevisionNotFound":
            return HubError("there is no such revision", where=self.title, remedy="check the revision")
        if code == "EntryNotFound":
            return HubError("a listed file is not there", where=self.title, remedy="try again later")
        if status == 401 and token and "credentials" in headers.get("X-Error-Message", "").lower():
            return HubError("the token is not valid", where=self.title, remedy=_TOKEN)
        # The hub also says 401 of a repository that is not there.
        if code == "RepoNotFound" or status in (401, 404):
            return NotFoundError(
                "there is no such repository, or this account may not see it"
                if token
                else "there is no such repository, or it asks for a token",
                where=self.title,
                remedy=f"check the name; if it is private, {_TOKEN}",
            )
        if status == 403:
            return HubError(
                "this account may not read the repository" if token else "access is forbidden",
                where=self.title,
                remedy="ask its owner for access" if token else _TOKEN,
            )
        return HubError(f"refuses with status {status}", where=self.title, remedy="try again later")
