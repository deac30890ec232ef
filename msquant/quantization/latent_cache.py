"""The scale of latent attention's int8 cache: one for all channels, searched on samples held out.

The latent state is kept behind its norm with a single scale, though its channels differ in size. So they are
made alike first: a channel is divided by a power of two in the norm in front, and the columns that read it
are multiplied by the same, which rounds nothing in any floating-point dtype. How far, an alpha says, as in
SmoothQuant (arXiv 2211.10438): queries, which are turned into the same channels and rounded there as the
servers do, get what is taken from the latent state.

As in `cache_scales`, alpha, a floor under quiet channels and what all ranges are multiplied by are chosen on
samples whose ranges were not measured, by the error of what attention adds to the residual stream.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from mindspore import Tensor
from numpy.typing import NDArray

from msquant.algorithms.held_out import floored, inverse_squares, typical_magnitudes
from msquant.checkpoint.weights import (
    INT8_MAX,
    CacheScale,
    FloatLinear,
    Linear,
    WeightSource,
    float_weight,
    token_scales,
    with_cache,
)
from msquant.errors import CalibrationError
from msquant.families.base import LatentSizes
from msquant.interrupts import check_interrupt
from msquant.kernels.layer_report import CacheReport
from msquant.models.config import ModelConfig
from msquant.models.layers import DecoderLayer, Positions
from msquant.models.reading import read_norm, stored_norm
from msquant.models.rope import softmax_scale
from msquant.quantization.cache_scales import (
    FLOORS,
    AttentionSample,
    attention_samples,
    held_out_loss,
    remembered,
    scales_of,
)

Floats = NDArray[np.float32]

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""How much of a channel's size is taken from it; 0 leaves the model as it is."""

FACTORS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25)
"""What the range of all channels is multiplied by."""

MOST_HALVINGS = 8
"""What is taken from a channel, or given to it, is within two to this power."""


class LatentScale(NamedTuple):
    """Powers of two `[rank]` that the channels are divided by, and the scale of what is left."""

    powers: Floats
    scale: np.float32


