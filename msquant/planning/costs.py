"""What quantizing a model takes: the work of one decoder layer in counts.

The counts follow the code in `quantization/`: `decoder_pass.py` says which block is computed how often,
`feed_forward.py` what each expert does; the searches are in `search_costs.py`. Divided by the rates
of a machine they give seconds.
"""

from collections.abc import Iterable, Mapping
from math import ceil, prod

from msquant.models.config import ModelConfig
from msquant.planning.blocks import LayerBlocks, Tokens, weights_of
from msquant.planning.search_costs import search_work
from msquant.planning.work import Work

# Floating-point passes of golden-stick's block: one in each of three modules, and the one that keeps what
# the search starts from.
FLOAT_PASSES = 4

# Python, operator dispatch and garbage collection, measured on tiny models: seconds.
LAYER_SECONDS = 0.5
EXPERT_SECONDS = 0.02

START_SECONDS = 8.0
"""Loading MindSpore and golden-stick, once a run."""


def feed_forward_rounds(config: ModelConfig, tokens: Tokens, memory_budget: int) -> int:
    """How often the experts are read for their outputs: once for as many batches as the budget holds."""
    batch = 3 * 4 * tokens.first * config.hidden_size
    return ceil(tokens.batches / max(1, memory_budget // batch))


def layer_work(
    blocks: LayerBlocks, tokens: Tokens, source: Mapping[str, int], written: int, memory_budget: int
) -> Work:
    """All that is done to a layer.

    Args:
        blocks: the layer.
        tokens: the calibration tokens.
        source: bytes of each of its tensors as it is stored.
        written: bytes of its shards.
        memory_budget: bytes of hidden states held in memory.
    """
    inner = sum(n for name, n in source.items() if ".mlp." in name) if blocks.inner else 0
    work = Work(read=sum(source.values()) - inner, written=written, seconds=LAYER_SECONDS)
    work += _golden_stick(blocks, tokens)
    if blocks.inner:
        rounds = feed_forward_rounds(blocks.config, tokens, memory_budget)
        work += _feed_forward(blocks, tokens, inner, rounds)
    return work


def carried_work(source_bytes: int, shapes: Iterable[tuple[int, ...]], written: int) -> Work:
    """The work of tensors that are read, converted and written as they are."""
    return Work(read=source_bytes, converted=2 * sum(map(prod, shapes)), written=written)


def _golden_stick(blocks: LayerBlocks, tokens: Tokens) -> Work:
    weights = weights_of(blocks.searched)
    scores = tokens.count * tokens.length * blocks.config.num_attention_heads
    total = Work(
        converted=weights,
        products=FLOAT_PASSES * 2 * tokens.count * weights,
        streamed=FLOAT_PASSES * tokens.batches * weights,
        scores=FLOAT_PASSES * scores,
    )
    total += search_work(blocks, tokens, scores)
    quantized = weights_of(linear for linear in blocks.searched if not linear.scheme.is_float)
    # The quantized block is computed once, for the first batch, from weights in float32 again.
    once = 2 * tokens.first * weights
    return total + Work(quantized=quantized, converted=quantized, products=once, streamed=weights)


def _feed_forward(blocks: LayerBlocks, tokens: Tokens, source_bytes: int, rounds: int) -> Work:
    """Read once for each round of tokens, and once more to be quantized."""
    weights = weights_of(blocks.streamed)
    quantized = weights_of(linear for linear in blocks.streamed if not linear.scheme.is_float)
    routed = weights_of(
        linear for name, block in blocks.inner.items() if ".experts." in name for linear in block
    )
    # Of the weights, those that a token meets.
    met = weights - routed + (routed * blocks.config.experts_per_token // blocks.experts if routed else 0)
    return Work(
        read=(rounds + 1) * source_bytes,
        # The quantized block is computed from weights in float32 again.
        converted=(rounds + 1) * weights + quantized,
        products=2 * (tokens.count + tokens.first) * met,
        streamed=(rounds + 1) * weights,
        quantized=quantized,
        seconds=(rounds + 1) * len(blocks.inner) * EXPERT_SECONDS,
    )
