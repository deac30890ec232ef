"""One decoder layer from floating point to int8: what the pipeline does to each in turn.

A layer whose feed-forward block has static scales goes through golden-stick whole, as in its own mindone
path. Where that block is quantized per token, or is a mixture of experts, golden-stick gets the attention
block alone and its search compares the attention block's output: to compare the layer's would take every
expert once for every candidate. The feed-forward block then goes expert by expert.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from mindspore import Tensor
from numpy.typing import NDArray

from msquant.algorithms.base import Algorithm
from msquant.checkpoint.hidden_states import HiddenStateStore
from msquant.checkpoint.weights import LayerSink, WeightSource
from msquant.errors import CheckpointError
from msquant.interrupts import check_interrupt
from msquant.kernels.layer_report import LayerReport, relative_error
from msquant.models.config import ModelConfig
from msquant.models.layers import DecoderLayer, Part, Positions, positions
from msquant.quantization.cache_scales import with_cache_scales
from msquant.quantization.feed_forward_pass import FeedForwardPass
from msquant.quantization.latent_cache import with_latent_scale
from msquant.quantization.layer_pass import LayerResult, quantize_layer
from msquant.quantization.layer_schemes import in_two_blocks

Floats = NDArray[np.float32]

BETWEEN = 99_999
"""The boundary between the two blocks of the layer at hand, among those before and after decoder layers."""

# Samples by whose outputs a whole quantized layer is compared with the layer: a report needs no more.
_COMPARED = 4


class DecoderPass:
    """Quantizes the decoder layers of one model, each from the floating-point outputs of the one before.

    Args:
        config: the model's shape.
        source: its weights.
        policy: what to do.
        length: tokens in each sample.
        dtype: compute dtype, as `use_device` returned it.
        store: where an attention block's outputs go; its budget bounds the tokens that a feed-forward block
            computes at once.
        step: called with what goes on within a layer.
        between: called when a layer's attention block is done and its feed-forward block comes apart.
        searched: so many batches are smoothed and searched on; those behind them only feed the experts.
    """

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        policy: Algorithm,
        length: int,
        dtype: Any,
        store: HiddenStateStore,
        step: Callable[[str], None] = lambda text: None,
        between: Callable[[], None] = lambda: None,
        searched: int | None = None,
    ) -> None:
        self._config, self._source, self._policy, self._dtype = config, source, policy, dtype
        self._places: Positions = positions(config, length, dtype)
        self._store, self._step, self._between = store, step, between
        self._searched = searched

    def run(
        self, index: int, hidden: Sequence[Floats], put: Callable[[Floats], None], sink: LayerSink
    ) -> LayerReport:
        """Quantize layer `index`.

        Args:
            index: of the layer.
            hidden: its inputs, batches of samples `[B, T, H]`.
            put: takes the layer's floating-point outputs, batch by batch, in the same shapes.
            sink: takes its quantized weights.

        Raises:
            MsquantError: a tensor is missing, damaged or of a wrong shape, or holds NaN; the search finds
                nothing; the disk is full.
        """
        put_finite = self._finite(index, put)

        if in_two_blocks(self._config, self._policy, index):
            return self._two_blocks(index, hidden, put_finite, sink)
        first: list[Floats] = []

        def keep(output: Floats) -> None:
            put_finite(output)
            if not first:
                first.append(output)

        layer = self._layer(self._source, index, "whole")
        result = self._golden_stick(index, layer, hidden[: self._searched], sink, keep)
        del layer
        self._carry(index, "whole", hidden, put_finite)
        sample = hidden[0][:_COMPARED]
        quantized = self._compute(self._layer(result, index, "whole"), sample)
        result.report.error = relative_error(sample, first[0][:_COMPARED], quantized)
        return result.report

    def compute(self, index: int, hidden: Sequence[Floats], put: Callable[[Floats], None]) -> None:
        """The floating-point outputs of layer `index` alone, in the bytes in which `run` gives them.

        Args:
            index: of the layer.
            hidden: its inputs, batches of samples `[B, T, H]`.
            put: takes the outputs, batch by batch, in the same shapes.

        Raises:
            MsquantError: a tensor is missing, damaged or of a wrong shape, or holds NaN; the disk is full.
        """
        put_finite = self._finite(index, put)
        if not in_two_blocks(self._config, self._policy, index):
            self._forward(index, "whole", hidden, put_finite)
            return
        self._step("attention")
        with self._store.write(BETWEEN) as between:
            self._forward(index, "attention", hidden, between.append)
        self._outputs(self._block(index, observes=False), put_finite)
        self._store.discard(BETWEEN)

    def _forward(
        self,
        index: int,
        part: Part,
        hidden: Sequence[Floats],
        put: Callable[[Floats], None],
        places: Iterable[int] | None = None,
    ) -> None:
        """Compute some batches, or all, by the layer's own weights, as `run` computes each."""
        layer = self._layer(self._source, index, part)
        for place in range(len(hidden)) if places is None else places:
            check_interrupt()
            batch = hidden[place]
            together = self._policy.takes_batches or (self._searched is not None and place >= self._searched)
            items = [batch] if together else [batch[i : i + 1] for i in range(len(batch))]
            made = [self._compute(layer, item) for item in items]
            put(made[0] if len(made) == 1 else np.concatenate(made))

    def _two_blocks(
        self, index: int, hidden: Sequence[Floats], put: Callable[[Floats], None], sink: LayerSink
    ) -> LayerReport:
        self._step("attention")
        attention = self._layer(self._source, index, "attention")
        with self._store.write(BETWEEN) as between:
            result = self._golden_stick(index, attention, hidden[: self._searched], sink, between.append)
            del attention
            self._carry(index, "attention", hidden, between.append)
        sample = self._compute(self._layer(result, index, "attention"), hidden[0])
        report = result.report
        del result
        # golden-stick's own cells refer to themselves, so only the collector frees them.
        gc.collect()
        self._between()
        block, _, outputs = self._feed_forward_block(index, put)
        first = outputs[: hidden[0].size // hidden[0].shape[-1]].reshape(hidden[0].shape)
        quantized = block.quantize(sample.reshape(-1, sample.shape[-1]), sink)
        report.groups += block.groups()
        report.expert_tokens, report.lent_tokens = block.expert_tokens, block.lent_tokens
        report.error = relative_error(hidden[0], first, quantized.reshape(sample.shape))
        return report

    def _feed_forward_block(
        self, index: int, put: Callable[[Floats], None]
    ) -> tuple[FeedForwardPass, Floats, Floats]:
        """The first reading of a block of its own, whose inputs are in the store, between the blocks.

        Args:
            index: of the layer.
            put: takes the layer's floating-point outputs, batch by batch.

        Returns:
            The block, which has seen and been fed all tokens; and inputs and outputs `[T, H]` of as many
            tokens as the memory budget takes at once.
        """
        block = self._block(index)
        first = self._outputs(block, put)
        block.feed(lambda: map(flat, self._rounds(self._store.open(BETWEEN))))
        self._store.discard(BETWEEN)
        return block, *first

    def _block(
        self, index: int, *, observes: bool = True, mine: Sequence[int] | None = None
    ) -> FeedForwardPass:
        return FeedForwardPass(
            self._config,
            self._source,
            index,
            self._policy,
            self._dtype,
            self._step,
            observes=observes,
            mine=mine,
        )

    def _outputs(self, block: FeedForwardPass, put: Callable[[Floats], None]) -> tuple[Floats, Floats]:
        """What a block makes of the states between the blocks; returns the first round, before and after."""
        first: tuple[Floats, Floats] | None = None
        for batches in self._rounds(self._store.open(BETWEEN)):
            between = flat(batches)
            outputs = block.forward(between)
            first = first or (between, outputs)
            for output in in_batches(batches, outputs):
                put(output)
        assert first is not None
        return first

    def _carry(self, index: int, part: Part, hidden: Sequence[Floats], put: Callable[[Floats], None]) -> None:
        """Compute the batches that the search has not seen, by the layer's own weights."""
        if self._searched is not None and self._searched < len(hidden):
            self._forward(index, part, hidden, put, range(self._searched, len(hidden)))

    def _finite(self, index: int, put: Callable[[Floats], None]) -> Callable[[Floats], None]:
        """`put`, for outputs of layer `index` that are to be finite."""

        def put_finite(output: Floats) -> None:
            if not np.isfinite(output).all():
                raise CheckpointError(
                    "computes NaN or infinity from finite weights",
                    where=self._config.family.layer_name(index),
                    remedy="check that config.json belongs to these weights",
                )
            put(output)

        return put_finite

    def _layer(self, source: WeightSource, index: int, part: Part) -> DecoderLayer:
        return DecoderLayer(self._config, source, index, self._dtype, part=part)

    def _compute(self, layer: DecoderLayer, batch: Floats) -> Floats:
        return layer(Tensor(batch, self._dtype), self._places).asnumpy().astype(np.float32, copy=False)

    def _golden_stick(
        self,
        index: int,
        layer: DecoderLayer,
        hidden: Sequence[Floats],
        sink: LayerSink,
        put: Callable[[Floats], None] = lambda output: None,
    ) -> LayerResult:
        inputs = [Tensor(batch, self._dtype) for batch in hidden]
        result = quantize_layer(self._config, index, layer, inputs, self._places, self._policy, put)
        if self._policy.cache_quant is not None:
            self._step("scales of the cache")
            attention = self._layer(result, index, "attention")
            tensors: dict[str, Floats] = {}
            if (sizes := self._config.latent) is None:
                linears, result.report.cache = with_cache_scales(
                    self._config, index, result, attention, inputs, self._places
                )
            else:
                linears, tensors, result.report.cache = with_latent_scale(
                    self._config, sizes, index, result, attention, inputs, self._places
                )
            result = replace(
                result, linears={**result.linears, **linears}, tensors={**result.tensors, **tensors}
            )
        for name, values in result.tensors.items():
            sink.tensor(name, values)
        for module, linear in result.linears.items():
            sink.linear(module, linear)
        for name, group in self._config.carried_in_attention(index).items():
            values = self._source.tensor(name)
            scale = None if group is None else result.smooth_scales.get(group)
            sink.tensor(name, values if scale is None else values * scale)
        return result

    def _rounds(self, batches: Iterable[Floats]) -> Iterator[list[Floats]]:
        """As many batches at once as the budget takes, with their normalized inputs and their outputs."""
        held: list[Floats] = []
        for batch in batches:
            if held and 3 * sum(b.nbytes for b in [*held, batch]) > self._store.budget_bytes:
                yield held
                held = []
            held.append(batch)
        yield held


def flat(batches: Sequence[Floats]) -> Floats:
    """Batches `[B, T, H]` as one, `[tokens, H]`."""
    return np.concatenate([batch.reshape(-1, batch.shape[-1]) for batch in batches])


def in_batches(batches: Sequence[Floats], outputs: Floats) -> Iterator[Floats]:
    """Outputs `[tokens, H]` in the shapes of the batches that they are made of."""
    tokens = np.cumsum([batch.size // batch.shape[-1] for batch in batches])
    for batch, output in zip(batches, np.split(outputs, tokens[:-1]), strict=True):
        yield output.reshape(batch.shape)