class LatentCacheSearch:
    """The candidates for the latent scale of one layer.

    Args:
        samples: what its attention reads: queries in the latent's channels before the rotated ones, `[heads,
            n, rank + R]`; keys likewise `[1, T, rank + R]`, and the latent state as values `[1, T, rank]`.
        up: what makes the heads' values of the latent state, `[heads, V, rank]`.
        output: the weight of the output projection, `[H, heads * V]`.
        softmax_scale: of the scores.
        typical: magnitudes of the latent's channels by the norm in front, `[rank]`.
        check: called before every candidate; may raise to interrupt the search.
    """

    def __init__(
        self,
        samples: Sequence[AttentionSample],
        up: Floats,
        output: Floats,
        softmax_scale: float,
        typical: Floats,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._samples, self._up, self._output = samples, up, output
        self._softmax_scale, self._typical, self._check = softmax_scale, typical, check
        self._ranges = np.stack([np.abs(sample.values[0]).max(axis=0) for sample in samples])
        self._exact = [
            self._added(sample, sample.weights(sample.keys, softmax_scale), sample.values)
            for sample in samples
        ]
        self._factors = [
            inverse_squares(sample.residual + added)
            for sample, added in zip(samples, self._exact, strict=True)
        ]

    @np.errstate(over="ignore", invalid="ignore")
    def best(self) -> tuple[LatentScale, CacheReport]:
        """The best alpha, the best floor with it, and the best factor with both.

        Raises:
            CalibrationError: no candidate gives a finite error.
        """
        loss = remembered(self.loss, self._check)
        alpha = min(ALPHAS, key=lambda value: loss(value, 0.5, 1.0))
        floor = min(FLOORS, key=lambda value: loss(alpha, value, 1.0))
        factor = min(FACTORS, key=lambda value: loss(alpha, floor, value))
        if not np.isfinite(loss(alpha, floor, factor)):
            raise CalibrationError(
                "no scale of the cached latent state gives a finite error",
                remedy="check that config.json belongs to these weights, or write cache: none",
            )
        found = self.scale(np.arange(len(self._samples)), alpha, floor, factor)
        return found, CacheReport("latent", floor, factor, loss(alpha, floor, factor), alpha)

    def scale(self, samples: NDArray[np.intp], alpha: float, floor: float, factor: float) -> LatentScale:
        """By the ranges of some samples; a scale of 1 for zeros."""
        maxima = floored(self._ranges[samples].max(axis=0), self._typical, floor)
        some = maxima > np.finfo(np.float32).tiny * 16
        if not some.any():
            return LatentScale(np.ones_like(maxima), np.float32(1))
        halvings = np.log2(np.where(some, maxima, 1)) - np.median(np.log2(maxima[some]))
        halvings = np.clip(np.rint(alpha * halvings), -MOST_HALVINGS, MOST_HALVINGS)
        powers = np.exp2(np.where(some, halvings, 0)).astype(np.float32)
        return LatentScale(powers, np.float32(factor * (maxima / powers).max() / INT8_MAX))

    def loss(self, alpha: float, floor: float, factor: float) -> float:
        """Mean over tokens of the relative squared error, with the ranges of the other parts."""
        return held_out_loss(
            self._factors,
            lambda measured: self.scale(measured, alpha, floor, factor),
            lambda number, found: self.attention(self._samples[number], found) - self._exact[number],
        )

    def attention(self, sample: AttentionSample, found: LatentScale) -> Floats:
        """What attention adds with the latent state and the queries rounded, `[n, H]`."""
        rank = len(found.powers)
        cache = CacheScale.of(np.array([found.scale], np.float32))
        kept = cache.rounded(sample.values / found.powers) * found.powers
        keys = np.concatenate([kept, sample.keys[:, :, rank:]], axis=2)
        turned = sample.queries[:, :, :rank] * found.powers
        scale = token_scales(turned.reshape(-1, rank)).reshape(*turned.shape[:2], 1)
        turned = np.rint(turned / scale) * scale / found.powers
        rounded = replace(sample, queries=np.concatenate([turned, sample.queries[:, :, rank:]], axis=2))
        return self._added(sample, rounded.weights(keys, self._softmax_scale), kept)

    def query_scales(self, powers: Floats) -> Floats:
        """What holds the queries of every head, `[heads]`; 1 for a head of zeros."""
        rank = len(powers)
        reached = [np.abs(sample.queries[:, :, :rank] * powers).max(axis=(1, 2)) for sample in self._samples]
        return scales_of(np.max(reached, axis=0).astype(np.float32))

    def _added(self, sample: AttentionSample, weights: Floats, latent: Floats) -> Floats:
        heads, _, rank = self._up.shape
        mixed = sample.mixed(weights, latent).reshape(-1, heads, rank).swapaxes(0, 1)
        values = np.matmul(mixed, self._up.swapaxes(1, 2)).swapaxes(0, 1)
        added: Floats = values.reshape(values.shape[0], -1) @ self._output.T
        return added


def with_latent_scale(
    config: ModelConfig,
    sizes: LatentSizes,
    index: int,
    source: WeightSource,
    layer: DecoderLayer,
    hidden: Sequence[Tensor],
    places: Positions,
) -> tuple[dict[str, Linear], dict[str, Floats], list[CacheReport]]:
    """What of one decoder layer makes the latent state and reads it, with the scale of its cache.

    Args:
        config: the model's shape.
        sizes: of its latent attention.
        index: of the layer.
        source: has the layer's weights as they will be computed.
        layer: built of that, whole or its attention alone.
        hidden: its inputs, batches of samples `[B, T, H]`.
        places: the tokens' positions.

    Returns:
        The linears by full name; the norm between them by its weight's full name; and what was chosen.

    Raises:
        CalibrationError: no candidate gives a finite error.
    """
    names = config.family.names
    attention = f"{config.family.layer_name(index)}.{names.attention}"
    norm, down, up = (
        f"{attention}.{part}" for part in (names.latent_norm, names.latent_down, names.latent_up)
    )
    expands = source.linear(up)
    weight = float_weight(expands).reshape(config.num_attention_heads, -1, sizes.kv_lora_rank)
    into, out_of = weight[:, : sizes.qk_nope_head_dim], weight[:, sizes.qk_nope_head_dim :]
    factors = read_norm(config, source, norm)

    def project(state: tuple[Tensor, ...], count: int) -> tuple[Tensor, ...]:
        _, compressed, queries, shared = state
        projected: tuple[Tensor, ...] = layer.mixer_block.project(queries, compressed, shared, count, places)
        return projected

    search = LatentCacheSearch(
        [
            _absorbed(sample, into)
            for sample in attention_samples(layer, hidden, places, layer.step_of["kv_b"], project)
        ],
        out_of,
        float_weight(source.linear(f"{attention}.{names.output}")),
        softmax_scale(config, sizes),
        typical_magnitudes(np.abs(factors)),
        check_interrupt,
    )
    (powers, scale), report = search.best()
    assert isinstance(expands, FloatLinear), "formats with such a cache keep it in floating point"
    cache = CacheScale.of(np.array([scale], np.float32), search.query_scales(powers))
    return (
        {
            down: with_cache(source.linear(down), cache),
            up: replace(expands, weight=expands.weight * powers),
        },
        {f"{norm}.weight": stored_norm(config, norm, factors / powers)},
        [report],
    )


def _absorbed(sample: AttentionSample, into: Floats) -> AttentionSample:
    """A sample of queries, latent state and rotated channels, with queries in the latent's channels.

    Args:
        sample: its keys are the latent state, its values the keys' rotated channels.
        into: what makes a head's own keys of the latent state, `[heads, nope, rank]`.
    """
    nope, latent = into.shape[1], sample.keys
    turned = np.matmul(sample.queries[:, :, :nope], into)
    return replace(
        sample,
        queries=np.concatenate([turned, sample.queries[:, :, nope:]], axis=2),
        keys=np.concatenate([latent, sample.values], axis=2),
        values=latent,
    )
