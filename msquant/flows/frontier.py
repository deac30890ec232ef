"""What every unit of a model costs in every scheme that a server takes, from one pass, and what follows.

The losses are measured on the choice texts, which are the builtin evaluation texts; how is said in
`quantization/unit_losses.py`.
"""

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msquant.algorithms import DEFAULT, find_algorithm
from msquant.algorithms.base import Algorithm
from msquant.calibration.evaluation import evaluation_domains
from msquant.calibration.tokens import Samples, spread_windows
from msquant.checkpoint.disk import writing
from msquant.checkpoint.hidden_states import HiddenStateStore
from msquant.checkpoint.journal import Journal
from msquant.checkpoint.memory import MEMORY_BUDGET
from msquant.checkpoint.tensor_spec import TensorSpec
from msquant.checkpoint.tokenizer import load_tokenizer
from msquant.errors import RecipeError, choices
from msquant.evaluation.inputs import Text
from msquant.flows.calibration import calibration_of, require_sources
from msquant.flows.layer_work import embed
from msquant.flows.source import Source, batch_tokens, folder_plan, open_model, require_target, rotated
from msquant.formats.dtypes import DTYPE_CODES, stored_dtype
from msquant.formats.folder_plan import FolderPlan, plan_folder
from msquant.formats.registry import FormatName, find_format, format_names
from msquant.formats.servers import SERVER_NAMES
from msquant.interrupts import check_interrupt, deferred_interrupts
from msquant.models.config import ModelConfig
from msquant.models.device import require_device, use_device
from msquant.progress import Progress
from msquant.quantization.assignment import Assignment, Option, Unit, frontier, smallest
from msquant.quantization.layer_schemes import layer_linears
from msquant.recipe.recipe import WITHOUT_TEXT, Recipe
from msquant.schemes import FLOAT, W4A8_DYNAMIC, W4A16, W8A8, W8A8_DYNAMIC, W8A16, Scheme, parse_scheme

CHOICE_TOKENS = 256
"""Of each choice text, from its beginning."""

FOUR_BITS_ALGORITHM = "gptq"
"""In place of the default algorithm where there are int4 weights to choose from."""

FEED_FORWARD = "feed_forward"
"""Name of the unit that all experts of a layer are, with those beside them."""

LADDER: tuple[tuple[Scheme, ...], ...] = (
    (W8A16, W8A8_DYNAMIC, W8A8),
    (W4A16, W4A16.in_groups(64), W4A16.in_groups(32), W4A8_DYNAMIC),
)
"""The schemes that are tried where none are named: of every number of bits the first that the server takes.

Those of one rung have the same bytes, but for scales, and the first loses least.
"""


