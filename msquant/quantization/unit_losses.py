"""What quantizing each unit of a model costs, in KL, from one pass over its decoder layers.

The loss of a unit in a scheme is `gain * noise`. The noise is the mean over the tokens of a text of
`|quantized - y|^2 / |y|^2`, y being the decoder layer's output with everything else of the layer in floating
point: measured for every unit and scheme. The gain is what a layer's noise becomes at the end of the model:
the layer's output in its coarsest scheme goes on through all later layers in floating point, and the KL of
the predictions is divided by the noise that it began with. Noise that is small changes the predictions by its
square, so both are proportional. To carry every layer's noise on takes time by the square of their number,
so it is done for the first tokens of each text. Single layers stand out by several times: none is left out.

Such a sum is of first order: it leaves out what layers do to one another's noise. So the whole model in each
scheme is carried along too, every layer reading what the quantized one before gives: its KL, beside its sum,
is the interaction.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from mindspore import Tensor
from numpy.typing import NDArray

from msquant.algorithms.base import Algorithm
from msquant.checkpoint.hidden_states import HiddenStateStore
from msquant.checkpoint.weights import FloatLinear, Linear, WeightSource
from msquant.interrupts import check_interrupt
from msquant.models.config import ModelConfig
from msquant.models.layers import DecoderLayer, positions
from msquant.quantization.decoder_pass import DecoderPass
from msquant.schemes import Scheme

Floats = NDArray[np.float32]

GAIN_TOKENS = 64
"""Of each text, from its beginning, what gains are measured on."""

# Rounds of least squares in which the scales of rows and columns settle.
_ROUNDS = 8


@dataclass(frozen=True)
class UnitLinears:
    """Linears of one decoder layer that must share a scheme, and those that they are measured in.

    Attributes:
        name: of the unit.
        linears: their full names.
        schemes: to measure.
    """

    name: str
    linears: tuple[str, ...]
    schemes: tuple[Scheme, ...]


@dataclass(eq=False)
class QuantizedLayer:
    """A decoder layer in one scheme, as a `WeightSource` gives it."""

    linears: dict[str, Linear] = field(default_factory=dict)
    tensors: dict[str, Floats] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def tensor(self, name: str) -> Floats:
        """Return a tensor that is no linear's."""
        return self.tensors[name]

    def rows(self, name: str, indices: NDArray[np.integer]) -> Floats:
        """Return some elements of such a tensor."""
        return self.tensors[name][indices]

    def linear(self, module: str) -> Linear:
        """Return a linear layer."""
        return self.linears[module]

    def alone(self, unit: Sequence[str], floats: Mapping[str, Linear]) -> "QuantizedLayer":
        """The layer with the linears of one unit as they are, and all others as in `floats`."""
        return QuantizedLayer({**floats, **{name: self.linears[name] for name in unit}}, self.tensors)

    def floats(self, source: WeightSource) -> dict[str, Linear]:
        """Its linears in floating point, scaled in rows and columns as smoothing has scaled its own.

        Smoothing multiplies the columns of a group and divides rows before them, which the quantized weights
        show: the scales are those with which the source's weight is nearest to them.
        """
        made: dict[str, Linear] = {}
        for name, linear in self.linears.items():
            if isinstance(linear, FloatLinear):
                made[name] = linear
                continue
            plain = source.linear(name)
            assert isinstance(plain, FloatLinear)
            rows, columns = fitted_scales(plain.weight, linear.float_weight)
            bias = None if plain.bias is None else plain.bias * rows
            made[name] = FloatLinear(plain.weight * rows[:, None] * columns, bias)
        return made


class LayerInMemory:
    """A `LayerSink` that keeps a layer in memory."""

    def __init__(self, layer: QuantizedLayer) -> None:
        self._layer = layer

    def tensor(self, name: str, values: Floats) -> None:
        self._layer.tensors[name] = values

    def linear(self, module: str, linear: Linear) -> None:
        self._layer.linears[module] = linear


def fitted_scales(weight: Floats, scaled: Floats) -> tuple[Floats, Floats]:
    """Scales of rows `[N]` and columns `[K]` with which a weight `[N, K]` is nearest to another.

    Alternating least squares. A row or a column of zeros has scale 1.
    """
    squares, products = np.square(weight, dtype=np.float64), weight.astype(np.float64) * scaled
    rows, columns = np.ones(len(weight)), np.ones(weight.shape[1])
    for _ in range(_ROUNDS):
        columns = _divided(rows @ products, np.square(rows) @ squares)
        rows = _divided(products @ columns, squares @ np.square(columns))
    return rows.astype(np.float32), columns.astype(np.float32)


