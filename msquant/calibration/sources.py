"""Calibration texts from a source's name: the builtin mix, or a local .txt, .jsonl or .parquet file."""

from pathlib import Path
from typing import Any

from msquant.calibration.builtin import Domain, calibration_domains
from msquant.checkpoint.json_file import decode_json
from msquant.errors import CalibrationError

BUILTIN = "builtin"
TEXT_FIELDS = ("text", "content")
# Ten thousand samples of 1,024 tokens are about 30 million characters of English.
MAX_CHARACTERS = 32_000_000

_READERS = {".txt": "text", ".jsonl": "json", ".parquet": "parquet"}


def load_texts(source: str, *, text_field: str | None = None) -> list[Domain]:
    """Load the texts of a calibration source; nothing is downloaded.

    Args:
        source: `builtin`, or the path of a UTF-8 `.txt` file (one document), of a `.jsonl` file (one JSON
            object a line) or of a `.parquet` file. Of a longer file the first 32 million characters are used.
        text_field: the field or column that holds the text; by default `text` or `content`.

    Returns:
        The domains, of which a file has one. Blank documents are left out.

    Raises:
        CalibrationError: the file is missing, of another kind, unreadable or empty, or has no such field.
    """
    if source == BUILTIN:
        return calibration_domains()
    path = Path(source).expanduser()
    if not path.is_file():
        raise CalibrationError(
            "no such file",
            where=path,
            remedy=f"Give '{BUILTIN}' or the path of a .txt, .jsonl or .parquet file.",
        )
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise CalibrationError(
            f"calibration text cannot be read from a {path.suffix or 'file without an extension'!s}",
            where=path,
            remedy=f"Give one of {', '.join(_READERS)}.",
        )
    texts = _read(path, reader, text_field) if path.stat().st_size else []
    if not texts:
        raise CalibrationError(
            "the file holds no text", where=path, remedy="Give a file with some text in it."
        )
    return [Domain(path.name, 1, texts)]


def _read(path: Path, reader: str, text_field: str | None) -> list[str]:
    import datasets

    # Off, because load_dataset reports to a server what it loads, local files included.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    options = {"sample_by": "document"} if reader == "text" else {}
    texts: list[str] = []
    characters = 0
    try:
        # Streaming reads the file in place: no converted copy is made, and none can be out of date.
        rows = datasets.load_dataset(
            reader, data_files=str(path.resolve()), split="train", streaming=True, **options
        )
        for i, row in enumerate(rows, 1):
            text = _text(row, text_field, where=f"{path}, record {i}")
            if text.strip():
                texts.append(text)
                characters += len(text)
            if characters >= MAX_CHARACTERS:
                break
    except CalibrationError:
        raise
    # The readers raise ArrowInvalid, UnicodeDecodeError, ValueError and errors of datasets' own.
    except Exception as error:
        raise _unreadable(path, reader, error) from error
    return texts


def _text(row: dict[str, Any], text_field: str | None, *, where: str) -> str:
    wanted = (text_field,) if text_field else TEXT_FIELDS
    field = next((name for name in wanted if name in row), None)
    if field is None:
        raise CalibrationError(
            f"there is no field {' or '.join(repr(name) for name in wanted)}; "
            f"the fields are {', '.join(repr(name) for name in row)}",
            where=where,
            remedy="Name the field that holds the text.",
        )
    text = row[field]
    if text is not None and not isinstance(text, str):
        raise CalibrationError(
            f"the field {field!r} holds {type(text).__name__}, not text",
            where=where,
            remedy="Name the field that holds the text.",
        )
    return text or ""


def _unreadable(path: Path, reader: str, error: Exception) -> CalibrationError:
    """Say where the file is damaged: the readers of `datasets` do not."""
    where, what = str(path), f"the file cannot be read as {path.suffix} ({str(error).partition(chr(10))[0]})"
    if reader == "parquet":
        return CalibrationError(what, where=where, remedy="Write the file again.")
    remedy = "Save the file as UTF-8 text."
    number = 0
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                number += 1
                if reader == "json" and line.strip() and not isinstance(decode_json(line.encode()), dict):
                    raise ValueError("not a JSON object")
    except UnicodeDecodeError as reason:
        return CalibrationError(f"not UTF-8 text ({reason.reason})", where=where, remedy=remedy)
    except ValueError as reason:
        return CalibrationError(
            f"not a JSON object ({reason})",
            where=f"{path}, line {number}",
            remedy='Every line must be one JSON object, for example {"text": "..."}.',
        )
    except OSError:
        pass
    return CalibrationError(what, where=where, remedy="Check that every line has the same fields and types.")
