"""Counts of what is done, and the rates of a machine that divide them into seconds."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Work:
    """How often something is done.

    Attributes:
        read: bytes of shards.
        converted: values made float32, or float32 made something else.
        products: floating-point operations of matrix products, two for a multiplication with its addition.
        streamed: weights that such products read, which binds those of few rows.
        scores: of attention, a query with a key.
        rounded: weights fake-quantized by the searches.
        inputs: values of linears' inputs fake-quantized by the search.
        quantized: weights made int8.
        written: bytes of shards.
        seconds: what depends on no size.
    """

    read: float = 0
    converted: float = 0
    products: float = 0
    streamed: float = 0
    scores: float = 0
    rounded: float = 0
    inputs: float = 0
    quantized: float = 0
    written: float = 0
    seconds: float = 0

    def __add__(self, other: "Work") -> "Work":
        mine, others = asdict(self), asdict(other)
        return Work(**{name: mine[name] + others[name] for name in mine})


@dataclass(frozen=True)
class Rates:
    """How much of each a machine does in a second, in the units of `Work`."""

    read: float
    converted: float
    products: float
    streamed: float
    scores: float
    rounded: float
    inputs: float
    quantized: float
    written: float

    def parts(self, work: Work) -> dict[str, float]:
        """Seconds of every kind of work."""
        counts = asdict(work)
        return {name: counts[name] / rate for name, rate in asdict(self).items()} | {"other": work.seconds}

    def seconds(self, work: Work) -> float:
        """Seconds of all work, one kind after the other."""
        return sum(self.parts(work).values())
