"""How long a running quantization will still take, from the pace of what it has done."""

import time
from dataclasses import replace
from math import prod

from msquant.models.config import ModelConfig
from msquant.progress import Part, Progress

# The evaluation runs the float model and the result.
MODELS = 2

_OTHER = {"dense": "experts", "experts": "dense"}


class Forecast:
    """Says after every part of a quantization what is left of it, to the very end.

    What is to come is counted in weights: a decoder layer at the pace of those of its kind, and before the
    first with experts at that of the others; the evaluation at that of the float model's first layer, until
    it has begun; a further format at that of the two ends.

    Args:
        progress: the callbacks of whoever started the quantization.
        config: the model's shape.
        done: layers that an earlier run has finished.
        evaluated: whether the result is evaluated at the end.
        exports: how many further formats are to be written.
        predicted: multi-token-prediction layers that are quantized after the decoder layers.

    Attributes:
        progress: the callbacks to run the quantization with.
    """

    def __init__(
        self,
        progress: Progress,
        config: ModelConfig,
        done: int,
        evaluated: bool,
        exports: int,
        predicted: int = 0,
    ) -> None:
        count = config.num_hidden_layers + predicted
        layers = [sum(map(prod, config.layer_shapes(index).values())) for index in range(count)]
        kinds = ["experts" if config.has_experts(index) else "dense" for index in range(count)]
        ends = sum(prod(config.shapes[name]) for name in config.end_names)
        # What is to come of each kind, in weights; and the seconds and weights of what is done.
        self._layers = list(zip(kinds, layers, strict=True))[done:]
        head = config.vocab_size * config.hidden_size
        self._evaluated = [*layers[: config.num_hidden_layers], head] if evaluated else []
        self._exports = [sum(layers) + ends] * exports
        self._first, self._ends = layers[0], 0 if done else ends
        self._paces: dict[str, tuple[float, float]] = {}
        self._report, self._last = progress, time.monotonic()
        self.progress = replace(progress, lap=self._lap)

    def _seconds(self, kind: str, weights: float) -> float:
        taken, done = self._paces.get(kind) or self._paces.get(_OTHER.get(kind, kind)) or (0.0, 1.0)
        return taken / done * weights

    def _lap(self, part: Part) -> None:
        self._report.lap(part)
        if part == "attention":
            return
        now = time.monotonic()
        took, self._last = now - self._last, now
        if part == "ends" and self._ends:
            self._paces["export"] = took, self._ends
        elif part == "evaluation sample":
            self._paces["head"] = MODELS * took, self._first
        elif part == "layer":
            self._add(took, *self._layers.pop(0))
        elif part == "evaluated layer":
            self._add(took, part, self._evaluated.pop(0))
            self._paces["head"] = self._paces[part]
        elif part == "head":
            self._evaluated.clear()
        elif part == "export":
            self._exports.pop()
        if part in ("layer", "evaluated layer", "head", "export"):
            layers = sum(self._seconds(*layer) for layer in self._layers)
            evaluation = self._seconds("head", sum(self._evaluated))
            self._report.left(layers + evaluation + self._seconds("export", sum(self._exports)))

    def _add(self, seconds: float, kind: str, weights: float) -> None:
        before = self._paces.get(kind, (0.0, 0.0))
        self._paces[kind] = before[0] + seconds, before[1] + weights
