"""The routes of Modelers (modelers.cn), and what its refusals mean."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from msquant.errors import HubError
from msquant.hub.bounds import ListingBounds
from msquant.hub.http import HttpClient
from msquant.hub.listing import (
    NotFoundError,
    RemoteFile,
    Snapshot,
    entries,
    hexadecimal,
    refuse_kind,
    remote_file,
)
from msquant.hub.retry import Limits

_TOKEN = "put a token (modelers.cn/my/tokens) into MODELERS_TOKEN, or use --token-file"
_LISTINGS = 3


class ModelersHub:
    """Modelers, or another hub of its kind.

    Args:
        endpoint: its address.
        token: the person's token, or None.
        limits: patience.
    """

    name = "modelers"
    title = "Modelers"

    def __init__(self, endpoint: str, token: str | None = None, limits: Limits | None = None) -> None:
        self.client = HttpClient(self.title, endpoint, "OPENMIND_HUB_ENDPOINT", token, self._explain, limits)

    def snapshot(self, repository: str, revision: str) -> Snapshot:
        """Resolve a revision to its commit and list that; raises HubError, Stopped.

        Where the hub takes no commit as a reference, the branch is listed until nothing was pushed
        meanwhile; then every file is held to the hash of that listing.
        """
        commit, root = self._folder(repository, revision, "")
        if commit != revision:
            try:
                pinned, pinned_root = self._folder(repository, commit, "")
            except HubError:
                pinned = None
            if pinned == commit:
                files = self._files(repository, commit, pinned_root)
                return Snapshot(self, repository, revision, commit, commit, files)
        for _ in range(_LISTINGS):
            files = self._files(repository, revision, root)
            before = commit
            commit, root = self._folder(repository, revision, "")
            if commit == before:
                return Snapshot(self, repository, revision, commit, revision, files)
        raise HubError(
            f"{revision} of {repository} changes while it is listed",
            where=self.title,
            remedy="try again when nobody pushes to it, or name a commit with --revision",
        )

    def file_url(self, snapshot: Snapshot, path: str) -> str:
        """Where the content of a file is; it may be redirected to another host from there."""
        reference = quote(snapshot.reference, safe="")
        return f"{self._api(snapshot.repository)}/{reference}/media/{quote(path)}"

    def _api(self, repository: str) -> str:
        return f"{self.client.endpoint}/api/v1/file/{repository}"

    def _folder(self, repository: str, reference: str, path: str) -> tuple[str, list[dict[str, Any]]]:
        """The commit that a listing is of, and the entries of one folder."""
        url = self._api(repository)
        document, _ = self.client.json(url, {"path": path, "ref": reference})
        try:
            data = document["data"]
            commit = hexadecimal(data["last_commit"]["commit"]["commit_sha"], 40)
            tree = list(entries(data["tree"] or [], url))
        except (KeyError, TypeError):
            commit = None
        if commit is None:
            raise HubError(
                "the listing has another form than expected", where=url, remedy="check OPENMIND_HUB_ENDPOINT"
            )
        return commit, tree

    def _files(self, repository: str, reference: str, root: list[dict[str, Any]]) -> tuple[RemoteFile, ...]:
        url, files, seen = self._api(repository), [], set()
        bounds, pending, tree = ListingBounds(repository), [], root
        while True:
            for entry in tree:
                kind, path = entry.get("type"), entry.get("path")
                bounds.count(path)
                if kind == "file":
                    files.append(remote_file(path, entry.get("size"), entry.get("etag"), url))
                elif kind != "dir" or not isinstance(path, str):
                    raise refuse_kind(kind, path, url)
                elif path not in seen:
                    seen.add(path)
                    bounds.ask(path)
                    pending.append(path)
            if not pending:
                return tuple(files)
            tree = self._folder(repository, reference, pending.pop(0))[1]

    def _explain(self, status: int, headers: Mapping[str, str], body: Any) -> HubError:
        code = body.get("code") if isinstance(body, dict) else None
        token = self.client.token is not None
        if status == 404 and code == "ref_not_exist":
            return HubError("there is no such revision", where=self.title, remedy="check the revision")
        if status == 404 and code == "branch_or_path_not_found":
            return HubError(
                "there is no such branch, or a listed file is not there",
                where=self.title,
                remedy="check the revision, or try again later",
            )
        if status == 404:
            return NotFoundError(
                "there is no such repository, or it is private",
                where=self.title,
                remedy=f"check the name; if it is private, {_TOKEN}",
            )
        if status == 401:
            return HubError(
                "this account may not read the repository, or the token is not valid"
                if token
                else "the repository asks for a token",
                where=self.title,
                remedy="ask for access on its web page, and check the token" if token else _TOKEN,
            )
        if status in (403, 418):
            return HubError(
                "access is forbidden" if status == 403 else "this account is not on the repository's list",
                where=self.title,
                remedy="ask for access on its web page" if token else _TOKEN,
            )
        return HubError(f"refuses with status {status}", where=self.title, remedy="try again later")
