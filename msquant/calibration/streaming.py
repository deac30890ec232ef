"""Rows of data files by the `datasets` library, read in place and only as far as they are wanted."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from msquant.calibration.data_files import DataFiles
from msquant.calibration.rows import RowText
from msquant.checkpoint.json_file import decode_json
from msquant.errors import CalibrationError, MsquantError

# Ten thousand samples of 1,024 tokens are about 30 million characters of English.
MAX_CHARACTERS = 32_000_000

_FILES = 8
"""So many files of a larger source are opened, at most."""
_BATCH_ROWS = 64
_BUFFER = 1 << 20


def stream_texts(
    files: DataFiles,
    addresses: Sequence[str],
    sizes: Sequence[int],
    rows: RowText,
    where: str,
    characters: int,
    seed: int,
) -> tuple[list[str], bool]:
    """The texts of a source's first rows, or of rows at random places where it is larger than what is wanted.

    Args:
        files: what they are.
        addresses: paths, or whatever fsspec opens, one a file.
        sizes: bytes of each.
        rows: makes texts of rows.
        where: the source, for messages.
        characters: so many are read.
        seed: of the files and the row groups of a larger source.

    Returns:
        The texts that are not blank, and whether a chat template wrote them.

    Raises:
        CalibrationError: a file cannot be read, a row is no text, or there is no text.
        HubError: a hub refuses.
    """
    if not any(sizes):
        raise _empty(where)
    texts: list[str] = []
    kinds: set[bool] = set()
    total = 0
    number = 0
    try:
        for number, row in enumerate(_rows(files, addresses, sizes, 2 * characters, seed), 1):
            text, rendered = rows.text(row, number, f"{where}, row {number}")
            if text.strip():
                texts.append(text)
                kinds.add(rendered)
                total += len(text)
            if total >= characters:
                break
    except MsquantError:
        raise
    # The readers raise ArrowInvalid, UnicodeDecodeError, ValueError and errors of datasets' own.
    except Exception as error:
        raise _unreadable(files, addresses, where, number, error) from error
    if not texts:
        raise _empty(where)
    if len(kinds) > 1:
        raise CalibrationError(
            "some rows are conversations and some are not",
            where=where,
            remedy="say how every row becomes text with --template, or --no-chat-template",
        )
    return texts, kinds.pop()


def _rows(
    files: DataFiles, addresses: Sequence[str], sizes: Sequence[int], limit: int, seed: int
) -> Iterator[dict[str, Any]]:
    import datasets

    # Off, because load_dataset reports to a server what it loads, local files included.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    larger = sum(sizes) > limit
    if larger and len(addresses) > _FILES:
        addresses = [addresses[i] for i in sorted(random.Random(seed).sample(range(len(addresses)), _FILES))]
    # Streaming reads the files in place: no converted copy is made, and none can be out of date.
    data = datasets.load_dataset(
        files.reader,
        data_files={"train": list(addresses)},
        split="train",
        streaming=True,
        **_options(files, larger),
    )
    if not larger:
        yield from data
        return
    # The row groups of a parquet file are shards of their own then.
    data = data.reshard()
    order = random.Random(seed).sample(range(data.num_shards), data.num_shards)
    for index in order:
        yield from data.shard(num_shards=data.num_shards, index=index)


def _options(files: DataFiles, larger: bool) -> dict[str, Any]:
    """What the builder of `datasets` is told."""
    if files.reader == "text":
        return {"sample_by": "paragraph" if larger else "document"}
    if files.reader == "csv":
        tabs = files.paths[0].removesuffix(".gz").lower().endswith(".tsv")
        return {"sep": "\t" if tabs else ",", "keep_default_na": False}
    if files.reader == "parquet":
        import pyarrow.dataset

        # Otherwise a whole row group, which may have gigabytes, is read before its first row.
        scan = pyarrow.dataset.ParquetFragmentScanOptions(
            use_buffered_stream=True, buffer_size=_BUFFER, pre_buffer=False
        )
        return {"batch_size": _BATCH_ROWS, "fragment_scan_options": scan}
    return {}


def _empty(where: str) -> CalibrationError:
    return CalibrationError("holds no text", where=where, remedy="give a source with some text in it")


def _unreadable(
    files: DataFiles, addresses: Sequence[str], where: str, number: int, error: Exception
) -> CalibrationError:
    """Say where a file is damaged: the readers of `datasets` do not."""
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    for address in addresses:
        path = Path(address)
        if files.reader in ("text", "json", "csv") and path.is_file():
            _check_lines(path, as_json=files.reader == "json" and path.suffix != ".json")
    after = f", after row {number}" if number else ""
    return CalibrationError(
        f"cannot be read as {files.reader}{after} ({reason})",
        where=where,
        remedy="check that all its files have the same columns and are UTF-8",
    )


def _check_lines(path: Path, as_json: bool) -> None:
    """Raise CalibrationError for the first line that is not UTF-8, or no JSON object."""
    number = 0
    try:
        with path.open("rb") as lines:
            for line in lines:
                number += 1
                line.decode("utf-8")
                if as_json and line.strip() and not isinstance(decode_json(line), dict):
                    raise ValueError("not a JSON object")
    except UnicodeDecodeError as reason:
        raise CalibrationError(
            f"not UTF-8 text ({reason.reason})",
            where=f"{path}, line {number}",
            remedy="save the file as UTF-8 text",
        ) from reason
    except ValueError as reason:
        raise CalibrationError(
            f"not a JSON object ({reason})",
            where=f"{path}, line {number}",
            remedy='every line must be one JSON object, for example {"text": "..."}',
        ) from reason
    except OSError:
        pass
