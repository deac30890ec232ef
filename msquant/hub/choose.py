"""Which hub a repository is taken from, and where a person's token for it is: in no option or message."""

import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from msquant.errors import HubError, ModelError, choices
from msquant.hub.huggingface import HuggingFaceHub
from msquant.hub.listing import Hub, NotFoundError, RemoteFile, RepositoryKind, Snapshot
from msquant.hub.modelers import ModelersHub
from msquant.hub.names import check_names, is_hub_id, select_files
from msquant.hub.retry import Limits, UnreachableError

MODELERS_VARIABLE = "MODELERS_TOKEN"
"""openmind_hub keeps no token and reads none; this is where one for Modelers is taken from."""

_MAX_BYTES = 4096


def token_from_file(path: Path) -> str:
    """The token that a file holds.

    Raises:
        HubError: it cannot be read, or holds something else than one word. What it holds is never shown.
    """
    try:
        with path.expanduser().open("rb") as file:
            text = file.read(_MAX_BYTES + 1).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not plain text"
        raise HubError(
            f"the token cannot be read: {reason}", where=path, remedy="check --token-file"
        ) from None
    return _checked(text, str(path))


def huggingface_token() -> str | None:
    """The token that huggingface_hub would send: from `HF_TOKEN`, or from where `hf auth login` put it."""
    from huggingface_hub import constants, get_token

    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    return None if token is None else _checked(token, "HF_TOKEN")


def modelers_token() -> str | None:
    """The token in the environment, or None."""
    token = os.environ.get(MODELERS_VARIABLE, "").strip()
    return _checked(token, MODELERS_VARIABLE) if token else None


def _checked(token: str, where: str) -> str:
    if not token or not token.isascii() or not token.isprintable() or " " in token or len(token) > _MAX_BYTES:
        raise HubError("holds something else than one token", where=where, remedy="put the token alone there")
    return token


AUTO = "auto"
HUBS = (AUTO, "modelers", "huggingface")

LIVE_ON_MODELERS = frozenset({"mindspore-lab", "mindspore-community", "modelers_park", "mindie", "eco-tech"})
"""Organisations, in lower case, that publish on Modelers first."""

_MODELERS = "https://modelers.cn"

_T = TypeVar("_T")


def make_hub(
    name: str,
    token_file: Path | None = None,
    limits: Limits | None = None,
    kind: RepositoryKind = "model",
) -> Hub:
    """A hub as the environment and the person's own settings describe it.

    Args:
        name: `modelers` or `huggingface`.
        token_file: holds the token, in place of the environment's.
        limits: patience.
        kind: of its repositories; Modelers has one address for all kinds.

    Raises:
        HubError: the address, the token or the least rate is not valid, or the token would go unprotected.
    """
    import os

    limits = limits or Limits.of_environment()
    if name == "modelers":
        token = token_from_file(token_file) if token_file else modelers_token()
        return ModelersHub(os.environ.get("OPENMIND_HUB_ENDPOINT") or _MODELERS, token, limits)
    from huggingface_hub import constants

    token = token_from_file(token_file) if token_file else huggingface_token()
    return HuggingFaceHub(constants.ENDPOINT, token, limits, kind)


def is_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` is set, as huggingface_hub reads it; it holds for both hubs."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def select_snapshot(
    repository: str,
    revision: str,
    hub: str,
    include: Sequence[str],
    exclude: Sequence[str],
    *,
    token_file: Path | None,
    kind: RepositoryKind,
    note: Callable[[str], None],
) -> tuple[Snapshot, list[RemoteFile]]:
    """As `find_snapshot`, and the files of it that `select_files` chooses; raises as both."""
    snapshot = find_snapshot(repository, revision, hub, token_file=token_file, kind=kind, note=note)
    return snapshot, select_files(snapshot.files, include, exclude, repository)


def find_snapshot(
    repository: str,
    revision: str = "main",
    hub: str = AUTO,
    *,
    token_file: Path | None = None,
    limits: Limits | None = None,
    kind: RepositoryKind = "model",
    note: Callable[[str], None] = lambda text: None,
) -> Snapshot:
    """Resolve a repository's revision to a commit and list it; its names are safe to write.

    Args:
        repository: `organisation/name`.
        revision: a branch, a tag or a commit.
        hub: `modelers`, `huggingface`, or `auto`: the one where the organisation lives, then the other.
        token_file: holds the token of the hub, which must be named then.
        limits: patience.
        kind: of the repository.
        note: called with a line that says which hub was taken instead of which.

    Raises:
        ModelError: the repository's name, the revision or the hub is none.
        HubError: it is not there, not allowed, not reachable, or not safe.
    """
    names = _order(repository, revision, hub, token_file)
    if is_offline():
        raise HubError(
            "downloads are switched off",
            where="HF_HUB_OFFLINE",
            remedy="unset it to ask the hubs",
        )
    first: HubError | None = None
    for name in names:
        chosen = make_hub(name, token_file, limits, kind)
        try:
            snapshot = interruptible(partial(chosen.snapshot, repository, revision), chosen)
        except HubError as error:
            if name == names[-1]:
                raise (error if first is None else _both(repository, first, error)) from error
            if not isinstance(error, NotFoundError | UnreachableError):
                raise
            first = error
            continue
        check_names(snapshot.files, repository)
        if first is not None:
            note(f"taken from {chosen.title}: {first.where}: {first.what}")
        return snapshot
    raise AssertionError("there is always a hub")


def _order(repository: str, revision: str, hub: str, token_file: Path | None) -> list[str]:
    if not is_hub_id(repository):
        raise ModelError(
            f"{repository!r} is not the name of a repository",
            remedy="write it as organisation/name, for example MindSpore-Lab/DeepSeek-R1-W8A8",
        )
    if hub not in HUBS:
        raise ModelError(f"there is no hub {hub!r}", where="--hub", remedy=choices(hub, tuple(HUBS)))
    unsafe = revision.startswith(("-", "/")) or ".." in revision or not revision.isprintable()
    if not revision or unsafe or len(revision) > 200:
        raise ModelError(
            f"{revision!r} is not the name of a revision",
            where="--revision",
            remedy="give a branch, a tag or a commit",
        )
    if hub != AUTO:
        return [hub]
    if token_file is not None:
        raise HubError(
            "the token is for one hub, and which one is not said",
            where="--token-file",
            remedy="name the hub with --hub modelers or --hub huggingface",
        )
    lives_there = repository.split("/")[0].lower() in LIVE_ON_MODELERS
    return ["modelers", "huggingface"] if lives_there else ["huggingface", "modelers"]


def _both(repository: str, first: HubError, second: HubError) -> HubError:
    if isinstance(first, UnreachableError) and isinstance(second, UnreachableError):
        return UnreachableError(
            f"no hub can be reached: {first.what}; {second.what}",
            where=repository,
            remedy="check the network and the proxy (HTTPS_PROXY), or name a mirror in "
            "OPENMIND_HUB_ENDPOINT or HF_ENDPOINT",
        )
    remedies = dict.fromkeys(error.remedy for error in (first, second) if error.remedy)
    return HubError(
        f"found on neither hub: {first.where}: {first.what}; {second.where}: {second.what}",
        where=repository,
        remedy="; ".join(remedies),
    )


def interruptible(work: Callable[[], _T], hub: Hub) -> _T:
    """Call `work` in a thread, so that Ctrl-C need not wait for the network; returns or raises as it does."""
    results: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.1)
    except BaseException:
        hub.client.abort()
        raise
    if errors:
        raise errors[0]
    return results[0]
