"""The error that quantizing one group of linears causes while all others stay in floating point.

It is the mean over calibration tokens of `|quantized - y|^2 / |y|^2` with y the output of the decoder layer,
that is the residual stream, which later layers read through norms that divide it by its size. Static ranges
are held out: tokens of each half of the samples are quantized with the ranges of the other half, so channels
that leave their range on other text count.

Where a layer is quantized in two blocks (see `decoder_pass.py`), y of an attention group is the attention
block's output, and the feed-forward block, all of its experts together, is one group.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from mindspore import Tensor
from numpy.typing import NDArray

from msquant.checkpoint.weights import Linear, token_scales
from msquant.families.base import SmoothGroup
from msquant.interrupts import check_interrupt
from msquant.kernels.fake_quant import activation_parameters, fake_quantize, shifted_parameters
from msquant.kernels.layer_report import GroupError
from msquant.kernels.weight_rounding import smoothed_and_rounded
from msquant.models.layers import DecoderLayer, Part
from msquant.quantization.decoder_pass import BETWEEN, DecoderPass, Floats
from msquant.quantization.layer_pass import LayerResult, find_cell
from msquant.quantization.layer_schemes import in_two_blocks, layer_schemes
from msquant.schemes import W8A8_DYNAMIC, Scheme

if TYPE_CHECKING:
    from msquant.algorithms.smoothers import Batch

FEED_FORWARD = "feed_forward"
"""Name of the group that a feed-forward block of its own is."""


class SensitivityPass(DecoderPass):
    """Measures the groups of one decoder layer after another, instead of quantizing them."""

    def errors(
        self, index: int, hidden: Sequence[Floats], put: Callable[[Floats], None], *, dynamic: bool = False
    ) -> list[GroupError]:
        """Measure every group of layer `index` that the policy quantizes.

        Args:
            index: of the layer.
            hidden: its inputs, batches of samples `[B, T, H]`.
            put: takes the layer's floating-point outputs, batch by batch, in the same shapes.
            dynamic: measure static groups with a scale per token, too: with the smooth scale chosen for
                static ones, except for osl, which leaves such linears unsmoothed.

        Raises:
            MsquantError: as `run`.
        """
        put = self._finite(index, put)
        if not in_two_blocks(self._config, self._policy, index):
            return self._groups(index, hidden, put, "whole", dynamic)
        self._step("attention")
        with self._store.write(BETWEEN) as between:
            errors = self._groups(index, hidden, between.append, "attention", dynamic)
        return errors + self._feed_forward(index, put)

    def _groups(
        self, index: int, hidden: Sequence[Floats], put: Callable[[Floats], None], part: Part, dynamic: bool
    ) -> list[GroupError]:
        from msquant.algorithms.smoothers import Batch

        result = self._golden_stick(index, self._layer(self._source, index, part), hidden, _Nowhere())
        # The pass used that layer up, and golden-stick's cells are only freed by the collector.
        gc.collect()
        layer = self._layer(self._source, index, part)
        batches = []
        for batch in hidden:
            check_interrupt()
            batches.append(Batch(layer, Tensor(batch, self._dtype), self._places))
            put(batches[-1].output.reshape(batch.shape).astype(np.float32, copy=False))
        name = self._config.family.layer_name(index)
        errors = []
        for group in self._config.groups(index):
            linears = tuple(f"{name}.{linear}" for linear in group.linears)
            scheme = self._policy.scheme(linears[0])
            if group.name not in layer.step_of or scheme.is_float:
                continue
            self._step(f"error of {group.name}")
            error = self._error(layer, group, batches, result, scheme)
            other = None
            if dynamic and scheme.is_static:
                other = self._error(layer, group, batches, result, W8A8_DYNAMIC)
            errors.append(GroupError(index, group.name, linears, scheme, error, other))
        return errors

    def _error(
        self,
        layer: DecoderLayer,
        group: SmoothGroup,
        batches: Sequence["Batch"],
        result: LayerResult,
        scheme: Scheme,
    ) -> float:
        step = layer.step_of[group.name]
        cells = [find_cell(layer, linear) for linear in group.linears]
        assert scheme.weights is not None
        ones = np.ones(cells[0].weight.shape[1], np.float32)
        scale = result.smooth_scales.get(group.name, ones)
        ratios = result.report.clip_ratios
        if not self._policy.smooths(scheme):
            scale, ratios = ones, {}
        weights = [
            smoothed_and_rounded(cell.weight.asnumpy(), scale, ratios.get(linear), scheme.weights)
            for cell, linear in zip(cells, group.linears, strict=True)
        ]
        inputs = [batch.states[step][1].asnumpy().reshape(batch.samples, -1, len(scale)) for batch in batches]
        quantized = _quantized(inputs, scale, scheme)
        total = tokens = 0.0
        with _replaced(cells, weights, self._dtype):
            for batch, x in zip(batches, quantized, strict=True):
                check_interrupt()
                before, _, *others = batch.states[step]
                state = (before, Tensor(x.reshape(-1, len(scale)), self._dtype), *others)
                output = layer.run(state, batch.samples, batch.places, start=step)[0].asnumpy()
                total += float(token_errors(batch.output, output).sum())
                tokens += len(output)
        return total / tokens

    def _feed_forward(self, index: int, put: Callable[[Floats], None]) -> list[GroupError]:
        """The block's error over as many tokens as the memory budget takes at once."""
        block, flat, outputs = self._feed_forward_block(index, put)
        schemes = layer_schemes(self._config, self._policy, index)
        within = f"{self._config.family.layer_name(index)}.{self._config.family.names.feed_forward}."
        linears = [n for n, scheme in schemes.items() if n.startswith(within) and not scheme.is_float]
        if not linears:
            return []
        error = float(token_errors(outputs, block.quantize(flat, _Nowhere())).mean())
        return [GroupError(index, FEED_FORWARD, tuple(linears), schemes[linears[0]], error)]


