"""Prompts from a file: one a line, or JSON Lines."""

import sys
from pathlib import Path

from msquant.checkpoint.disk import shown_sizes
from msquant.checkpoint.json_file import decode_json
from msquant.errors import EngineError

STANDARD_INPUT = Path("-")
MAX_BYTES = 256 * 2**20
"""Of the file; its prompts and their answers are all kept in memory."""

_FIELD = "prompt"


def read_prompts(path: Path) -> list[str]:
    """Read one prompt a line; empty lines are left out.

    A file that is called .jsonl, or whose first line is a JSON object, holds an object with a `prompt` in
    each line: that is how a prompt of several lines is written.

    Args:
        path: the file, or `-` for standard input.

    Raises:
        EngineError: the file cannot be read, is too large, is not UTF-8 text, holds no prompt, or a line
            is not what the others are; names the line.
    """
    where = "standard input" if path == STANDARD_INPUT else str(path)
    try:
        if path == STANDARD_INPUT:
            data = sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            # A pipe is read too: that is how a shell gives what another command prints.
            with path.expanduser().open("rb") as file:
                data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise EngineError(
            f"the file of prompts cannot be read ({error.strerror})", where=where, remedy="check its name"
        ) from error
    if len(data) > MAX_BYTES:
        (most,) = shown_sizes(MAX_BYTES)
        raise EngineError(
            f"the file of prompts has more than {most}, as much is read",
            where=where,
            remedy="split it into several files",
        )
    every = (line.rstrip("\r") for line in _text(data, where).split("\n"))
    lines = [(i, line) for i, line in enumerate(every, 1) if line.strip()]
    if not lines:
        raise EngineError("there is no prompt in it", where=where, remedy="write one prompt a line")
    if path.suffix == ".jsonl" or _is_object(lines[0][1]):
        return [_prompt(line, f"{where}:{i}") for i, line in lines]
    return [line for _, line in lines]


def _text(data: bytes, where: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EngineError(
            f"is not UTF-8 text (byte {data[error.start]:#04x} at {error.start})",
            where=where,
            remedy="save it as UTF-8",
        ) from error
    if "\0" in text:
        raise EngineError("is a binary file, not text", where=where, remedy="give a text file of prompts")
    return text


def _is_object(line: str) -> bool:
    try:
        return isinstance(decode_json(line.encode()), dict)
    except ValueError:
        return False


def _prompt(line: str, where: str) -> str:
    try:
        document = decode_json(line.encode())
    except ValueError as error:
        raise EngineError(f"is not JSON ({error})", where=where, remedy=_expected()) from error
    prompt = document.get(_FIELD) if isinstance(document, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise EngineError(f"has no text {_FIELD!r}", where=where, remedy=_expected())
    return prompt


def _expected() -> str:
    return 'write an object a line: {"prompt": "I am"}'
