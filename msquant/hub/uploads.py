"""What an upload takes of the hubs' own clients: one file, and one commit, at a time."""

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import requests

from msquant.errors import HubError
from msquant.hub.addresses import is_loopback
from msquant.hub.listing import Hub
from msquant.hub.retry import WORTH_RETRYING, Transient, reason_of, retry_after
from msquant.hub.session import HubSession

MESSAGE = "Upload by msquant"
BRANCH = "main"

_CHAIN = 5


class Uploads(Protocol):
    """A repository that is uploaded to; methods raise HubError, or Transient if trying again may help."""

    def create(self, private: bool) -> None:
        """Make the repository."""
        ...

    def addition(self, name: str, source: Path | bytes) -> Any:
        """The client's own record of a file to add; reads and hashes it."""
        ...

    def send(self, addition: Any) -> None:
        """Upload the content of a large file, or what is missing of it."""
        ...

    def commit(self, additions: Sequence[Any]) -> None:
        """Make all additions visible at once."""
        ...


class HuggingFaceUploads:
    """Uploads by huggingface_hub, through Xet or LFS as the hub chooses."""

    def __init__(self, hub: Hub, repository: str) -> None:
        from huggingface_hub import CommitOperationAdd, HfApi, configure_http_backend, constants
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        if constants.HF_HUB_OFFLINE:
            raise HubError(
                "uploads are switched off", where="HF_HUB_OFFLINE", remedy="unset it to ask the hub"
            )
        configure_http_backend(HubSession)
        if is_loopback(hub.client.endpoint):
            # Xet's own client would take a proxy of the environment for it, and give it the token in clear.
            constants.HF_HUB_DISABLE_XET = True
        self._hub, self._repository = hub, repository
        self._addition = CommitOperationAdd
        self._api = HfApi(endpoint=hub.client.endpoint, token=hub.client.token)

    def create(self, private: bool) -> None:
        """Make the repository."""
        with explained(self._hub):
            self._api.create_repo(self._repository, private=private, exist_ok=True)

    def addition(self, name: str, source: Path | bytes) -> Any:
        """The client's own record of a file to add; reads and hashes it."""
        return self._addition(path_in_repo=name, path_or_fileobj=source)

    def send(self, addition: Any) -> None:
        """Upload the content of a large file; one that the hub has already is not sent again."""
        with explained(self._hub):
            self._api.preupload_lfs_files(self._repository, [addition], revision=BRANCH, free_memory=False)

    def commit(self, additions: Sequence[Any]) -> None:
        """Make all additions visible at once."""
        with explained(self._hub):
            self._api.create_commit(
                self._repository, list(additions), commit_message=MESSAGE, revision=BRANCH
            )


class ModelersUploads:
    """Uploads by openmind_hub, one file a call: given several, it skips all after one that is there already.

    It gets open files and not paths, because it refuses paths outside of a list that it reads once.
    """

    def __init__(self, hub: Hub, repository: str) -> None:
        os.environ.setdefault("OM_HUB_DISABLE_PROGRESS_BARS", "1")
        from openmind_hub import CommitOperationAdd, OmApi, set_verbosity_error

        set_verbosity_error()
        self._hub, self._repository = hub, repository
        self._addition = CommitOperationAdd
        with explained(hub):
            self._api = OmApi(endpoint=hub.client.endpoint, token=hub.client.token)

    def create(self, private: bool) -> None:
        """Make the repository."""
        with explained(self._hub):
            self._api.create_repo(
                self._repository, token=self._hub.client.token, private=private, exist_ok=True
            )

    def addition(self, name: str, source: Path | bytes) -> Any:
        """The client's own record of a file to add; reads and hashes it."""
        content = io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
        with explained(self._hub):
            return self._addition(path_in_repo=name, path_or_fileobj=content)

    def send(self, addition: Any) -> None:
        """Upload the content of a large file; parts that the hub has already are not sent again."""
        with explained(self._hub):
            try:
                self._api.preupload_lfs_files(
                    repo_id=self._repository, additions=[addition], revision=BRANCH, free_memory=False
                )
            except ValueError as error:
                # For a file that it has already the hub lists no parts, which the client takes for a mistake.
                if "part is improperly formatted" not in str(error):
                    raise
                addition.is_uploaded = True

    def commit(self, additions: Sequence[Any]) -> None:
        """Make all additions visible at once."""
        with explained(self._hub):
            self._api.create_commit(
                repo_id=self._repository,
                operations=list(additions),
                commit_message=MESSAGE,
                revision=BRANCH,
            )


@contextmanager
def explained(hub: Hub) -> Iterator[None]:
    """Turn what a client raises into a HubError, or into Transient; their texts may hold addresses."""
    try:
        yield
    except (HubError, Transient):
        raise
    except Exception as error:
        refusal = _http_error(error)
        if refusal is not None:
            status, headers = refusal.status_code, refusal.headers
            if status in WORTH_RETRYING:
                raise Transient(f"status {status}", retry_after(headers.get("Retry-After"))) from error
            try:
                body = refusal.json()
            except ValueError:
                body = None
            raise hub.client.explain(status, headers, body) from error
        if isinstance(error, requests.RequestException):
            raise Transient(reason_of(error), reached=False) from error
        raise HubError(
            f"its client refuses: {_without(str(error), hub.client.token)[:300]}", where=hub.title
        ) from error


def _http_error(error: BaseException) -> requests.Response | None:
    """The answer that an error is about; clients wrap it into others."""
    found: BaseException | None = error
    for _ in range(_CHAIN):
        if isinstance(found, requests.HTTPError) and found.response is not None:
            return found.response
        found = found.__cause__ if found is not None else None
    return None


def _without(text: str, secret: str | None) -> str:
    return text.replace(secret, "...") if secret else text