def _divided(over: NDArray[np.float64], under: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(over, under, out=np.ones_like(over), where=under > 0)


@dataclass(frozen=True)
class LayerNoise:
    """What a decoder layer adds, as a part of its output's square, on every text.

    Attributes:
        units: of each unit in each scheme, `[D]` for D texts.
        coarse: of the layer with all units in their coarsest scheme, `[D]`, on the first `GAIN_TOKENS`: what
            the gain is measured with.
    """

    units: dict[tuple[str, Scheme], NDArray[np.float64]]
    coarse: NDArray[np.float64]


class UnitLossPass:
    """Measures the units of one decoder layer after another.

    What is carried from layer to layer are batches of the texts: the float model's `[D, T, H]`, that of each
    scheme's whole model, and `[D, GAIN_TOKENS, H]` for each layer that was measured before.

    Args:
        config: the model's shape.
        source: its weights.
        policies: the algorithm with all linears in a scheme, by the scheme, the coarsest last.
        length: tokens in a calibration sample.
        text_length: tokens in a text.
        dtype: compute dtype, as `use_device` returned it.
        store: of what happens within a layer.
        step: called with what goes on.
    """

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        policies: Mapping[Scheme, Algorithm],
        length: int,
        text_length: int,
        dtype: Any,
        store: HiddenStateStore,
        step: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._config, self._source, self._dtype, self._step = config, source, dtype, step
        self._schemes = tuple(policies)
        self._quantizers = {
            scheme: DecoderPass(config, source, policy, length, dtype, store)
            for scheme, policy in policies.items()
        }
        last = policies[self._schemes[-1]]
        self._floats = DecoderPass(config, source, last, length, dtype, store)
        self._texts = DecoderPass(config, source, last, text_length, dtype, store)
        self._few = min(text_length, GAIN_TOKENS)
        self._branches = DecoderPass(config, source, last, self._few, dtype, store)
        self._places = {length: positions(config, length, dtype) for length in (text_length, self._few)}

    def layer(
        self,
        index: int,
        units: Sequence[UnitLinears],
        calibration: Sequence[Floats],
        put: Callable[[Floats], None],
        texts: Sequence[Floats],
        put_text: Callable[[Floats], None],
    ) -> LayerNoise:
        """Measure layer `index`.

        Args:
            index: of the layer.
            units: of it.
            calibration: its inputs on the calibration samples, batches `[B, T, H]`.
            put: takes its floating-point outputs on them.
            texts: its inputs on the texts: of the float model, of each scheme's whole model, and of every
                layer that was measured before.
            put_text: takes the outputs, and behind them this layer's in its coarsest scheme.

        Raises:
            MsquantError: as `DecoderPass.run`.
        """
        self._floats.compute(index, calibration, put)
        outputs: list[Floats] = []
        self._texts.compute(index, texts[:1], outputs.append)
        if earlier := texts[1 + len(self._schemes) :]:
            self._branches.compute(index, earlier, outputs.append)
        expected = outputs[0]
        put_text(expected)
        noise: dict[tuple[str, Scheme], NDArray[np.float64]] = {}
        coarsest = QuantizedLayer()
        for place, (scheme, quantizer) in enumerate(self._quantizers.items()):
            self._step(f"quantizing to {scheme}")
            kept = QuantizedLayer()
            quantizer.run(index, calibration, lambda output: None, LayerInMemory(kept))
            put_text(self._compute(kept, index, texts[1 + place]))
            floats = kept.floats(self._source)
            for unit in units:
                check_interrupt()
                if scheme in unit.schemes:
                    self._step(f"{scheme} of {unit.name}")
                    found = self._compute(kept.alone(unit.linears, floats), index, texts[0])
                    noise[unit.name, scheme] = relative_noise(expected, found)
            # Units that cannot have this scheme stay in floating point; the coarsest of the layer comes last.
            rough = [name for unit in units if scheme in unit.schemes for name in unit.linears]
            if rough:
                coarsest = kept.alone(rough, floats)
        branch = self._compute(coarsest, index, texts[0][:, : self._few])
        for output in [*outputs[1:], branch]:
            put_text(output)
        return LayerNoise(noise, relative_noise(expected[:, : self._few], branch))

    def _compute(self, source: QuantizedLayer, index: int, hidden: Floats) -> Floats:
        layer = DecoderLayer(self._config, source, index, self._dtype)
        output: Floats = layer(Tensor(hidden, self._dtype), self._places[hidden.shape[1]]).asnumpy()
        return output.astype(np.float32, copy=False)


def relative_noise(expected: Floats, found: Floats) -> NDArray[np.float64]:
    """`mean of |found - expected|^2 / |expected|^2` over the tokens of every text, `[D, T, H]` to `[D]`."""
    squares = np.square(expected, dtype=np.float64).sum(axis=2)
    wrong = np.square(found - expected, dtype=np.float64).sum(axis=2)
    return np.asarray(np.divide(wrong, squares, out=np.zeros_like(squares), where=squares > 0).mean(axis=1))
