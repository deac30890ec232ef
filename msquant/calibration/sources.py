"""Where calibration and evaluation texts come from, by the words that recipes and options use.

`builtin[:DOMAIN]`, a local file or folder, `hf:ORG/NAME[@REVISION][:CONFIG][:SPLIT]`, `modelers:...`, the
short names of `known_sets`, and `self`; behind each `=SHARE` for a mix.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from msquant.calibration.builtin import WEIGHTS, calibration_domains
from msquant.calibration.data_files import READERS, DataFiles, card_configs, choose_data_files, reader_of
from msquant.calibration.domains import Domain
from msquant.calibration.known_sets import KNOWN_SETS
from msquant.calibration.rows import Exchange, RowText, Template
from msquant.calibration.streaming import MAX_CHARACTERS, stream_texts
from msquant.checkpoint.cache import cache_folder
from msquant.checkpoint.download_marker import DownloadMarker
from msquant.errors import CalibrationError, HubError
from msquant.hub.names import is_hub_id

BUILTIN = "builtin"
SELF = "self"
NO_TEXT = "none"
"""Of a calibration without text: weights are rounded to nearest, by the names of tensors alone."""

HUBS = {"hf": "huggingface", "modelers": "modelers"}
"""The prefixes of sources on a hub, and the hubs' names."""

_SHARE = re.compile(r"(.+)=(\d+(?:\.\d+)?)(%?)", re.S)
_MAX_CARD = 1 << 20


@dataclass(frozen=True)
class Reading:
    """How sources are to be read.

    Attributes:
        template: of a row, in place of the columns that are known.
        tokenizer: whose chat template conversations go through; None for plain text.
        characters: of a larger source so many are read, and no more.
        seed: of the places in a larger source that are read.
        offline: whether no hub may be asked.
        note: called with what was decided in passing.
        generate: lets the model itself write so many samples, and gives their token ids, int32.
    """

    template: Template | None = None
    tokenizer: Any = None
    characters: int = MAX_CHARACTERS
    seed: int = 0
    offline: bool = False
    note: Callable[[str], None] = lambda text: None
    generate: Callable[[int], list[NDArray[np.int32]]] | None = None

    def rows(self, template: Template | Exchange | None = None) -> RowText:
        """What makes texts of rows; the option's template goes before the dataset's own."""
        return RowText(self.template or template, self.tokenizer)


PLAIN = Reading()
"""Conversations as plain text, no hub asked but where a source names one."""


@dataclass(frozen=True)
class SourceTexts:
    """What came of a source.

    Attributes:
        domains: its texts; a dataset has one domain.
        record: where they are from, for the manifest; without paths of this machine.
    """

    domains: list[Domain]
    record: dict[str, str] = field(default_factory=dict)


