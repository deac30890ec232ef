"""The shape in which calibration text travels: texts of one kind, and how much they count."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Domain:
    """Texts of one kind.

    Attributes:
        name: of the kind, for messages and the manifest.
        weight: its share of the samples, relative to the other domains' weights.
        texts: the documents, in a fixed order.
    """

    name: str
    weight: float
    texts: list[str]