class _Nowhere:
    """A `LayerSink` for what is measured and not kept."""

    def tensor(self, name: str, values: NDArray[np.float32]) -> None: ...

    def linear(self, module: str, linear: Linear) -> None: ...


def token_errors(output: Floats, quantized: Floats) -> Floats:
    """`|quantized - output|^2 / |output|^2` of every token: `[T, H]` to `[T]`; 0 for an output of zeros."""
    squares = np.square(output).sum(axis=1)
    wrong = np.square(quantized - output).sum(axis=1)
    return np.divide(wrong, squares, out=np.zeros_like(squares), where=squares > 0)


def held_out_parameters(low: Floats, high: Floats, shifted: bool = False) -> tuple[Floats, Floats]:
    """The static scale and the zero points that each sample is quantized with.

    Args:
        low: least value of each column in each sample, `[S, K]`.
        high: greatest value, `[S, K]`.
        shifted: each column has a zero point of its own.

    Returns:
        float32 `[S, 1]`, and `[S, 1]` or, shifted, `[S, K]`: for samples of an even number by the ranges of
        those of an odd one, and the other way round; a single sample has its own. Ranges include 0, as
        serving engines ask.
    """
    parts = [slice(0, None, 2), slice(1, None, 2)] if len(low) > 1 else [slice(None)]
    found = []
    for others in reversed(parts):
        least, most = low[others].min(axis=0), high[others].max(axis=0)
        if shifted:
            found.append(shifted_parameters(least, most))
        else:
            found.append(activation_parameters(np.minimum(least.min(), 0), np.maximum(most.max(), 0)))
    numbers = np.arange(len(low)) % len(parts)
    scales, offsets = (
        np.stack([np.reshape(values, -1) for values in both]) for both in zip(*found, strict=True)
    )
    return scales[numbers], offsets[numbers]


def _quantized(inputs: Sequence[Floats], smooth_scale: Floats, scheme: Scheme) -> Iterator[Floats]:
    """Batches `[B, T, K]`, smoothed, and then quantized and dequantized as the scheme has it."""
    if scheme.is_static:
        low = np.concatenate([x.min(axis=1) / smooth_scale for x in inputs])
        high = np.concatenate([x.max(axis=1) / smooth_scale for x in inputs])
        parameters = held_out_parameters(low, high, scheme.is_shifted)
        scale, offset = (values[:, None] for values in parameters)
    start = 0
    for x in inputs:
        smoothed = x / smooth_scale
        if scheme.is_static:
            here = slice(start, start + len(x))
            smoothed = fake_quantize(smoothed, scale[here], offset[here], out=smoothed)
            start += len(x)
        elif scheme.is_dynamic:
            rows = smoothed.reshape(-1, smoothed.shape[-1])
            fake_quantize(rows, token_scales(rows), out=rows)
        yield smoothed


@contextmanager
def _replaced(cells: Sequence[Any], weights: Sequence[Floats], dtype: Any) -> Iterator[None]:
    """Within the block the cells compute with these weights."""
    before = [cell.weight.asnumpy() for cell in cells]
    for cell, weight in zip(cells, weights, strict=True):
        cell.weight.set_data(Tensor(weight, dtype))
    try:
        yield
    finally:
        for cell, weight in zip(cells, before, strict=True):
            cell.weight.set_data(Tensor(weight, dtype))
