"""Counts of the work of a decoder layer, by which the time of one says the time of another."""

from dataclasses import dataclass
from math import ceil

from msquant.models.config import ModelConfig
from msquant.planning.blocks import LayerBlocks, Tokens, weights_of


@dataclass(frozen=True)
class Work:
    """What a part of a run does, whatever the algorithm.

    Attributes:
        pieces: blocks that are handled one after the other, a decoder layer's or an expert.
        weights: that are handled. Reading, converting, rounding and writing them takes time by their number.
        products: multiply-adds that calibration or evaluation tokens cause in one pass over them.
    """

    pieces: int
    weights: int
    products: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.pieces + other.pieces, self.weights + other.weights, self.products + other.products)


def layer_work(blocks: LayerBlocks, tokens: int, rounds: int = 1) -> tuple[Work, Work]:
    """The work of what is quantized together in a decoder layer, and of what then goes one by one.

    Args:
        blocks: the layer.
        tokens: that go through it.
        rounds: how often the blocks that go one by one are read to be computed; once more to be quantized.
    """
    together, apart = weights_of(blocks.searched), weights_of(blocks.streamed)
    routed = weights_of(
        linear for name, block in blocks.inner.items() if ".experts." in name for linear in block
    )
    # Of the weights that go one by one, those that a token meets.
    met = apart - routed + (routed * blocks.config.experts_per_token // blocks.experts if routed else 0)
    return (
        Work(1, together, tokens * together),
        Work(len(blocks.inner), apart * (rounds + 1) // 2, tokens * met),
    )


def feed_forward_rounds(config: ModelConfig, tokens: Tokens, memory_budget: int) -> int:
    """How often the experts are read for their outputs: once for as many batches as the budget holds."""
    batch = 3 * 4 * tokens.first * config.hidden_size
    return ceil(tokens.batches / max(1, memory_budget // batch))