@dataclass(frozen=True)
class UnitLosses:
    """What the pass found.

    Attributes:
        texts: names of the texts that losses are of, in their order.
        units: of the whole model, in order; the losses of their options are what they cost alone.
        schemes: what was measured beside floating point, the coarsest last.
        first_order: of each scheme, the sum of what its units cost alone, on every text.
        whole: KL of the whole model in each scheme, on every text.

    A sum of what units cost alone is right where it is small, and too high where it is large. What it becomes
    is known of the whole model in each scheme, and interpolated between these in logarithms, text by text.
    """

    texts: tuple[str, ...]
    units: tuple[Unit, ...]
    schemes: tuple[Scheme, ...]
    first_order: Mapping[Scheme, tuple[float, ...]]
    whole: Mapping[Scheme, tuple[float, ...]]

    @property
    def interaction(self) -> dict[str, list[float]]:
        """What the whole model in each scheme loses, in units of the first-order sum, on every text."""
        return {
            str(scheme): [
                whole / alone if alone else 1.0
                for whole, alone in zip(self.whole[scheme], self.first_order[scheme], strict=True)
            ]
            for scheme in self.schemes
        }

    def predicted(self, sums: Sequence[float]) -> tuple[float, ...]:
        """The KL on every text that units make which cost so much alone, in sum."""
        return tuple(
            _along(total, alone, whole) for total, (alone, whole) in zip(sums, self._known(), strict=True)
        )

    def sums(self, kl: float) -> tuple[float, ...]:
        """What units may cost alone, in sum, on every text, to make that KL: the reverse of `predicted`."""
        return tuple(_along(kl, whole, alone) for alone, whole in self._known())

    def _known(self) -> list[tuple[list[float], list[float]]]:
        """Of every text, ascending: sums, and what they become."""
        made = []
        for place in range(len(self.texts)):
            pairs = sorted((self.first_order[s][place], self.whole[s][place]) for s in self.schemes)
            kept: list[tuple[float, float]] = []
            for alone, whole in pairs:
                if alone > (kept[-1][0] if kept else 0) and whole > (kept[-1][1] if kept else 0):
                    kept.append((alone, whole))
            made.append(([alone for alone, _ in kept], [whole for _, whole in kept]))
        return made

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, which `from_dict` takes."""
        return {
            "texts": list(self.texts),
            "schemes": list(map(str, self.schemes)),
            "first_order": {str(scheme): list(values) for scheme, values in self.first_order.items()},
            "whole": {str(scheme): list(values) for scheme, values in self.whole.items()},
            "units": [
                {
                    "layer": unit.layer,
                    "name": unit.name,
                    "linears": list(unit.linears),
                    "options": [
                        {"scheme": str(each.scheme), "bytes": each.nbytes, "losses": list(each.losses)}
                        for each in unit.options
                    ],
                }
                for unit in self.units
            ],
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "UnitLosses":
        """What `as_dict` gave."""
        units = tuple(
            Unit(
                unit["layer"],
                unit["name"],
                tuple(unit["linears"]),
                tuple(
                    Option(parse_scheme(each["scheme"]), each["bytes"], tuple(each["losses"]))
                    for each in unit["options"]
                ),
            )
            for unit in raw["units"]
        )
        return cls(
            tuple(raw["texts"]),
            units,
            tuple(map(parse_scheme, raw["schemes"])),
            {parse_scheme(word): tuple(values) for word, values in raw["first_order"].items()},
            {parse_scheme(word): tuple(values) for word, values in raw["whole"].items()},
        )


def _along(value: float, known: Sequence[float], becomes: Sequence[float]) -> float:
    """Interpolated in logarithms; before the first and behind the last known, by the ratio of that one."""
    if not known or value <= 0:
        return value
    if known[0] < value < known[-1]:
        return float(np.exp(np.interp(np.log(value), np.log(known), np.log(becomes))))
    end = 0 if value <= known[0] else -1
    return value * becomes[end] / known[end]


def choice_texts(folder: Path, config: ModelConfig) -> list[Text]:
    """The texts that units are measured on. Raises CalibrationError.

    Args:
        folder: the model's, for its tokenizer.
        config: its shape.
    """
    tokenizer, length = load_tokenizer(folder), min(CHOICE_TOKENS, config.longest)
    return [
        Text(domain.name, spread_windows(domain, tokenizer, sequences=1, sequence_length=length))
        for domain in evaluation_domains()
    ]


def model_units(recipe: Recipe, source: Source, schemes: Sequence[Scheme] = ()) -> list[Unit]:
    """The units of a model with the schemes that they can have, losses still 0 and without texts.

    Args:
        recipe: its format and serving section say what a server takes; linears that it keeps in floating
            point stay there.
        source: the model.
        schemes: to choose from beside floating point, in place of those of `LADDER`.

    Raises:
        RecipeError: the server takes none of the schemes for any linear.
    """
    config, plan = source.config, folder_plan(recipe, source)
    places = [
        (index, name, linears)
        for index in range(config.num_hidden_layers)
        for name, linears in _units_of(recipe, config, index).items()
    ]
    able: list[list[Scheme]] = [
        [FLOAT] if _is_served(recipe, config, index, linears, FLOAT) else [] for index, _, linears in places
    ]
    for rung in [(scheme,) for scheme in schemes if not scheme.is_float] or LADDER:
        for place, scheme in enumerate(_covered(recipe, config, places, rung)):
            able[place] += [scheme] if scheme is not None else []
    units = []
    for (index, name, linears), taken in zip(places, able, strict=True):
        shapes = config.layer_shapes(index)
        options = tuple(Option(scheme, _bytes(plan, shapes, linears, scheme), ()) for scheme in taken)
        if options:
            units.append(Unit(index, name, linears, options))
    if not any(not option.scheme.is_float for unit in units for option in unit.options):
        asked = ", ".join(map(str, schemes)) or "quantized linears"
        raise RecipeError(
            f"{plan.format.consumer} takes no linear of this model in {asked}",
            where="--schemes" if schemes else "--for",
            remedy=f"this format has {', '.join(map(str, plan.format.words))}; name others or another server",
        )
    return units


def _covered(
    recipe: Recipe,
    config: ModelConfig,
    places: Sequence[tuple[int, str, tuple[str, ...]]],
    rung: Sequence[Scheme],
) -> list[Scheme | None]:
    """A scheme of the rung for each place, as few of them as will do: each takes a pass over the model."""
    chosen: list[Scheme | None] = [None] * len(places)
    left, open_rung = set(range(len(places))), list(rung)
    while left and open_rung:
        served = {
            scheme: [
                place
                for place in left
                if _is_served(recipe, config, places[place][0], places[place][2], scheme)
            ]
            for scheme in open_rung
        }
        best = max(open_rung, key=lambda scheme: (len(served[scheme]), -open_rung.index(scheme)))
        if not served[best]:
            break
        for place in served[best]:
            chosen[place] = best
        left -= set(served[best])
        open_rung.remove(best)
    return chosen


def _units_of(recipe: Recipe, config: ModelConfig, index: int) -> dict[str, tuple[str, ...]]:
    """The linears of a layer that may be quantized, those that must share a scheme together."""
    policy, layer = recipe.quantization, config.family.layer_name(index)
    free = [name for name in layer_linears(config, index) if not policy.scheme(name).is_float]
    made: dict[str, tuple[str, ...]] = {}
    for group in config.groups(index):
        names = {f"{layer}.{linear}" for linear in group.linears}
        if mine := tuple(name for name in free if name in names):
            made[group.name] = mine
    grouped = {name for names in made.values() for name in names}
    if rest := tuple(name for name in free if name not in grouped):
        made[FEED_FORWARD] = rest
    return made


def _is_served(
    recipe: Recipe, config: ModelConfig, index: int, linears: Sequence[str], scheme: Scheme
) -> bool:
    """Whether the format's server runs a layer with these linears in a scheme."""
    policy = recipe.quantization
    others = {name: policy.scheme(name) for name in layer_linears(config, index)}
    for rest in (others, dict.fromkeys(others, FLOAT)):
        mixed = rest | dict.fromkeys(linears, scheme)
        try:
            layer = [config.layer_shapes(index)]
            made = plan_folder(layer, mixed, config.raw, config.dtype, format_name=recipe.formats[0])
            require_target(recipe, [made])
        except RecipeError:
            continue
        return True
    return False