class Place:
    """Where a source's texts are.

    Attributes:
        writes: whether the model writes them itself, with all of its weights in memory.
    """

    writes: ClassVar[bool] = False

    def require(self, word: str) -> None:
        """Check what can be checked before any work. Raises CalibrationError."""

    def read(self, word: str, reading: Reading, count: int) -> SourceTexts:
        """Its texts.

        Args:
            word: the source as it was given, for messages.
            reading: how.
            count: the samples that are wanted of it, at most.

        Raises:
            CalibrationError: it is missing, unreadable or holds no text.
            HubError: its hub refuses.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Source:
    """One entry of a mix.

    Attributes:
        word: as it was given, without the share.
        place: where the texts are.
        count: how many samples it gives; None for a share of what the others leave.
        weight: that share, relative to the other sources' weights.
    """

    word: str
    place: Place
    count: int | None = None
    weight: float = 1.0


def parse_source(word: str) -> Source:
    """A source from the word that names it; nothing is read but whether a local path exists.

    Raises:
        CalibrationError: the word names none.
    """
    share = None if Path(word).expanduser().exists() else _SHARE.fullmatch(word)
    if share is None:
        return _find(word)
    source, number, percent = _find(share[1]), share[2], share[3]
    if percent or "." in number:
        weight = float(number) / (100 if percent else 1)
        if not weight:
            raise CalibrationError("the share is 0", where=word, remedy="leave the source out")
        return replace(source, weight=weight)
    if not int(number):
        raise CalibrationError("the count is 0", where=word, remedy="leave the source out")
    return replace(source, count=int(number))


def is_local(word: str) -> bool:
    """Whether a source is a path of this machine, or none that is known; such a word is not published."""
    if word == NO_TEXT:
        return False
    try:
        return isinstance(parse_source(word).place, _LocalData)
    except CalibrationError:
        return True


def load_texts(source: str, reading: Reading = PLAIN) -> list[Domain]:
    """The texts of one source, as evaluation takes them. Raises as `Place.read`."""
    found = parse_source(source)
    return found.place.read(found.word, reading, found.count or 0).domains


def _find(word: str) -> Source:
    if not word.strip():
        raise CalibrationError("no source is named", where="calibration", remedy=_known_words())
    first, _, rest = word.partition(":")
    if first == BUILTIN:
        return Source(word, _Builtin(rest or None))
    if first == SELF:
        if rest and not (rest.isdigit() and int(rest)):
            raise CalibrationError(
                f"{rest!r} is no number of samples", where=word, remedy=f"write {SELF} or {SELF}:16"
            )
        return Source(word, _OwnWords(), count=int(rest) if rest else None)
    if first in HUBS:
        return Source(word, _on_hub(word, first, rest))
    if known := KNOWN_SETS.get(first):
        place = _on_hub(known.word, *known.word.split(":", 1))
        names = tuple(rest.split(":")) if rest else place.names
        return Source(word, replace(place, names=names, template=known.template, licence=known.licence))
    return Source(word, _local(word))


@dataclass(frozen=True)
class _Builtin(Place):
    """The mix that comes with msquant, or one domain of it."""

    domain: str | None

    def require(self, word: str) -> None:
        if self.domain is not None and self.domain not in WEIGHTS:
            raise CalibrationError(
                f"there is no domain {self.domain!r} in the builtin text",
                where=word,
                remedy=f"use one of {', '.join(WEIGHTS)}",
            )

    def read(self, word: str, reading: Reading, count: int) -> SourceTexts:
        self.require(word)
        # Not by the option's template, which is for the rows of the other sources.
        domains = calibration_domains(RowText(tokenizer=reading.tokenizer))
        return SourceTexts([domain for domain in domains if self.domain in (None, domain.name)])


@dataclass(frozen=True)
class _OwnWords(Place):
    """What the float model itself writes."""

    writes: ClassVar[bool] = True

    def read(self, word: str, reading: Reading, count: int) -> SourceTexts:
        if reading.generate is None:
            raise CalibrationError(
                "the model's own words are for calibration alone", where=word, remedy="name another source"
            )
        return SourceTexts([Domain(SELF, 1, [], encoded=reading.generate(count))])


@dataclass(frozen=True)
class _LocalData(Place):
    """A file, or a folder of files that is laid out like a dataset's repository.

    Attributes:
        path: of it.
        names: configuration and split, of a folder.
    """

    path: Path
    names: tuple[str, ...] = ()

    def require(self, word: str) -> None:
        if not self.path.exists():
            raise CalibrationError("no such file, folder or dataset", where=word, remedy=_known_words())
        if not (self.path.is_dir() or self.path.is_file()):
            raise CalibrationError("is neither a file nor a folder", where=word, remedy=_known_words())
        if self.path.is_file() and reader_of(self.path.name) is None:
            raise CalibrationError(
                f"text cannot be read from a {self.path.suffix or 'file without an extension'}",
                where=self.path,
                remedy=f"give a file of the kinds {', '.join(READERS)}, or a folder of such",
            )

    def read(self, word: str, reading: Reading, count: int) -> SourceTexts:
        self.require(word)
        return SourceTexts([self.domain(word, reading, reading.rows())])

    def domain(self, word: str, reading: Reading, rows: RowText) -> Domain:
        """Its texts, by these rules for rows."""
        if self.path.is_file():
            reader = reader_of(self.path.name)
            assert reader is not None
            files = DataFiles(reader, (str(self.path),), "train")
        else:
            names = [p.relative_to(self.path).as_posix() for p in sorted(self.path.rglob("*")) if p.is_file()]
            card = self.path / "README.md"
            readme = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
            files = choose_data_files(names, card_configs(readme), self.names, word)
            files = replace(files, paths=tuple(str(self.path / name) for name in files.paths))
        if files.note:
            reading.note(files.note)
        sizes = [Path(path).stat().st_size for path in files.paths]
        addresses = [str(Path(path).resolve()) for path in files.paths]
        texts, rendered = stream_texts(
            files, addresses, sizes, rows, str(self.path), reading.characters, reading.seed
        )
        return Domain(self.path.name, 1, texts, rendered)


@dataclass(frozen=True)
class _HubData(Place):
    """A dataset on a hub, of which parts are read in place.

    Attributes:
        hub: `huggingface` or `modelers`.
        repository: `organisation/name`.
        revision: a branch, a tag or a commit.
        names: configuration and split.
        template: of a row, where the columns are not known by themselves.
        licence: as the table of known sets has it.
    """

    hub: str
    repository: str
    revision: str
    names: tuple[str, ...] = ()
    template: Template | Exchange | None = None
    licence: str | None = None

    def read(self, word: str, reading: Reading, count: int) -> SourceTexts:
        rows = reading.rows(self.template)
        copy = cache_folder() / "datasets" / self.repository
        if reading.offline:
            if not copy.is_dir():
                raise self._not_here(word, copy, "downloads are switched off")
            return self._copy(word, copy, reading, rows)
        from msquant.hub.retry import UnreachableError

        try:
            return self._stream(word, reading, rows)
        except UnreachableError as error:
            if copy.is_dir():
                reading.note(f"{word}: {error.what}; taken from {copy}")
                return self._copy(word, copy, reading, rows)
            raise self._not_here(word, copy, error.what) from error
        except HubError as error:
            raise HubError(error.what, where=f"{word} ({error.where})", remedy=error.remedy) from error

    def _stream(self, word: str, reading: Reading, rows: RowText) -> SourceTexts:
        from msquant.hub.choose import find_snapshot
        from msquant.hub.remote_files import read_remote, remote_address

        snapshot = find_snapshot(self.repository, self.revision, self.hub, kind="dataset", note=reading.note)
        sizes = {file.path: file.size for file in snapshot.files}
        card = ""
        if sizes.get("README.md", _MAX_CARD) < _MAX_CARD:
            card = read_remote(snapshot, "README.md").decode(errors="replace")
        files = choose_data_files(list(sizes), card_configs(card), self.names, word)
        if files.note:
            reading.note(files.note)
        texts, rendered = stream_texts(
            files,
            [remote_address(snapshot, path) for path in files.paths],
            [sizes[path] for path in files.paths],
            rows,
            word,
            reading.characters,
            reading.seed,
        )
        domain = Domain(self.repository, 1, texts, rendered)
        return SourceTexts([domain], self._record(snapshot.commit, files.split))

    def _copy(self, word: str, copy: Path, reading: Reading, rows: RowText) -> SourceTexts:
        marker = DownloadMarker.read(copy)
        domain = _LocalData(copy, self.names).domain(word, reading, rows)
        return SourceTexts([domain], self._record(marker.commit if marker else "unknown", ""))

    def _record(self, commit: str, split: str) -> dict[str, str]:
        record = {"repository": self.repository, "hub": self.hub, "commit": commit, "split": split}
        return {key: value for key, value in (record | {"licence": self.licence or ""}).items() if value}

    def _not_here(self, word: str, copy: Path, reason: str) -> CalibrationError:
        revision = "" if self.revision == "main" else f" --revision {self.revision}"
        return CalibrationError(
            f"the dataset is not on this machine, and {reason}",
            where=word,
            remedy=f"where there is a network: msquant download {self.repository} --dataset "
            f"--hub {self.hub}{revision} --output FOLDER; bring FOLDER here as {copy}: "
            "the same source is then read from there",
        )


def _on_hub(word: str, prefix: str, rest: str) -> _HubData:
    place, *names = rest.split(":")
    repository, _, revision = place.partition("@")
    if not is_hub_id(repository) or len(names) > 2:
        raise CalibrationError(
            "names no dataset on a hub",
            where=word,
            remedy=f"write it as {prefix}:ORG/NAME[@REVISION][:CONFIG][:SPLIT]",
        )
    return _HubData(HUBS[prefix], repository, revision or "main", tuple(names))


def _local(word: str) -> _LocalData:
    path = Path(word).expanduser()
    head, *names = word.split(":")
    if not path.exists() and names and Path(head).expanduser().is_dir():
        return _LocalData(Path(head).expanduser(), tuple(names[:2]))
    return _LocalData(path)


def _known_words() -> str:
    sets: Sequence[str] = sorted(KNOWN_SETS)
    return (
        f"give {BUILTIN}, {SELF}, a .txt, .jsonl, .csv or .parquet file or a folder, hf:ORG/NAME, "
        f"modelers:ORG/NAME, or one of {', '.join(sets)}"
    )
