"""What the JSON file beside the shards says of a folder's tensors, in the formats that have one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from msquant.schemes import FLOAT, MOST_COLUMNS, Scheme

GROUP_SIZE = "group_size"
"""The entry for the columns of a group of int4 weights; 0 where a row has one scale."""


@dataclass(frozen=True)
class Description:
    """What is said of a folder's tensors.

    Attributes:
        tensors: a word such as `W8A8` or `FLOAT` by tensor name.
        entries: everything else, such as `version` and `group_size`.
        words: the words by scheme; one of int4 weights is said of those in groups, too.
    """

    tensors: Mapping[str, str]
    entries: Mapping[str, Any]
    words: Mapping[Scheme, str]

    @property
    def group_size(self) -> int | None:
        """The columns of a group of int4 weights; None where the entry is missing or no such number."""
        found = self.entries.get(GROUP_SIZE)
        return found if type(found) is int and 0 < found <= MOST_COLUMNS else None

    def scheme(self, module: str) -> Scheme | None:
        """The scheme of a layer by its weight's word, floating point if there is none; None if unknown."""
        said = self.tensors.get(f"{module}.weight", self.words[FLOAT])
        scheme = next((scheme for scheme, word in self.words.items() if word == said), None)
        if scheme is None or not scheme.is_int4 or self.group_size is None:
            return scheme
        return scheme.in_groups(self.group_size)
