"""Where a person's token is: never on the command line, and never in a message."""

import os
from pathlib import Path

from msquant.errors import HubError

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
