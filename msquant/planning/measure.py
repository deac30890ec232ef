"""The time that a quantization will take: samples of the model are quantized here, and scaled by their work.

Each sample goes through `pipeline.quantize` by the recipe, from reading to the last format. The first is as
small as can be and shows what depends on no size. The last has all tokens that a few seconds allow. Where it
is cut, one with half of them comes before it, which tells what depends on tokens from what does not.
"""

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.disk import writing
from msquant.errors import MsquantError
from msquant.flows.layer_graph import Kind
from msquant.flows.pipeline import quantize
from msquant.flows.source import shapes_plans
from msquant.formats.folder_plan import FolderPlan
from msquant.inference.serving_settings import ServingSettings
from msquant.models.config import ModelConfig
from msquant.planning.blocks import LayerBlocks
from msquant.planning.sample import layer_kinds, sample_config, write_sample
from msquant.planning.work import Work, layer_work
from msquant.progress import Part, Progress
from msquant.recipe.recipe import CalibrationSettings, Recipe

MOST_TOKENS = 2048
"""Calibration tokens of a sample, if that is a sequence at least."""

SPREAD, CUT_SPREAD = 1.3, 1.7
"""What an estimate may be off by: from a whole layer with all its tokens, and from a part of them."""

READS = 3
"""How often a weight is read at most: to be computed, to be quantized, to be evaluated."""

EVALUATION_TEXTS = 4
_PIECE_BYTES, _PIECES = 64 << 20, 3


@dataclass(frozen=True)
class Span:
    """Seconds: `low` on a machine that does nothing else, `high` on one as busy as when it was measured."""

    low: float
    high: float

    def __add__(self, other: "Span") -> "Span":
        return Span(self.low + other.low, self.high + other.high)

    def __mul__(self, factor: float) -> "Span":
        return Span(self.low * factor, self.high * factor)


NOTHING = Span(0, 0)


@dataclass(frozen=True)
class Machine:
    """What the machine gave while it was measured.

    Attributes:
        cores: that this process may use.
        load: processes that wanted to run in the minute before, on average.
        share: seconds of computing that this process got in a second, of all cores together.
    """

    cores: int
    load: float
    share: float


