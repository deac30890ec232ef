"""The work of the short evaluation: two models in lockstep, as `evaluation/lockstep.py` has it."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from msquant.evaluation.settings import EvaluationSettings
from msquant.models.config import ModelConfig
from msquant.planning.blocks import LayerBlocks, weights_of
from msquant.planning.costs import EXPERT_SECONDS
from msquant.planning.work import Work

TEXTS = 4
"""Builtin texts that are evaluated on."""

BATCH_TOKENS, WIDE_BATCH_TOKENS, WIDE, OWN_TOKENS = 2048, 512, 2048, 512
"""Of `evaluation/lockstep.py`, which loads MindSpore; a test holds them to it."""

# The float model, and what was written.
MODELS = 2

# Python, operator dispatch and files of a layer in one model, measured on SmolLM2-135M.
LAYER_SECONDS = 0.2

# Of a logit in one model: float64, the greatest, the exponentials, their sum, and the divergence's terms.
LOGIT_VALUES = 6


@dataclass(frozen=True)
class EvaluationTokens:
    """The tokens of the builtin texts.

    Attributes:
        sequences: windows of each text; 0 if nothing is evaluated.
        length: tokens in each.
        batch: windows that a decoder layer computes together.
    """

    sequences: int
    length: int
    batch: int

    @classmethod
    def of(cls, settings: EvaluationSettings, config: ModelConfig) -> "EvaluationTokens":
        """As the recipe and the model have it."""
        length = min(settings.sequence_length, config.max_position_embeddings)
        most = WIDE_BATCH_TOKENS if config.hidden_size >= WIDE else BATCH_TOKENS
        return cls(settings.sequences, length, max(1, most // length))

    @property
    def count(self) -> int:
        """Of all texts."""
        return TEXTS * self.sequences * self.length

    @property
    def own(self) -> int:
        """That go through every quantized layer once more, from the float model's inputs."""
        return TEXTS * min(self.length, OWN_TOKENS // TEXTS) if self.sequences else 0

    @property
    def passes(self) -> int:
        """Batches that both models compute, and what the quantized one computes of its own."""
        return TEXTS * (MODELS * ceil(self.sequences / self.batch) + 1) if self.sequences else 0


def evaluation_work(
    blocks: LayerBlocks, tokens: EvaluationTokens, source: Mapping[str, int], written: int
) -> Work:
    """All that is done to a decoder layer.

    Args:
        blocks: the layer.
        tokens: that are evaluated on.
        source: bytes of each of its tensors as it is stored.
        written: bytes of its shards in the first format.
    """
    if not tokens.count:
        return Work()
    config, together = blocks.config, weights_of(blocks.searched)
    routed = sum(weights_of(block) for name, block in blocks.inner.items() if ".experts." in name)
    shared = together + weights_of(blocks.streamed) - routed
    met = shared + (routed * config.experts_per_token // blocks.experts if routed else 0)
    computed = MODELS * tokens.count + tokens.own
    return Work(
        read=sum(source.values()) + written,
        converted=MODELS * (shared + routed),
        products=2 * computed * met,
        streamed=tokens.passes * shared + MODELS * routed,
        scores=computed * tokens.length * config.num_attention_heads,
        seconds=MODELS * (LAYER_SECONDS + EXPERT_SECONDS * blocks.experts),
    )


def head_work(config: ModelConfig, tokens: EvaluationTokens, source: int) -> Work:
    """Of the output head, which stays in floating point, and of the distributions that come out.

    Args:
        config: the model's shape.
        tokens: that are evaluated on.
        source: bytes of the head as it is stored.
    """
    if not tokens.count:
        return Work()
    weights = config.vocab_size * config.hidden_size
    return Work(
        read=MODELS * source,
        converted=MODELS * (weights + LOGIT_VALUES * tokens.count * config.vocab_size),
        products=MODELS * 2 * tokens.count * weights,
        streamed=MODELS * weights,
    )
