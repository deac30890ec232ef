"""Texts of one kind, as calibration and evaluation take them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SHIPPED = Path(__file__).parent / "texts"
"""The texts that come with msquant; `texts/README.md` says where each is from."""


@dataclass(frozen=True)
class Domain:
    """Texts of one kind.

    Attributes:
        name: of the kind, for messages and the manifest.
        weight: its share of the samples, relative to the other domains' weights.
        texts: the documents, in a fixed order.
        rendered: whether a chat template wrote them, special tokens and all; nothing is put before such a
            document, and samples begin where one begins.
        encoded: the documents as token ids, int32, in place of texts; nothing is put before them either.
    """

    name: str
    weight: float
    texts: list[str]
    rendered: bool = False
    encoded: Sequence[NDArray[np.int32]] = field(default=(), compare=False)