@dataclass(frozen=True)
class Sample:
    """A sample and what the parts of its quantization took: `low` in seconds of computing, of all cores
    together, `high` in seconds of time.

    Attributes:
        config: its shape.
        recipe: with its tokens.
        together: of each layer what is quantized first, see `work.layer_work`.
        apart: and what comes after that.
        evaluated: of each layer in the evaluation.
        once: of every other part.
    """

    config: ModelConfig
    recipe: Recipe
    together: list[Span] = field(default_factory=list)
    apart: list[Span] = field(default_factory=list)
    evaluated: list[Span] = field(default_factory=list)
    once: dict[Part, Span] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Of its calibration."""
        return self.recipe.calibration.total * self.recipe.calibration.sequence_length

    @property
    def folder(self) -> FolderPlan:
        """What is written in the first format."""
        return shapes_plans(self.recipe, self.config, ())[0]


class Measured:
    """What the samples took, and by that what the model will.

    Args:
        recipe: what is done.
        config: the model's shape.
        samples: measured, the smallest first.
        machine: what it gave.
        read: bytes in a second that shards are read with from the disk.

    Attributes:
        sample: the last one.
        machine: as given.
        read: as given.
    """

    def __init__(
        self, recipe: Recipe, config: ModelConfig, samples: Sequence[Sample], machine: Machine, read: float
    ) -> None:
        self._recipe, self._config, self._samples = recipe, config, samples
        self.sample, self.machine, self.read = samples[-1], machine, read
        kinds = (LayerBlocks(config, recipe.quantization, index).kind for index in layer_kinds(config))
        self._places = {kind: place for place, kind in enumerate(kinds)}

    def layer(self, blocks: LayerBlocks, tokens: int, rounds: int, nbytes: int) -> Span:
        """To quantize and write a decoder layer of so many bytes; the others as `layer_work` takes them."""
        first, then = self._quantization(blocks, tokens, rounds)
        return self._range(first + then, nbytes)

    def evaluated_layer(self, blocks: LayerBlocks) -> Span:
        """To run a decoder layer of the float model and of the result on the evaluation's tokens."""
        if not self._recipe.evaluation.sequences:
            return NOTHING
        first, then = self._evaluation(blocks, _evaluated_tokens(self._recipe, self._config))
        return self._range(first + then)

    def task_seconds(self, blocks: LayerBlocks, tokens: int, rounds: int) -> dict[Kind, float]:
        """Seconds of one core that the tasks on a decoder layer take, of each kind together.

        What the evaluation takes says what the floating-point pass does; where nothing was evaluated, that is
        all that the quantization takes.

        Args:
            blocks: the layer.
            tokens: of the calibration.
            rounds: as `layer_work` takes them.
        """
        searched, apart = self._quantization(blocks, tokens, rounds)
        attention, experts = searched, apart
        if self._recipe.evaluation.sequences:
            # The evaluation computes the result's layer as well.
            attention, experts = (part * 0.5 for part in self._evaluation(blocks, tokens))
        return {
            "compute": attention.low + experts.low,
            "pass": searched.low + apart.low,
            "quantize": max(0.0, apart.low - experts.low) if blocks.experts else searched.low + apart.low,
            "attention": attention.low,
            "experts": experts.low,
            "search": searched.low,
        }

    def task_factors(self, *, here: bool) -> tuple[float, float]:
        """What `task_seconds` may be off by, faster and slower.

        Args:
            here: whether tasks are done on this machine, which may be busy.
        """
        return 1 / self._spread, self._spread / (min(1.0, self.machine.share) if here else 1)

    def once(self, part: Part, times: float = 1, nbytes: int = 0) -> Span:
        """A part that takes so many times as long as the last sample's, and reads so many bytes."""
        return self._range(self.sample.once.get(part, NOTHING) * times, nbytes)

    def _quantization(self, blocks: LayerBlocks, tokens: int, rounds: int) -> tuple[Span, Span]:
        """What the two parts of a decoder layer's quantization take, see `layer_work`, before `_range`."""
        place, works = self._works(blocks, [sample.tokens for sample in self._samples])
        together, apart = layer_work(blocks, tokens, rounds)
        return (
            _scaled([s.together[place] for s in self._samples], [w[0] for w in works], together),
            _scaled([s.apart[place] for s in self._samples], [w[1] for w in works], apart),
        )

    def _evaluation(self, blocks: LayerBlocks, tokens: int) -> tuple[Span, Span]:
        """What the evaluation of both parts takes on so many tokens, before `_range`."""
        place, works = self._works(blocks, [_evaluated_tokens(s.recipe, s.config) for s in self._samples])
        both = [a + b for a, b in works]
        taken = [sample.evaluated[place] for sample in self._samples]
        together, apart = layer_work(blocks, tokens)
        # The parts were not measured apart; where nothing goes one by one, the first is all there is.
        whole, first = _scaled(taken, both, together + apart), _scaled(taken, both, together)
        return first, Span(max(0.0, whole.low - first.low), max(0.0, whole.high - first.high))

    @property
    def _spread(self) -> float:
        return CUT_SPREAD if self._samples[2:] else SPREAD

    def _range(self, taken: Span, nbytes: int = 0) -> Span:
        """Of what took so long and reads so many bytes of the source, each at least once."""
        disk, low = nbytes / self.read, taken.low / max(1, self.machine.share)
        return Span(low / self._spread + disk, max(low, taken.high) * self._spread + READS * disk)

    def _works(self, blocks: LayerBlocks, tokens: Sequence[int]) -> tuple[int, list[tuple[Work, Work]]]:
        """Which layer of the samples is of this kind, and its work in each."""
        place = self._places[blocks.kind]
        policy = self._recipe.quantization
        return place, [
            layer_work(LayerBlocks(sample.config, policy, place), count)
            for sample, count in zip(self._samples, tokens, strict=True)
        ]


def _evaluated_tokens(recipe: Recipe, config: ModelConfig) -> int:
    settings = recipe.evaluation
    length = min(settings.sequence_length, config.longest)
    return EVALUATION_TEXTS * settings.sequences * length


def _scaled(taken: Sequence[Span], works: Sequence[Work], work: Work) -> Span:
    """What `work` takes, from what the samples took, by computing and by time."""
    sides = zip(*((each.low, each.high) for each in taken), strict=True)
    return Span(*(_seconds(side, works, work) for side in sides))


def _seconds(taken: Sequence[float], works: Sequence[Work], work: Work) -> float:
    """As many a piece as in the smallest sample, as many a product as half of the tokens took less, and what
    is left of the last sample by its weights."""
    if not work.weights:
        return 0.0
    each = taken[0] / works[0].pieces
    last, product = max(0.0, taken[-1] - each * works[-1].pieces), 0.0
    if half := works[1:-1]:
        fewer = works[-1].products - half[0].products
        product = min(max(0.0, taken[-1] - taken[1]) / fewer, last / works[-1].products)
    weight = (last - product * works[-1].products) / works[-1].weights
    return each * work.pieces + product * work.products + weight * work.weights


