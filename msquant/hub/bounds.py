"""How large a hub's listing may be, held against it before memory or time is spent on what it says."""

import json
from typing import Any

from msquant.checkpoint.disk import shown_sizes
from msquant.errors import HubError

MAX_JSON_BYTES = 8 << 20
"""Of one answer; a page of the Hugging Face Hub is 0.25 MB, a folder of 10,000 files at Modelers 3 MB."""
MAX_JSON_VALUES = 1_000_000
"""Of one answer, as its commas and brackets tell; each takes up to 72 bytes of memory when it is parsed."""
MAX_ANSWERS = 2_000
"""Pages, or folders, of one listing; a model has one of either, or some."""
MAX_ENTRIES = 100_000
"""Files and folders of one listing, all pages together; DeepSeek-R1 has 174."""
MAX_NAME_CHARACTERS = 16_000_000
"""Of all names of one listing together."""
MAX_DEPTH = 32
"""Folders in folders."""
MAX_FILE_BYTES = 1 << 42
"""Of one file: 4 TiB, eight times what the hubs themselves take."""


def require_size(nbytes: int, where: str) -> None:
    """Refuse an answer that has grown too large. Raises HubError."""
    if nbytes > MAX_JSON_BYTES:
        (most,) = shown_sizes(MAX_JSON_BYTES)
        raise HubError(f"the answer is larger than {most}, as no listing is", where=where)


def parse_listing(body: bytearray, title: str, where: str) -> Any:
    """The JSON document that a hub sent.

    Raises:
        HubError: it is none, or holds more values than any listing.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        raise HubError(
            f"the answer holds more than {MAX_JSON_VALUES} values, as no listing does", where=where
        )
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise HubError(
            f"{title} sent something else than JSON",
            where=where,
            remedy="check the address, and whether a proxy asks to log in",
        ) from None


class ListingBounds:
    """Counts what a listing has brought so far; each method raises HubError where it is too much.

    Args:
        where: the repository.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._asked: set[str] = set()
        self._entries = self._characters = 0

    def ask(self, place: str) -> None:
        """A page or a folder is about to be asked for."""
        if place in self._asked:
            raise self._refuse("its pages lead back to one that was there already")
        if len(self._asked) >= MAX_ANSWERS:
            raise self._refuse(f"it has more than {MAX_ANSWERS} pages or folders")
        self._asked.add(place)

    def count(self, path: Any) -> None:
        """An entry has come, of whatever kind; its path is what the hub says it is."""
        self._entries += 1
        if self._entries > MAX_ENTRIES:
            raise self._refuse(f"it has more than {MAX_ENTRIES} entries")
        if isinstance(path, str):
            self._characters += len(path)
            if self._characters > MAX_NAME_CHARACTERS:
                raise self._refuse(f"its names have more than {MAX_NAME_CHARACTERS} characters together")
            if path.count("/") > MAX_DEPTH:
                raise self._refuse(f"its folders are more than {MAX_DEPTH} deep")

    def _refuse(self, why: str) -> HubError:
        return HubError(
            f"the listing is larger than that of any model: {why}",
            where=self._where,
            remedy="do not use this repository, and tell its hub",
        )
