"""A layer with experts in pieces, which several processes do; see `msquant.flows.layer_graph`.

What goes from one piece to another lies in a folder that all see. The bytes are those of `DecoderPass.run`:
each expert computes the same tokens at once, and the outputs are added up in the experts' order.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from msquant.checkpoint.disk import writing
from msquant.checkpoint.hidden_states import HiddenStates, HiddenStateStore
from msquant.checkpoint.weights import LayerSink
from msquant.kernels.layer_report import LayerReport, relative_error
from msquant.quantization.decoder_pass import DecoderPass, Floats, flat, in_batches
from msquant.quantization.feed_forward_pass import FeedForwardPass, Product

Places = Sequence[Sequence[int]]
"""Which experts each piece has, by their places in `ModelConfig.expert_names`."""


def chunks(count: int, number: int) -> list[list[int]]:
    """So many experts or batches in a number of pieces of nearly the same size."""
    return [piece.tolist() for piece in np.array_split(np.arange(count), number)]


class CutDecoderPass(DecoderPass):
    """As `DecoderPass`, which also does a layer with experts piece by piece.

    Args:
        shared: where the pieces leave what others read.
        batches: of the calibration tokens.
        arguments: of `DecoderPass`.
        options: likewise.
    """

    def __init__(self, shared: HiddenStateStore, batches: int, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._shared, self._batches = shared, batches

    def attention(self, index: int, hidden: Sequence[Floats], mine: Sequence[int]) -> None:
        """The states between the blocks of layer `index`, in floating point.

        Args:
            index: of the layer.
            hidden: its inputs, batches of samples `[B, T, H]`.
            mine: the batches to compute.

        Raises:
            MsquantError: as `run`; so do all the others.
        """
        made = iter(mine)

        def put(output: Floats) -> None:
            with self._shared.write(_name(index, "between", next(made)), hold=False) as between:
                between.append(output)

        self._forward(index, "attention", hidden, put, mine)

    def experts(self, index: int, mine: Sequence[int], piece: int) -> None:
        """What some experts add to the states between the blocks, and what they reach.

        Args:
            index: of the layer.
            mine: the experts.
            piece: number of this one.
        """
        block = self._block(index, mine=mine)
        with self._shared.write(_name(index, "experts", piece), hold=False) as made:
            for batches in self._rounds(self._states(index)):
                for rows, product in block.computed(flat(batches)):
                    made.append(_as_floats(rows))
                    made.append(product)
        block.feed(lambda: map(flat, self._rounds(self._states(index))))
        with self._shared.write(_name(index, "ranges", piece)) as ranges:
            for values in block.ranges:
                ranges.append(values)

    def combine(self, index: int, pieces: Places, put: Callable[[Floats], None]) -> None:
        """The layer's floating-point outputs.

        Args:
            index: of the layer.
            pieces: those of `experts`.
            put: takes the outputs, batch by batch.
        """
        block, put_finite = self._block(index, observes=False), self._finite(index, put)
        made = [self._shared.stream(_name(index, "experts", piece)) for piece in range(len(pieces))]
        with self._shared.write(_name(index, "first")) as first:
            for number, batches in enumerate(self._rounds(self._states(index))):
                products = (
                    _product(states, number * len(mine) + place)
                    for mine, states in zip(pieces, made, strict=True)
                    for place in range(len(mine))
                )
                outputs = list(in_batches(batches, block.added(flat(batches), products)))
                for output in outputs:
                    put_finite(output)
                if not number:
                    first.append(outputs[0])

    def search(self, index: int, hidden: Sequence[Floats], sink: LayerSink) -> LayerReport:
        """Quantize the attention block, and compute it on the first batch.

        Args:
            index: of the layer.
            hidden: its inputs, batches of samples `[B, T, H]`.
            sink: takes its quantized weights.
        """
        attention = self._layer(self._source, index, "attention")
        result = self._golden_stick(index, attention, hidden[: self._searched], sink)
        del attention
        with self._shared.write(_name(index, "sample")) as sample:
            sample.append(self._compute(self._layer(result, index, "attention"), hidden[0]))
        report = result.report
        del result
        # golden-stick's own cells refer to themselves, so only the collector frees them.
        gc.collect()
        return report

    def quantize(
        self, index: int, mine: Sequence[int], piece: int, computed: Places, sink: LayerSink
    ) -> None:
        """Quantize some experts, and what lies beside them.

        Args:
            index: of the layer.
            mine: the experts.
            piece: number of this one.
            computed: the pieces of `experts`.
            sink: takes the quantized weights.
        """
        block = self._seen(index, computed, mine)
        (sample,) = self._shared.open(_name(index, "sample"))
        with self._shared.write(_name(index, "quantized", piece), hold=False) as made:
            for rows, product in block.quantized(flat([sample]), sink):
                made.append(_as_floats(rows))
                made.append(product)

    def finish(
        self, index: int, hidden: Sequence[Floats], computed: Places, quantized: Places
    ) -> LayerReport:
        """What is to be said of the feed-forward block, and of the whole layer's error.

        Args:
            index: of the layer.
            hidden: its inputs, batches of samples `[B, T, H]`.
            computed: the pieces of `experts`.
            quantized: those of `quantize`; an expert may be in two.
        """
        block = self._seen(index, computed)
        found: dict[int, tuple[HiddenStates, int]] = {}
        for piece, mine in enumerate(quantized):
            states = self._shared.stream(_name(index, "quantized", piece))
            found |= {expert: (states, place) for place, expert in enumerate(mine)}
        products = (_product(*found[expert]) for expert in sorted(found))
        (sample,), (first,) = (self._shared.open(_name(index, name)) for name in ("sample", "first"))
        made = block.added(flat([sample]), products).reshape(sample.shape)
        return LayerReport(
            self._config.family.layer_name(index),
            groups=block.groups(),
            expert_tokens=block.expert_tokens,
            lent_tokens=block.lent_tokens,
            error=relative_error(hidden[0], first, made),
        )

    def _states(self, index: int) -> Iterator[Floats]:
        """The states between the blocks, batch by batch."""
        for batch in range(self._batches):
            yield from self._shared.open(_name(index, "between", batch))

    def _seen(self, index: int, computed: Places, mine: Sequence[int] | None = None) -> FeedForwardPass:
        """The block with what all pieces have seen."""
        block = self._block(index, mine=mine)
        for piece, places in enumerate(computed):
            block.restore(places, list(self._shared.stream(_name(index, "ranges", piece))))
        return block


def discard_computed(store: HiddenStateStore, index: int, pieces: int) -> None:
    """Remove what `combine` has read of a layer that many pieces have computed."""
    for piece in range(pieces):
        store.discard(_name(index, "experts", piece))


def discard_layer(store: HiddenStateStore, index: int) -> None:
    """Remove all that pieces of a layer have left."""
    for path in store.folder.glob(f"layer-{index:05d}-*"):
        with writing(path):
            path.unlink()


def searched_path(store: HiddenStateStore, index: int) -> Path:
    """Where the quantized tensors of a layer's attention block wait for the rest of their shards."""
    return store.folder / f"layer-{index:05d}-searched.safetensors"


def _name(index: int, what: str, piece: int = 0) -> str:
    return f"layer-{index:05d}-{what}-{piece:03d}"


def _as_floats(rows: Any) -> Floats:
    """Numbers of tokens as the store keeps them: their bits."""
    return np.asarray(rows, np.int32).view(np.float32)


def _product(states: HiddenStates, place: int) -> Product:
    return states[2 * place].view(np.int32), states[2 * place + 1]
