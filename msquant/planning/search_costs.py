"""What the searches cost in one decoder layer: `osl.py` and `clip.py`, or `held_out.py`."""

from math import ceil

from msquant.algorithms.base import Algorithm
from msquant.planning.blocks import LayerBlocks, Linear, Tokens, weights_of
from msquant.planning.work import Work

SEARCH_TOKENS = 512
"""Inputs that the clip search keeps, as in `quantization/clip.py`."""

HELD_OUT_TOKENS = 1024
"""Inputs that candidates of osl-robust are compared on, as in `quantization/held_out.py`."""

STATIC_PARTS, PER_TOKEN_PARTS = 2, 4
"""Parts of the samples that candidates are compared on, each with the ranges of the others, likewise."""

# Of the candidates of a group, how many are computed beyond the first batch: measured on SmolLM2-135M.
SURVIVORS = 9

# Python and operator dispatch, measured on tiny models: seconds.
EVALUATION_SECONDS = 0.01
CANDIDATE_SECONDS = 0.001


def search_work(blocks: LayerBlocks, tokens: Tokens, scores: int) -> Work:
    """All searches of a layer's golden-stick block.

    Args:
        blocks: the layer.
        tokens: the calibration tokens.
        scores: of attention, for all tokens.
    """
    total, policy = Work(), blocks.policy
    for place, group in enumerate(blocks.groups):
        if policy.algorithm == "osl" and group[0].scheme.is_static:
            total += _search(blocks, place, tokens, scores)
        elif policy.algorithm == "osl-robust" and group[0].scheme.inputs is not None:
            total += _held_out_search(policy, group, tokens)
    for linear in blocks.searched:
        if policy.algorithm == "osl" and linear.scheme.is_static:
            total += _clip(linear, tokens.count, len(policy.weight_clip_ratio))
    return total


def _search(blocks: LayerBlocks, place: int, tokens: Tokens, scores: int) -> Work:
    """One group: every candidate on the first batch, few on the others."""
    candidates, group = len(blocks.policy.smooth_alpha), blocks.groups[place]
    later = min(SURVIVORS, candidates) if tokens.batches > 1 else 0
    evaluations = candidates + later * (tokens.batches - 1)
    batch = tokens.count / tokens.batches
    rest = sum(weights_of(linears) for linears in blocks.groups[place:])
    return Work(
        products=evaluations * 2 * batch * rest,
        streamed=evaluations * rest,
        scores=evaluations * scores / tokens.batches if blocks.attends[place] else 0,
        rounded=(candidates + later) * weights_of(group),
        inputs=evaluations * batch * group[0].columns,
        seconds=evaluations * EVALUATION_SECONDS,
    )


def _held_out_search(policy: Algorithm, group: list[Linear], tokens: Tokens) -> Work:
    """One group: every candidate on each part of the samples."""
    parts = min(tokens.samples, PER_TOKEN_PARTS if group[0].scheme.is_dynamic else STATIC_PARTS)
    candidates = len(policy.smooth_alpha) + 2 * (len(policy.range_floor) - 1)
    kept, weights = min(tokens.count, HELD_OUT_TOKENS), weights_of(group)
    return Work(
        products=(candidates + 1) * 2 * kept * weights,
        streamed=(parts * candidates + 1) * weights,
        rounded=parts * candidates * weights,
        inputs=candidates * kept * group[0].columns,
        seconds=parts * candidates * CANDIDATE_SECONDS,
    )


def _clip(linear: Linear, tokens: int, ratios: int) -> Work:
    kept = ceil(tokens / max(1, tokens // SEARCH_TOKENS))
    rank = min(kept, linear.columns)
    # The Gram matrix, and its eigenvectors in float64 at the cost of some ten products of its size.
    root = 2 * kept * linear.columns**2 + 20 * linear.columns**3 if kept > linear.columns else 0
    products = ratios * 2 * linear.size * rank + root
    return Work(products=products, streamed=ratios * linear.size, rounded=ratios * linear.size)
