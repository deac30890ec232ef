"""The scales of an int8 key-value cache: one a channel of each head, searched on samples held out.

Keys are cached behind the rotary embedding, which turns the two channels of a pair into each other as
positions go on. What a channel reaches within a calibration sample says little of longer contexts: a slow
pair has hardly begun to turn there. So each key is turned, along the arc that its pair takes from the first
position to the last one that the model has, and what its channels reach on that is measured, least and
greatest: the magnitude of the pair to either side, but for the slowest, which do not come round. Those are
the loudest in large models, and hold all keys on one side of zero, so the middle of what keys reach is moved
to zero; attention does not see that (`CacheScale`). Values are measured channel by channel, around zero.

As in `msquant.algorithms.held_out`, a channel's range is never taken for less than a floor, a quantile of
the ranges in units of what is typical by the weights in front; and the floor, and what all ranges are
widened or narrowed by, are chosen on samples whose ranges were not measured: each half by those of the other.
The loss is the error of what attention adds to the residual stream, relative to the stream, token by token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor
from numpy.typing import NDArray

from msquant.algorithms.held_out import floored, inverse_squares, typical_magnitudes
from msquant.checkpoint.weights import (
    INT8_MAX,
    CacheScale,
    Linear,
    WeightSource,
    float_weight,
    with_cache,
)
from msquant.errors import CalibrationError
from msquant.interrupts import check_interrupt
from msquant.kernels.layer_report import CacheReport
from msquant.models.config import ModelConfig
from msquant.models.layers import DecoderLayer, Positions
from msquant.models.reading import read_norm
from msquant.models.rope import rotary_tables

Floats = NDArray[np.float32]

FLOORS = (0.0, 0.25, 0.5, 0.75, 0.9)
"""Quantiles; 0 is no floor."""

FACTORS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)
"""What all ranges are multiplied by."""

SEARCH_QUERIES = 256
"""Tokens whose attention is compared, spread evenly over the samples; all tokens are looked at by them."""

NARROWEST = 0.25
"""Half a range is at least this part of the greatest magnitude in it: the engine multiplies keys by a
reciprocal in its own dtype, and so far from zero the numbers of bfloat16 are two steps apart."""

PARTS = 2
"""Parts of the samples, each of which is quantized with the ranges of the others."""


@dataclass(eq=False)
class AttentionSample:
    """What attention reads in one sample.

    Attributes:
        queries: of some tokens, rotated, `[heads, n, D]`.
        places: which tokens these are, `[n]`.
        keys: of all tokens, rotated, `[groups, T, D]`.
        values: likewise.
        residual: the residual stream that attention adds to, of the tokens at `places`, `[n, H]`.
    """

    queries: Floats
    places: NDArray[np.integer]
    keys: Floats
    values: Floats
    residual: Floats

    def weights(self, keys: Floats, scale: float) -> Floats:
        """How much each query takes of each token, `[groups, heads / groups * n, T]`."""
        groups, tokens, channels = keys.shape
        scores = self.queries.reshape(groups, -1, channels) @ keys.swapaxes(1, 2)
        scores *= np.float32(scale)
        hidden = np.arange(tokens)[None, :] > self.places[:, None]
        scores.reshape(groups, -1, *hidden.shape)[:, :, hidden] = -np.inf
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        return scores

    def mixed(self, weights: Floats, values: Floats) -> Floats:
        """The input of the output projection, `[n, heads * D]`."""
        heads, count, _ = self.queries.shape
        return (weights @ values).reshape(heads, count, -1).swapaxes(0, 1).reshape(count, -1)


@dataclass(frozen=True)
class _Kind:
    """Keys or values: what they reach in each sample, `[S, groups * D]`, and what is typical of them."""

    name: str
    low: Floats
    high: Floats
    typical: Floats

    def scale(self, samples: NDArray[np.intp], floor: float, factor: float) -> CacheScale:
        """By the ranges of some samples; 1 for a channel of zeros."""
        low, high = self.low[samples].min(axis=0), self.high[samples].max(axis=0)
        middle = (low + high) / 2
        half = np.float32(factor) * floored((high - low) / 2, self.typical, floor)
        steps = scales_of(np.maximum(half, NARROWEST * (np.abs(middle) + half)))
        offset = np.rint(-middle / steps)
        return CacheScale.of(steps, offset=offset if offset.any() else None)


class CacheSearch:
    """The candidates for the scales of one layer.

    Args:
        samples: what its attention reads.
        output: the weight of the output projection, `[H, heads * D]`.
        softmax_scale: of the scores.
        typical: magnitudes of keys and of values by the weights that make them, `[groups * D]` each.
        turns: the angle that each pair of channels turns by from one position to the next, `[R / 2]`.
        last: the greatest position.
        check: called before every candidate; may raise to interrupt the search.
    """

    def __init__(
        self,
        samples: Sequence[AttentionSample],
        output: Floats,
        softmax_scale: float,
        typical: tuple[Floats, Floats],
        turns: NDArray[np.float64],
        last: int,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._samples, self._output, self._softmax_scale = samples, output, softmax_scale
        self._check = check
        self._weights = [sample.weights(sample.keys, softmax_scale) for sample in samples]
        self._mixed = [
            sample.mixed(weights, sample.values)
            for sample, weights in zip(samples, self._weights, strict=True)
        ]
        self._factors = [
            inverse_squares(sample.residual + mixed @ output.T)
            for sample, mixed in zip(samples, self._mixed, strict=True)
        ]
        channels = samples[0].keys.shape[2]
        low, high = np.stack([turned_bounds(sample.keys, turns, last) for sample in samples], axis=1)
        self.keys = _Kind("keys", low, high, _of_pairs(typical[0], channels, 2 * len(turns)))
        reached = np.stack([np.abs(sample.values).max(axis=1).reshape(-1) for sample in samples])
        self.values = _Kind("values", -reached, reached, typical[1])

    @np.errstate(over="ignore", invalid="ignore")
    def best(self, kind: _Kind) -> tuple[CacheScale, CacheReport]:
        """The scales of keys or of values: the best floor, and the best factor at that floor.

        Raises:
            CalibrationError: no candidate gives a finite error.
        """
        loss = remembered(partial(self.loss, kind), self._check)
        floor = min(FLOORS, key=lambda value: loss(value, 1.0))
        factor = min(FACTORS, key=lambda value: loss(floor, value))
        if not np.isfinite(loss(floor, factor)):
            raise CalibrationError(
                f"no scale of the cached {kind.name} gives a finite error",
                remedy="check that config.json belongs to these weights, or write cache: none",
            )
        scale = kind.scale(np.arange(len(self._samples)), floor, factor)
        return scale, CacheReport(kind.name, floor, factor, loss(floor, factor))

    def loss(self, kind: _Kind, floor: float, factor: float) -> float:
        """Mean over tokens of the relative squared error, with the ranges of the other parts."""

        def error(number: int, cache: CacheScale) -> Floats:
            sample, weights = self._samples[number], self._weights[number]
            keys, values = sample.keys, sample.values
            if kind is self.keys:
                weights = sample.weights(_cached(keys, cache), self._softmax_scale)
            else:
                values = _cached(values, cache)
            return (sample.mixed(weights, values) - self._mixed[number]) @ self._output.T

        return held_out_loss(self._factors, lambda measured: kind.scale(measured, floor, factor), error)


def scales_of(maxima: Floats) -> Floats:
    """The int8 scales that hold magnitudes; 1 for zeros.

    What is too small for a reciprocal is nothing beside the other channels.
    """
    scale = maxima / np.float32(INT8_MAX)
    return np.where(scale < np.finfo(np.float32).tiny * 16, np.float32(1), scale)


def remembered(loss: Callable[..., float], check: Callable[[], None]) -> Callable[..., float]:
    """A loss, computed once for each candidate behind a call of `check`; infinite where it is not finite."""

    @cache
    def found(*candidate: float) -> float:
        check()
        value = loss(*candidate)
        return value if np.isfinite(value) else np.inf

    return found


def held_out_loss(
    factors: Sequence[Floats], scale: Callable[[NDArray[np.intp]], Any], error: Callable[[int, Any], Floats]
) -> float:
    """Mean over tokens of the relative squared error of every sample, with the scale of the other parts.

    Args:
        factors: what the squared error of each token of each sample is multiplied by, `[n]`.
        scale: what is measured on some samples.
        error: of a sample by its number with that, `[n, H]`.
    """
    total, tokens = 0.0, 0
    for measured, held_out in folds(len(factors)):
        found = scale(measured)
        for number in held_out:
            wrong = error(number, found)
            total += float(np.square(wrong).sum(axis=1) @ factors[number])
            tokens += len(wrong)
    return total / tokens


def with_cache_scales(
    config: ModelConfig,
    index: int,
    source: WeightSource,
    layer: DecoderLayer,
    hidden: Sequence[Tensor],
    places: Positions,
) -> tuple[dict[str, Linear], list[CacheReport]]:
    """The linears of one decoder layer that make keys and values, with the scales of their cache.

    Args:
        config: the model's shape; its attention is grouped-query.
        index: of the layer.
        source: has the layer's linears as they will be computed.
        layer: built of that, whole or its attention alone.
        hidden: its inputs, batches of samples `[B, T, H]`.
        places: the tokens' positions.

    Returns:
        The linears by full name, and what was chosen for keys and for values.

    Raises:
        CalibrationError: no candidate gives a finite error.
    """
    names, name = config.family.names, config.family.layer_name(index)
    attention = f"{name}.{names.attention}"
    weight = float_weight(source.linear(f"{attention}.{names.output}"))
    linears = [f"{name}.{linear}" for linear in config.family.cached]
    made = [source.linear(linear) for linear in linears]
    typical = [typical_magnitudes(float_weight(linear)) for linear in made]
    if config.query_key_norms:
        # What the weights make is normalized for every head, and then multiplied by this.
        norm = np.abs(read_norm(config, source, f"{attention}.{names.key_norm}"))
        typical[0] = typical_magnitudes(np.tile(norm, config.num_key_value_heads))

    def project(state: tuple[Tensor, ...], count: int) -> Sequence[Tensor]:
        projected: Sequence[Tensor] = layer.mixer_block.project(state[1], count, places)[:3]
        return projected

    search = CacheSearch(
        attention_samples(layer, hidden, places, layer.step_of["qkv"], project),
        weight,
        config.head_dim**-0.5,
        (typical[0], typical[1]),
        pair_turns(config),
        config.max_position_embeddings - 1,
        check_interrupt,
    )
    found, reports = {}, []
    for linear, before, kind in zip(linears, made, (search.keys, search.values), strict=True):
        scale, report = search.best(kind)
        found[linear] = with_cache(before, scale)
        reports.append(report)
    return found, reports


def attention_samples(
    layer: DecoderLayer,
    hidden: Sequence[Tensor],
    places: Positions,
    stop: int,
    project: Callable[[tuple[Tensor, ...], int], Sequence[Tensor]],
) -> list[AttentionSample]:
    """What attention reads in every sample, with some of the queries.

    Args:
        layer: of the model.
        hidden: its inputs, batches of samples `[B, T, H]`.
        places: the tokens' positions.
        stop: the step that attention begins with.
        project: from the state before that and B to queries, keys and values, `[B, heads, T, channels]` each.
    """
    tokens = sum(batch.shape[0] * batch.shape[1] for batch in hidden)
    shortest = min(batch.shape[1] for batch in hidden)
    step = max(1, min(tokens // SEARCH_QUERIES, shortest))
    samples, start = [], 0
    for batch in hidden:
        check_interrupt()
        count, length, size = batch.shape
        state = layer.run((batch.reshape(count * length, size),), count, places, stop=stop)
        queries, keys, values = map(_floats, project(state, count))
        residual = _floats(state[0]).reshape(count, length, size)
        for number in range(count):
            # Every `step`th token of all.
            chosen = np.arange(-start % step, length, step)
            start += length
            samples.append(
                AttentionSample(
                    queries[number][:, chosen], chosen, keys[number], values[number], residual[number, chosen]
                )
            )
    return samples


def _floats(tensor: Tensor) -> Floats:
    values: Floats = tensor.astype(ms.float32).asnumpy()
    return values


def pair_turns(config: ModelConfig) -> NDArray[np.float64]:
    """The angle that each pair of channels turns by from one position to the next, `[R / 2]`."""
    # The tables hold each angle twice.
    cos, sin = (
        table[0, : config.rotary_dim // 2].astype(np.float64) for table in rotary_tables(config, 1, 1)
    )
    turns: NDArray[np.float64] = np.arctan2(sin, cos)
    return turns


def turned_bounds(keys: Floats, turns: NDArray[np.float64], last: int) -> Floats:
    """The least and the greatest that each channel of some keys is at any position.

    Args:
        keys: rotated, those of a sample from its first token on, `[groups, T, D]`.
        turns: the angle that each pair turns by from one position to the next, `[R / 2]`; the first R
            channels of a head are rotated.
        last: the greatest position.

    Returns:
        float32 `[2, groups * D]`.
    """
    rotated = 2 * len(turns)
    first, second = np.split(keys[..., :rotated].astype(np.float64), 2, axis=2)
    start = np.arctan2(second, first) - np.arange(keys.shape[1])[:, None] * turns
    radius, rest = np.hypot(first, second), keys[..., rotated:]

    def greatest(angle: float) -> NDArray[np.float64]:
        """How far pairs come in the direction of an angle."""
        begin, end = start - angle, start - angle + last * turns
        passed = np.floor(begin / (2 * np.pi)) != np.floor(end / (2 * np.pi))
        return (radius * np.where(passed, 1, np.maximum(np.cos(begin), np.cos(end)))).max(axis=1)

    # The second channel of a pair is a quarter turn behind the first.
    low = [-greatest(np.pi), -greatest(1.5 * np.pi), rest.min(axis=1)]
    high = [greatest(0), greatest(0.5 * np.pi), rest.max(axis=1)]
    return np.stack([np.concatenate(part, axis=1).reshape(-1) for part in (low, high)]).astype(np.float32)


def _of_pairs(typical: Floats, channels: int, rotated: int) -> Floats:
    """What is typical for the pair of every channel, `[groups * D]`; alone where it is not rotated."""
    heads = typical.reshape(-1, channels)
    pairs = np.hypot(*np.split(heads[:, :rotated], 2, axis=1))
    return np.concatenate([pairs, pairs, heads[:, rotated:]], axis=1).reshape(-1).astype(np.float32)


def _cached(values: Floats, cache: CacheScale) -> Floats:
    """What is read back of a cache, `[groups, T, D]` to the same."""
    by_token = values.swapaxes(0, 1)
    kept = cache.rounded(by_token.reshape(len(by_token), -1))
    return kept.reshape(by_token.shape).swapaxes(0, 1)


def folds(count: int) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Samples whose ranges are measured, and those that are quantized with them, once for each part."""
    samples = np.arange(count)
    if count == 1:
        return [(samples, samples)]
    return [(samples[samples % PARTS != part], samples[samples % PARTS == part]) for part in range(PARTS)]
