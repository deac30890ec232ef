"""Which files of a dataset are of one configuration and one split: of a hub's repository or a folder.

The rules are those of `datasets` (docs, "Structure your repository"): the README's `configs` name the files;
without them a split is a word of a file's path, and all else is `train`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from msquant.errors import CalibrationError

READERS = {
    ".txt": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
"""The builder of `datasets` for each kind of file; a `.gz` behind it is unpacked."""

_SPLITS = {
    "train": "train|training",
    "validation": "validation|valid|val|dev",
    "test": "test|testing|eval|evaluation",
}
_WORD = "(?:^|[^a-z])(?:{})(?:[^a-z]|$)"
_SHARD = re.compile(r"(?:^|/)(\w+(?:\.\w+)*)-\d{5}-of-\d{5}\.")
_CARD = re.compile(r"\A---\s*\n(.*?)\n---", re.S)


@dataclass(frozen=True)
class DataFiles:
    """Files of one configuration and split.

    Attributes:
        reader: the builder of `datasets` that reads them.
        paths: as they are listed, sorted.
        split: the split's name.
        note: what was left open and how it was decided, for people; empty if nothing was.
    """

    reader: str
    paths: tuple[str, ...]
    split: str
    note: str = ""


def reader_of(path: str) -> str | None:
    """The builder of `datasets` for a file, by its name; None if it is no data."""
    name = PurePosixPath(path.removesuffix(".gz"))
    return READERS.get(name.suffix.lower())


def card_configs(readme: str) -> list[Mapping[str, Any]]:
    """The `configs` in the front matter of a dataset's README; none if it has no such thing."""
    found = _CARD.match(readme)
    try:
        card = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:
        return []
    configs = card.get("configs") if isinstance(card, dict) else None
    return [each for each in configs if isinstance(each, dict)] if isinstance(configs, list) else []


def choose_data_files(
    paths: Sequence[str],
    configs: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    where: str,
) -> DataFiles:
    """Choose the files of what a source's name says behind the dataset.

    Args:
        paths: of all files, with `/`.
        configs: from `card_configs`.
        names: a configuration, a split, or both in this order; empty ones are not said.
        where: the source, for messages.

    Raises:
        CalibrationError: there is no data, or no such configuration or split, or which one is not said.
    """
    data = sorted(path for path in paths if reader_of(path) and not _is_hidden(path))
    config, split = (*names, "", "")[:2]
    known = [str(each.get("config_name", "default")) for each in configs]
    folders = sorted({path.split("/")[0] for path in data if "/" in path})
    if len(names) == 1 and config not in (known or folders):
        config, split = "", config
    note = ""
    if configs:
        config = _choose_config(configs, known, config, where)
        entry = configs[known.index(config)]
        try:
            splits = _listed(entry, data)
        # Whoever wrote the README may have written anything there.
        except (AttributeError, TypeError, ValueError, re.error) as error:
            raise CalibrationError(
                f"the README's data files of the configuration {config!r} cannot be understood ({error})",
                where=where,
                remedy="download the dataset, and name the files that are wanted",
            ) from error
    else:
        if config and config not in folders:
            raise _unknown("configuration", config, folders, where)
        splits = _by_words([path for path in data if not config or path.startswith(f"{config}/")])
    splits = {name: files for name, files in splits.items() if files}
    if not splits:
        raise CalibrationError(
            "the dataset holds no file that can be read",
            where=where,
            remedy=f"give one with files of the kinds {', '.join(READERS)}; datasets that are a script are "
            "not run",
        )
    if split and split not in splits:
        raise _unknown("split", split, list(splits), where)
    if not split:
        split = "train" if "train" in splits else next(iter(splits))
        if len(splits) > 1:
            note = f"{where}: split {split} of {', '.join(splits)}"
    files = splits[split]
    readers = [str(reader_of(path)) for path in files]
    reader = max(dict.fromkeys(readers), key=readers.count)
    chosen = tuple(path for path in files if reader_of(path) == reader)
    return DataFiles(reader, chosen, split, note)


def _choose_config(configs: Sequence[Mapping[str, Any]], known: list[str], config: str, where: str) -> str:
    if config:
        if config not in known:
            raise _unknown("configuration", config, known, where)
        return config
    marked = [name for name, each in zip(known, configs, strict=True) if each.get("default") is True]
    for name in (*marked, "default"):
        if name in known:
            return name
    if len(known) > 1:
        raise CalibrationError(
            "the dataset has several configurations, and which one is not said",
            where=where,
            remedy=f"name one behind it with a colon: {', '.join(known[:20])}",
        )
    return known[0]


def _listed(entry: Mapping[str, Any], data: Sequence[str]) -> dict[str, list[str]]:
    """Files by split, as a README names them: patterns, or a list of them, or such for every split."""
    folder = str(entry.get("data_dir", "")).strip("/")
    files, base = entry.get("data_files"), f"{folder}/" if folder else ""
    if files is None:
        return _by_words([path for path in data if path.startswith(base)])
    if isinstance(files, str) or (isinstance(files, list) and all(isinstance(each, str) for each in files)):
        return {"train": _matching(files, base, data)}
    pairs = files.items() if isinstance(files, dict) else [(f.get("split"), f.get("path")) for f in files]
    return {str(split): _matching(patterns, base, data) for split, patterns in pairs}


def _matching(patterns: Any, base: str, data: Sequence[str]) -> list[str]:
    from fsspec.utils import glob_translate

    wanted = [str(each) for each in (patterns if isinstance(patterns, list) else [patterns])]
    shapes = [re.compile(glob_translate(base + pattern.removeprefix("./"))) for pattern in wanted]
    return [path for path in data if any(shape.match(path) for shape in shapes)]


def _by_words(data: Sequence[str]) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {}
    for path in data:
        splits.setdefault(_split_of(path), []).append(path)
    return splits


def _split_of(path: str) -> str:
    if shard := _SHARD.search(path):
        return shard[1]
    lower = path.lower()
    named = (name for name, words in _SPLITS.items() if re.search(_WORD.format(words), lower))
    return next(named, "train")


def _is_hidden(path: str) -> bool:
    name = PurePosixPath(path).name
    return any(part.startswith((".", "__")) for part in path.split("/")) or name in (
        "README.txt",
        "requirements.txt",
        "dataset_infos.json",
        "LICENSE.txt",
    )


def _unknown(what: str, name: str, known: Sequence[str], where: str) -> CalibrationError:
    return CalibrationError(
        f"there is no {what} {name!r}; there is {', '.join(known[:20]) or 'none'}",
        where=where,
        remedy="name it behind the dataset: SOURCE:CONFIGURATION:SPLIT, either may be left out",
    )