def _bytes(
    plan: FolderPlan, shapes: Mapping[str, tuple[int, ...]], linears: Sequence[str], scheme: Scheme
) -> int:
    total = 0
    for module in linears:
        weight, bias = shapes[f"{module}.weight"], shapes.get(f"{module}.bias")
        if scheme.is_float:
            code = DTYPE_CODES[stored_dtype(f"{module}.weight", plan.dtype)]
            parts = [TensorSpec(f"{module}.weight", code, tuple(weight))]
            parts += [TensorSpec(f"{module}.bias", code, tuple(bias))] if bias else []
        else:
            parts = plan.format.linear_specs(module, tuple(weight), scheme, plan.dtype, bias is not None)
        total += sum(part.nbytes for part in parts)
    return total


def measured_schemes(units: Sequence[Unit]) -> tuple[Scheme, ...]:
    """The schemes of units beside floating point, that of fewest bits, and so the coarsest, last."""
    found = dict.fromkeys(option.scheme for unit in units for option in unit.options)

    def fineness(scheme: Scheme) -> tuple[int, bool, bool]:
        assert scheme.weights is not None
        return scheme.weights.bits, scheme.is_weight_only, not scheme.is_static

    return tuple(sorted((s for s in found if not s.is_float), key=fineness, reverse=True))