def measure(recipe: Recipe, config: ModelConfig, output: Path, weights: Checkpoint | None) -> Measured:
    """Quantize samples of a model on this machine, in a folder beside the output that is removed again.

    Args:
        recipe: what is done to the model.
        config: its shape.
        output: the folder that is to be made.
        weights: the model's; without them the samples get random ones.

    Raises:
        MsquantError: a weight is damaged, or the disk is full or cannot be written.
    """
    load, started, computed = os.getloadavg()[0], time.perf_counter(), time.process_time()
    samples = _samples(recipe, config)
    place = next(folder for folder in output.absolute().parents if folder.is_dir())
    with writing(place), tempfile.TemporaryDirectory(prefix=".msquant-plan-", dir=place) as folder:
        for number, sample in enumerate(samples):
            _quantize(Path(folder) / str(number), sample, config, weights)
        read = _read_rate(weights or Checkpoint.open(Path(folder) / str(number)))
    # The first one loads MindSpore.
    samples[-1].once["start"] = samples[0].once["start"]
    share = (time.process_time() - computed) / (time.perf_counter() - started)
    return Measured(recipe, config, samples, Machine(len(os.sched_getaffinity(0)), load, share), read)


def _samples(recipe: Recipe, config: ModelConfig) -> list[Sample]:
    settings = recipe.calibration
    length = min(settings.sequence_length, MOST_TOKENS)
    count = min(settings.total, MOST_TOKENS // length)
    small = sample_config(config, recipe.quantization, small=True)
    whole = sample_config(config, recipe.quantization)
    layers = [sum(map(prod, config.layer_shapes(index).values())) for index in layer_kinds(config)]
    kept = [sum(map(prod, whole.layer_shapes(index).values())) for index in range(len(layers))]
    samples = [_sample(small, recipe, 1, min(length, 32), 4), _sample(whole, recipe, count, length, 1)]
    if kept != layers or count * length < settings.total * settings.sequence_length:
        half = (count // 2, length) if count > 1 else (1, max(2, length // 2))
        samples.insert(1, _sample(whole, recipe, *half, 2))
    return samples


def _sample(config: ModelConfig, recipe: Recipe, samples: int, length: int, part: int) -> Sample:
    """A sample with so many calibration tokens, and one part of `part` of the evaluation's."""
    settings = CalibrationSettings(samples=samples, sequence_length=length)
    # The NPUs that are to share the model's heads cannot share the sample's, which are fewer.
    recipe = recipe.model_copy(update={"calibration": settings, "serving": ServingSettings()})
    tokens = max(2, recipe.evaluation.sequence_length // part)
    return Sample(config, recipe.replace("evaluation", sequence_length=tokens))


def _quantize(folder: Path, sample: Sample, model: ModelConfig, weights: Checkpoint | None) -> None:
    """Quantize a sample and note what the parts take."""
    folder.mkdir()
    write_sample(folder, sample.config, model, weights)
    attention: list[Span] = []
    last = time.process_time(), time.perf_counter()

    def lap(part: Part) -> None:
        nonlocal last
        before, last = last, (time.process_time(), time.perf_counter())
        took = Span(last[0] - before[0], last[1] - before[1])
        if part == "attention":
            attention.append(took)
        elif part == "layer":
            sample.together.append(attention.pop() if (apart := bool(attention)) else took)
            sample.apart.append(took if apart else NOTHING)
        elif part == "evaluated layer":
            sample.evaluated.append(took)
        else:
            sample.once[part] = sample.once.get(part, NOTHING) + took

    try:
        quantize(
            sample.recipe, folder / "out", source=str(folder), progress=Progress(lap=lap), remember=False
        )
    except (MsquantError, KeyboardInterrupt) as error:
        # They say that the same command would continue here.
        error.__notes__ = []
        raise


def _read_rate(weights: Checkpoint) -> float:
    """Bytes in a second, from pieces of the largest shard that the system is asked to forget before."""
    shard = max(weights.shards.values(), key=lambda shard: shard.size)
    size = min(_PIECE_BYTES, shard.size)
    starts = {(shard.size - size) * i // (_PIECES - 1) for i in range(_PIECES)}
    buffer, seconds = bytearray(size), 0.0
    with shard.path.open("rb", buffering=0) as file:
        for start in starts:
            os.posix_fadvise(file.fileno(), start, size, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            os.preadv(file.fileno(), [buffer], start)
            seconds += time.perf_counter() - began
    return len(starts) * size / seconds
