"""JSON that comes from outside: bounded before anything is built of it, with errors that name the file."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from msquant.checkpoint.regular_file import read_regular
from msquant.errors import CheckpointError

MAX_BYTES = 64 * 2**20
"""The index of a 61-layer model with 256 experts a layer is about 10 MB; more than this is no such file."""

MAX_MARKS = 2_000_000
"""Of `{`, `[`, `,` and `:`, each of which makes some 80 bytes of memory; that index has 200,000."""

MAX_DEPTH = 64
"""Of objects and lists within one another."""

MAX_DIGITS = 100
"""Of an integer: tokenizers write 10**30 for "no limit"."""

_LONE_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        CheckpointError: the file is missing, unreadable, no regular file, not JSON, not an object or
            beyond a limit of `decode_json`.
    """
    try:
        value = decode_json(read_regular(path, MAX_BYTES))
    except FileNotFoundError:
        raise CheckpointError(
            "the file is missing", where=path, remedy="copy or download the whole checkpoint folder again"
        ) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(
            f"cannot be read as JSON: {reason}", where=path, remedy="copy or download the file again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"holds a {type(value).__name__} where an object is expected", where=path)
    return value


def decode_json(data: bytes, *, max_bytes: int = MAX_BYTES, unique_keys: bool = False) -> Any:
    """The value of a JSON document in UTF-8.

    Args:
        data: the document.
        max_bytes: the limit of its size.
        unique_keys: refuse an object that has a key twice, of which the last one counts otherwise.

    Raises:
        ValueError: it is not JSON, or beyond a limit, which the message names.
    """
    if len(data) > max_bytes:
        raise ValueError(f"it has {len(data)} bytes, at most {max_bytes} are read")
    if (marks := sum(map(data.count, (b"{", b"[", b",", b":")))) > MAX_MARKS:
        raise ValueError(f"it has {marks} braces, brackets, commas and colons, at most {MAX_MARKS} are read")
    text = data.decode("utf-8")
    try:
        value = json.loads(
            text, object_pairs_hook=_without_duplicates if unique_keys else None, parse_int=_integer
        )
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check(value, _LONE_SURROGATE.search(text) is not None)
    return value


_TOO_DEEP = f"its objects and lists are nested more than {MAX_DEPTH} deep"


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key occurs twice")
    return value


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_DIGITS:
        raise ValueError(f"it holds an integer of {len(digits)} digits, at most {MAX_DIGITS} are read")
    return int(digits)


def _check(value: Any, has_surrogates: bool) -> None:
    """Refuse what is nested too deep, and halves of characters, which cannot be written anywhere."""
    level: list[Any] = [[value]]
    for _ in range(MAX_DEPTH + 1):
        following: list[Any] = []
        for each in level:
            parts: Iterable[Any] = each.values() if isinstance(each, dict) else each
            if has_surrogates:
                _check_texts([*each, *parts] if isinstance(each, dict) else parts)
            following.extend(part for part in parts if isinstance(part, dict | list))
        level = following
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def _check_texts(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError(f"{value!a} holds half of a character") from None
