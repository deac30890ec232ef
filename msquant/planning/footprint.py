"""The memory that quantizing takes at its peak, and what this machine has."""

from math import ceil

from msquant.planning.blocks import LayerBlocks, Tokens, weights_of
from msquant.planning.work import feed_forward_rounds

BASE_BYTES = 800_000_000
"""Of a process that has loaded MindSpore and golden-stick."""

# What allocators keep of what was freed.
SLACK = 1.1

_FLOAT = 4


def layer_bytes(blocks: LayerBlocks, tokens: Tokens, memory_budget: int) -> int:
    """Peak of one decoder layer's weights and activations, without `BASE_BYTES`.

    The two blocks of a layer are never in memory together, so the larger one counts.

    Args:
        blocks: the layer.
        tokens: the calibration tokens.
        memory_budget: bytes of hidden states held in memory.
    """
    hidden = _FLOAT * tokens.count * blocks.config.hidden_size
    attention = _golden_stick(blocks, tokens) + 2 * hidden
    rounds = feed_forward_rounds(blocks.config, tokens, memory_budget)
    feed_forward = _feed_forward(blocks, ceil(tokens.batches / rounds) * tokens.first) if blocks.inner else 0
    return int(SLACK * (max(attention, feed_forward) + min(3 * hidden, memory_budget)))


def _golden_stick(blocks: LayerBlocks, tokens: Tokens) -> int:
    """Without the inputs, of which golden-stick makes two copies."""
    config = blocks.config
    groups = [group for group in blocks.groups if group[0].scheme.is_static]
    # Beside the weights: a candidate of a whole group, or what clipping makes of one linear.
    candidate = max((weights_of(group) for group in groups), default=0)
    clipped = max((2 * linear.size for group in groups for linear in group), default=0)
    # Inputs that golden-stick records, and what our search keeps before each of the layer's steps.
    recorded = sum(linear.columns for group in groups for linear in group)
    states = sum(group[0].columns + config.hidden_size for group in blocks.groups)
    if config.latent is not None:
        states += config.num_attention_heads * config.latent.qk_head_dim
    scores = 4 * tokens.first * tokens.length * config.num_attention_heads
    weights = weights_of(blocks.searched)
    return _FLOAT * (weights + max(candidate, clipped) + tokens.count * (recorded + states) + scores)


def _feed_forward(blocks: LayerBlocks, tokens: int) -> int:
    largest = max(weights_of(block) for block in blocks.inner.values())
    widest = max(linear.size for linear in blocks.streamed)
    # A block that gets all tokens, as a dense one and a shared expert do.
    inner = max(block[0].rows for block in blocks.inner.values())
    # While it is read: all of it, and the largest matrix as it is stored. While it is quantized: one matrix.
    weights = max(largest + widest // 2, 3 * widest)
    return _FLOAT * (weights + tokens * (4 * blocks.config.hidden_size + 3 * inner))
