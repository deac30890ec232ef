"""Prompts from a file: one a line, or JSON Lines."""

import json
import sys
from pathlib import Path

from msquant.errors import EngineError

STANDARD_INPUT = Path("-")
_FIELD = "prompt"


def read_prompts(path: Path) -> list[str]:
    """Read one prompt a line; empty lines are left out.

    A file that is called .jsonl, or whose first line is a JSON object, holds an object with a `prompt` in
    each line: that is how a prompt of several lines is written.

    Args:
        path: the file, or `-` for standard input.

    Raises:
        EngineError: the file cannot be read, is not UTF-8 text, holds no prompt, or a line is not what the
            others are; names the line.
    """
    where = "standard input" if path == STANDARD_INPUT else str(path)
    try:
        data = sys.stdin.buffer.read() if path == STANDARD_INPUT else path.expanduser().read_bytes()
    except OSError as error:
        raise EngineError(
            f"the file of prompts cannot be read ({error.strerror})", where=where, remedy="check its name"
        ) from error
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
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _prompt(line: str, where: str) -> str:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise EngineError(f"is not JSON ({error})", where=where, remedy=_expected()) from error
    prompt = document.get(_FIELD) if isinstance(document, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise EngineError(f"has no text {_FIELD!r}", where=where, remedy=_expected())
    return prompt


def _expected() -> str:
    return 'write an object a line: {"prompt": "I am"}'