def assigned(recipe: Recipe, units: Sequence[Unit], assignment: Assignment) -> Recipe:
    """A recipe that gives every unit its scheme; what it keeps in floating point beside them stays so.

    The commonest scheme is that of all others, so that few names are needed.
    """
    schemes = {
        linear: option.scheme
        for unit, option in zip(units, assignment.chosen, strict=True)
        for linear in unit.linears
    }
    counted = Counter(schemes.values())
    common = max(counted, key=lambda scheme: (not scheme.is_float, counted[scheme]))
    rules: list[tuple[str, Scheme]] = []
    for unit, option in zip(units, assignment.chosen, strict=True):
        if option.scheme != common:
            rules += [(name, option.scheme) for name in _names(unit)]
    kept = [rule for rule in recipe.quantization.schemes if rule[1].is_float and rule[0] != "*"]
    return recipe.replace("quantization", schemes=(*rules, *kept, ("*", common)))


def _names(unit: Unit) -> tuple[str, ...]:
    """Patterns that match the linears of a unit: their names, or for all experts that of the block."""
    if unit.name != FEED_FORWARD:
        return unit.linears
    first = unit.linears[0].split(".")
    common = [
        part for place, part in enumerate(first) if all(n.split(".")[place] == part for n in unit.linears)
    ]
    return (f"{'.'.join(common)}.*",)


def measure_losses(
    subject: "Subject",
    folder: Path,
    *,
    device: str = "cpu",
    memory_budget: int,
    verbose: bool = False,
    progress: Progress | None = None,
) -> UnitLosses:
    """Measure every unit in every scheme that it can have, or continue what a call has begun in that folder.

    Args:
        subject: the model with its units; the recipe's algorithm quantizes, its schemes are replaced.
        folder: of a journal of the layers that are measured, and of what is carried to the next; made if it
            does not exist, and left.
        device: `cpu` or `ascend`.
        memory_budget: bytes of hidden states held in memory.
        verbose: show golden-stick's own log.
        progress: callbacks; a layer's record holds its `index` and the `noise` of its units in the coarsest
            scheme.

    Raises:
        MsquantError: a tensor or a text is missing or damaged, the disk is full, or the folder is of a call
            with other input.
    """
    progress = progress or Progress()
    recipe, source, units, samples = subject.recipe, subject.source, subject.units, subject.samples
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    journal = Journal.open(folder, losses_identity(subject, device))
    progress.stage("loading MindSpore and golden-stick")
    from msquant.evaluation.branches import branch_divergences
    from msquant.kernels import golden_stick
    from msquant.kernels.blas import one_blas_thread
    from msquant.quantization.unit_losses import UnitLinears, UnitLossPass

    dtype = use_device(device)
    golden_stick.set_log_level(verbose)
    config, schemes = source.config, measured_schemes(units)
    count, finished = config.num_hidden_layers, len(journal.records)
    texts = choice_texts(source.folder, config)
    tokens = np.concatenate([text.tokens for text in texts])
    policies = {scheme: _measured_by(_uniform(recipe, units, scheme), scheme) for scheme in schemes}
    with deferred_interrupts(), one_blas_thread():
        calibration = HiddenStateStore(folder / "calibration", memory_budget // 2)
        branches = HiddenStateStore(folder / "texts", memory_budget // 2)
        within = HiddenStateStore(folder / "within", memory_budget)
        lengths = samples.tokens.shape[1], tokens.shape[1]
        decoder = UnitLossPass(config, source.weights, policies, *lengths, dtype, within, progress.step)
        progress.layers(count, finished)
        if not finished:
            embed(source, samples.batches(batch_tokens(config)), calibration, dtype)
            embed(source, [tokens] * (1 + len(schemes)), branches, dtype)
        for index in range(finished, count):
            mine = [
                UnitLinears(unit.name, unit.linears, tuple(option.scheme for option in unit.options))
                for unit in units
                if unit.layer == index
            ]
            with calibration.write(index + 1) as put, branches.write(index + 1) as put_text:
                noise = decoder.layer(
                    index, mine, calibration.open(index), put.append, branches.open(index), put_text.append
                )
            measured = [[name, str(scheme), value.tolist()] for (name, scheme), value in noise.units.items()]
            journal.append({"index": index, "units": measured, "coarse": noise.coarse.tolist()})
            calibration.discard(index)
            branches.discard(index)
            # Of the coarsest scheme of each: the dictionary has that last.
            last = {name: float(value.mean()) for (name, _), value in noise.units.items()}
            progress.layer({"index": index, "noise": last})
            check_interrupt()
        progress.stage("comparing the predicted tokens")
        states = branches.open(count)
        models, apart = states[: 1 + len(schemes)], states[1 + len(schemes) :]
        whole = branch_divergences(config, source.weights, models, dtype)
        few = models[0][:, : apart[0].shape[1]]
        own = branch_divergences(config, source.weights, [few, *apart], dtype)
    return _losses([text.name for text in texts], units, schemes, journal.records, whole, own)


def _losses(
    texts: Sequence[str],
    units: Sequence[Unit],
    schemes: Sequence[Scheme],
    layers: Sequence[Mapping[str, Any]],
    whole: NDArray[np.float64],
    own: NDArray[np.float64],
) -> UnitLosses:
    """What follows from what was measured.

    Args:
        texts: their names.
        units: without losses.
        schemes: that were measured.
        layers: the journal's records.
        whole: KL of the whole model in each scheme, `[S, D]`.
        own: KL that the noise of each layer makes, `[L, D]`.
    """
    noise = np.array([layer["coarse"] for layer in layers])
    gains = np.divide(own, noise, out=np.zeros_like(own), where=noise > 0)
    alone = {
        (layer["index"], name, parse_scheme(word)): gains[layer["index"]] * values
        for layer in layers
        for name, word, values in layer["units"]
    }
    zero = np.zeros(len(texts))
    sums = {s: sum((loss for (*_, scheme), loss in alone.items() if scheme == s), zero) for s in schemes}

    def with_losses(unit: Unit, option: Option) -> Option:
        loss = zero
        if not option.scheme.is_float:
            loss = alone[unit.layer, unit.name, option.scheme]
        return replace(option, losses=tuple(map(float, loss)))

    found = tuple(
        replace(unit, options=tuple(with_losses(unit, option) for option in unit.options)) for unit in units
    )
    return UnitLosses(
        tuple(texts),
        found,
        tuple(schemes),
        {s: tuple(map(float, sums[s])) for s in schemes},
        {s: tuple(map(float, whole[place])) for place, s in enumerate(schemes)},
    )


def _uniform(recipe: Recipe, units: Sequence[Unit], scheme: Scheme) -> Recipe:
    """A recipe with one scheme for all units that can have it, and floating point for all others."""
    chosen = []
    for unit in units:
        able = [option for option in unit.options if option.scheme == scheme]
        chosen.append(able[0] if able else Option(FLOAT, 0, ()))
    return assigned(recipe.replace("quantization", cache="none"), units, Assignment(tuple(chosen)))


def _measured_by(recipe: Recipe, scheme: Scheme) -> Algorithm:
    """What measures the units of a recipe that has them in a scheme."""
    assert scheme.weights is not None
    if scheme.is_weight_only and not scheme.is_int4:
        # A search would change next to nothing.
        recipe = recipe.adjusted(algo=WITHOUT_TEXT)
    return recipe.quantization


def losses_identity(subject: "Subject", device: str) -> dict[str, Any]:
    """What two passes must have in common to have measured the same, as JSON gives it back."""
    wanted = {
        "recipe": subject.recipe.model_dump(mode="json", exclude={"evaluation", "serving", "description"}),
        "source": subject.source.checkpoint.fingerprint(),
        "calibration": subject.samples.sha256,
        "units": {unit.key: [str(option.scheme) for option in unit.options] for unit in subject.units},
        "device": device,
    }
    kept: dict[str, Any] = json.loads(json.dumps(wanted))
    return kept


@dataclass(frozen=True)
class Subject:
    """A model whose units are to be measured, checked before any work.

    Attributes:
        recipe: with the algorithm that fits the schemes.
        source: the model.
        units: of it, not measured yet.
        samples: of the calibration text.
        other_bytes: of the files of the smallest folder, without its units.
    """

    recipe: Recipe
    source: Source
    units: list[Unit]
    samples: Samples
    other_bytes: int

    @property
    def least_bytes(self) -> int:
        """Of the smallest folder."""
        return self.other_bytes + _smallest(self.units).nbytes


def open_subject(
    recipe: Recipe,
    *,
    schemes: Sequence[Scheme] = (),
    source: str | None = None,
    fetch: Callable[[str], Path] | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> Subject:
    """Open a model and work out its units; no weight is read.

    Where int4 weights are to choose from and the recipe's algorithm is the default, which leaves them rounded
    to nearest, it is replaced by `gptq`, without which they lose several times as much.

    Args:
        recipe: in one format; its calibration text is read.
        schemes: as `model_units` takes them.
        source: folder of the weights, in place of the recipe's model.
        fetch: downloads the weights of a hub id that are not here.
        offline: ask no hub for calibration text.
        progress: callbacks.

    Raises:
        MsquantError: the model, the recipe or a text is bad, or the server takes no scheme.
    """
    progress = progress or Progress()
    if len(recipe.formats) > 1:
        raise RecipeError(
            f"is {', '.join(recipe.formats)}: schemes are chosen for one server",
            where="--format",
            remedy="name one format, or a server with --for; msquant export writes others",
        )
    if recipe.calibration.is_none:
        raise RecipeError(
            "is none, and losses are measured with calibrated linears",
            where="--calibration",
            remedy="leave it out, or name a text",
        )
    require_sources(recipe.calibration)
    model = rotated(open_model(recipe, source, fetch, progress.stage), recipe.quantization)
    units = model_units(recipe, model, schemes)
    four_bits = any(option.scheme.is_int4 for unit in units for option in unit.options)
    if four_bits and type(recipe.quantization) is find_algorithm(DEFAULT):
        recipe = recipe.adjusted(algo=FOUR_BITS_ALGORITHM)
    smallest = _smallest(units)
    other = folder_plan(assigned(recipe, units, smallest), model).file_bytes - smallest.nbytes
    calibration = calibration_of(recipe.calibration, model.folder, offline=offline, progress=progress)
    return Subject(recipe, model, units, calibration.samples, other)


def _smallest(units: Sequence[Unit]) -> Assignment:
    return Assignment(tuple(min(unit.options, key=lambda option: option.nbytes) for unit in units))


def format_for(server: str) -> FormatName:
    """The format that a server reads.

    Args:
        server: one of `SERVER_NAMES`.

    Raises:
        RecipeError: there is no such server.
    """
    if server not in SERVER_NAMES:
        raise RecipeError(f"{server!r} is not a server", where="--for", remedy=choices(server, SERVER_NAMES))
    return next(name for name in format_names() if find_format(name).server == server)


@dataclass(frozen=True)
class FrontierPoint:
    """An assignment on the way from the smallest to the most accurate.

    Attributes:
        nbytes: of the folder's safetensors files.
        loss: predicted KL on the choice text on which it is greatest, in nats.
        losses: on each.
        counts: how many linears each scheme has, by its word.
        recipe: that makes it; None for the float model, which is not quantized at all.
    """

    nbytes: int
    loss: float
    losses: tuple[float, ...]
    counts: dict[str, int]
    recipe: Recipe | None


@dataclass(frozen=True)
class Frontier:
    """Size against loss for one server.

    Attributes:
        losses: of the units.
        points: the smallest first.
        chosen: the smallest point within a bound; None if none was asked for.
        seconds: wall time.
    """

    losses: UnitLosses
    points: list[FrontierPoint]
    chosen: FrontierPoint | None
    seconds: float


def find_frontier(
    recipe: Recipe,
    *,
    point: float | None = None,
    points: int = 12,
    schemes: Sequence[Scheme] = (),
    source: str | None = None,
    device: str = "cpu",
    memory_budget: int = MEMORY_BUDGET,
    verbose: bool = False,
    offline: bool = False,
    progress: Progress | None = None,
) -> Frontier:
    """Measure a model's units, and find the best assignments between the smallest and the float model.

    Args:
        recipe: as `open_subject` takes it.
        point: a predicted KL; the smallest assignment within it is `chosen`.
        points: how many assignments.
        schemes: as `model_units` takes them.
        source: folder of the weights, in place of the recipe's model.
        device: `cpu` or `ascend`.
        memory_budget: bytes of hidden states held in memory.
        verbose: show golden-stick's own log.
        offline: ask no hub for calibration text.
        progress: as of `measure_losses`.

    Raises:
        MsquantError: as `open_subject` and `measure_losses`; or no assignment is within `point`.
    """
    started = time.monotonic()
    if point is not None and not point > 0:
        raise RecipeError(f"is {point:g}", where="--point", remedy="give a KL in nats above 0, such as 0.02")
    require_device(device)
    subject = open_subject(recipe, schemes=schemes, source=source, offline=offline, progress=progress)
    with tempfile.TemporaryDirectory(prefix="msquant-") as scratch:
        losses = measure_losses(
            subject,
            Path(scratch),
            device=device,
            memory_budget=memory_budget,
            verbose=verbose,
            progress=progress,
        )
    chosen = None
    if point is not None:
        made = smallest(losses.units, losses.sums(point))
        if made is None:
            raise RecipeError(
                f"no assignment of schemes is predicted to lose {point:g} or less", where="--point"
            )
        chosen = _point(subject, losses, made)
    found = [_point(subject, losses, each) for each in frontier(losses.units, points)]
    return Frontier(losses, found, chosen, time.monotonic() - started)


def _point(subject: Subject, losses: UnitLosses, made: Assignment) -> FrontierPoint:
    recipe = None
    nbytes = subject.other_bytes + made.nbytes
    if not all(option.scheme.is_float for option in made.chosen):
        recipe = assigned(subject.recipe, losses.units, made)
        nbytes = folder_plan(recipe, subject.source).file_bytes
    predicted = losses.predicted(made.losses)
    return FrontierPoint(nbytes, max(predicted), predicted, scheme_counts(losses.units, made), recipe)


def scheme_counts(units: Sequence[Unit], made: Assignment) -> dict[str, int]:
    """How many linears each scheme has, by its word, the commonest first."""
    counted = Counter[str]()
    for unit, option in zip(units, made.chosen, strict=True):
        counted[str(option.scheme)] += len(unit.linears)
    return dict(counted.most_common())
