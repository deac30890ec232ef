"""What `msquant quantize` would do to a model, and whether there is room, from its headers alone."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from msquant.calibration.sources import parse_source
from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.disk import free_bytes, shown_sizes
from msquant.checkpoint.fp8 import SCALE_SUFFIX
from msquant.checkpoint.memory import MEMORY_BUDGET, available_memory
from msquant.errors import EngineError, ModelError, MsquantError, OutputError
from msquant.flows.calibration import most_characters, require_sources
from msquant.flows.conversion import output_folders
from msquant.flows.layer_graph import Kind as TaskKind
from msquant.flows.layer_work import layer_cuts
from msquant.flows.source import (
    batch_samples,
    hidden_bytes,
    open_source,
    prediction_note,
    quantized_predictions,
    shapes_plans,
    untying_note,
)
from msquant.formats.registry import FormatName
from msquant.hub.published import published_config, published_name, stored_bytes
from msquant.inference.serving_need import ServingNeed, serving_need
from msquant.models.config import ModelConfig
from msquant.models.config_json import parse_config
from msquant.planning.blocks import LayerBlocks, Linear, Tokens, weights_of
from msquant.planning.measure import NOTHING, Machine, Measured, Span
from msquant.planning.timeline import DISK, NETWORK, Cluster, LayerCost, Timeline, play_layers
from msquant.planning.work import feed_forward_rounds
from msquant.progress import Phase
from msquant.recipe.recipe import Recipe
from msquant.schemes import Scheme

if TYPE_CHECKING:
    from msquant.planning.model_free_plan import ModelFreePlan

BASE_BYTES = 800_000_000
"""Of a process that has loaded MindSpore and golden-stick."""

# What allocators keep of what was freed.
SLACK = 1.1

_FLOAT = 4


def layer_bytes(blocks: LayerBlocks, tokens: Tokens, memory_budget: int) -> int:
    """Peak of one decoder layer's weights and activations, without `BASE_BYTES`.

    The two blocks of a layer are never in memory together, so the larger one counts.

    Args:
        blocks: the layer.
        tokens: the calibration tokens.
        memory_budget: bytes of hidden states held in memory.
    """
    hidden = _FLOAT * tokens.count * blocks.config.hidden_size
    attention = _golden_stick(blocks, tokens) + 2 * hidden
    rounds = feed_forward_rounds(blocks.config, tokens, memory_budget)
    feed_forward = _feed_forward(blocks, ceil(tokens.batches / rounds) * tokens.first) if blocks.inner else 0
    return int(SLACK * (max(attention, feed_forward) + min(3 * hidden, memory_budget)))


def _golden_stick(blocks: LayerBlocks, tokens: Tokens) -> int:
    """Without the inputs, of which golden-stick makes two copies."""
    config = blocks.config
    groups = [group for group in blocks.groups if group[0].scheme.is_static]
    # Beside the weights: a candidate of a whole group, or what clipping makes of one linear.
    candidate = max((weights_of(group) for group in groups), default=0)
    clipped = max((2 * linear.size for group in groups for linear in group), default=0)
    # Inputs that golden-stick records, and what our search keeps before each of the layer's steps.
    reading = blocks.groups if blocks.policy.rounds_by_inputs else groups
    recorded = sum(linear.columns for group in reading for linear in group if not linear.scheme.is_float)
    states = sum(group[0].columns + config.hidden_size for group in blocks.groups)
    if config.latent is not None:
        states += config.num_attention_heads * config.latent.qk_head_dim
    scores = 4 * tokens.first * tokens.length * config.num_attention_heads
    weights = weights_of(blocks.searched)
    beside = max(candidate, clipped, _moments(blocks, blocks.searched))
    return _FLOAT * (weights + beside + tokens.count * (recorded + states) + scores)


def _moments(blocks: LayerBlocks, linears: Sequence[Linear]) -> int:
    """Numbers in what an algorithm that rounds by inputs holds of the widest ones; see `kernels/gptq.py`.

    The moments, what is inverted of them, copies in two other orders, the factor and its inverse.
    """
    if not blocks.policy.rounds_by_inputs:
        return 0
    return 6 * max((linear.columns for linear in linears if not linear.scheme.is_float), default=0) ** 2


def _feed_forward(blocks: LayerBlocks, tokens: int) -> int:
    largest = max(weights_of(block) for block in blocks.inner.values())
    widest = max(linear.size for linear in blocks.streamed)
    # A block that gets all tokens, as a dense one and a shared expert do.
    inner = max(block[0].rows for block in blocks.inner.values())
    # While it is read: all of it, and the largest matrix as it is stored. While it is quantized: one matrix.
    weights = max(largest + widest // 2, 3 * widest)
    weights += _moments(blocks, blocks.streamed)
    return _FLOAT * (weights + tokens * (4 * blocks.config.hidden_size + 3 * inner))


Kind = Literal["dense", "experts", "prediction", "ends"]
Probe = Callable[[ModelConfig, Checkpoint | None], Measured]


@dataclass(frozen=True)
class PartPlan:
    """A part of the model that is written together.

    Attributes:
        kind: a decoder layer, "dense" or with "experts"; a multi-token-prediction layer; or the two "ends",
            embeddings, last norm and output head.
        index: number of the layer; None for the ends.
        linears: linear layers to compute in each scheme, by its word; none where all is carried through.
        experts: routed experts.
        parameters: without the scales of FP8 blocks.
        source_bytes: of its tensors in the source.
        output_bytes: of its shards, in all formats.
        seconds: to make it; None where nothing was measured.
    """

    kind: Kind
    index: int | None
    linears: dict[str, int]
    experts: int
    parameters: int
    source_bytes: int
    output_bytes: int
    seconds: Span | None


@dataclass(frozen=True)
class FormatPlan:
    """One of the folders that are written.

    Attributes:
        name: of its format.
        variant: what it is made for.
        consumer: the same, for people.
        folder: where it will be.
        output_bytes: of its shards.
    """

    name: FormatName
    variant: str
    consumer: str
    folder: Path
    output_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a quantization would take and make. Bytes are bytes, whole runs are counted from their start.

    Attributes:
        model: as the recipe or the caller named it.
        source: folder of the weights; None if only the published config is known.
        output: the folder to make, that of the first format.
        formats: all folders to make.
        architecture: as `config.json` names the type of model.
        stored: how the source stores its matrices.
        variant: what the output is made for.
        samples: calibration sequences.
        sequence_length: tokens in each.
        sources: that they are taken from.
        source_characters: of text that are read of each source, at most.
        parts: the decoder layers in order, the multi-token-prediction layers, the ends.
        parameters: of all parts.
        source_bytes: of all tensors of the source; by the published shapes where it is not here.
        output_bytes: of all shards, in all formats.
        serving: what the folder of the first format will need; None if no number of NPUs is enough.
        scratch_bytes: of hidden states beside the output, gone at the end.
        free_disk: on the output's disk; None if that cannot be told.
        peak_memory: resident at most, an estimate.
        available_memory: on this machine; None if that cannot be told.
        seconds: to the end of the command, from what was measured here; None where nothing was.
        seconds_by_stage: the same of each stage, the short evaluation and further formats included.
        machine: what it gave while it was measured; likewise.
        notes: what the plan takes for granted.
        problems: what would not fit, with both numbers and a remedy.
        workers: processes that share the work on decoder layers; memory is that of each.
        node_cores: of each worker's own machine; None where all workers are on this one.
        shared_bytes: that several workers read of the disk they share and write there, for the decoder
            layers: with machines of their own, over the network; None for one worker.
        timelines: of several workers' work on decoder layers, as fast and as slow as it was measured; None
            where nothing was, or for one.
    """

    model: str
    source: Path | None
    output: Path
    formats: tuple[FormatPlan, ...]
    architecture: str
    stored: str
    variant: str
    samples: int
    sequence_length: int
    sources: tuple[str, ...]
    source_characters: int
    parts: tuple[PartPlan, ...]
    parameters: int
    source_bytes: int
    output_bytes: int
    serving: ServingNeed | None
    scratch_bytes: int
    free_disk: int | None
    peak_memory: int
    available_memory: int | None
    seconds: Span | None
    seconds_by_stage: dict[Phase, Span] | None
    machine: Machine | None
    notes: tuple[str, ...]
    problems: tuple[str, ...]
    workers: int = 1
    node_cores: int | None = None
    shared_bytes: int | None = None
    timelines: tuple[Timeline, Timeline] | None = None

    @property
    def disk_bytes(self) -> int:
        """Needed on the output's disk."""
        return self.output_bytes + self.scratch_bytes


@dataclass(frozen=True)
class _Subject:
    """The model that is planned for, with or without its weights."""

    folder: Path | None
    config: ModelConfig
    checkpoint: Checkpoint | None
    extras: Sequence[Mapping[str, tuple[int, ...]]]
    note: str | None = None

    def source_bytes(self, name: str, shape: tuple[int, ...]) -> int:
        if self.checkpoint is None:
            return stored_bytes(name, shape, self.config.fp8_block)
        scale = name + SCALE_SUFFIX
        scales = self.checkpoint.nbytes(scale) if scale in self.checkpoint else 0
        return self.checkpoint.nbytes(name) + scales

    @property
    def stored(self) -> str:
        block = self.config.fp8_block
        return f"FP8 in blocks of {block[0]} x {block[1]}" if block else self.config.dtype


def make_plan(
    recipe: Recipe,
    output: Path,
    *,
    source: str | None = None,
    memory_budget: int = MEMORY_BUDGET,
    probe: Probe | None = None,
    workers: int = 1,
    node_cores: int | None = None,
) -> Plan:
    """Plan a quantization; no weight is read but in part by the probe, and nothing is left behind.

    Args:
        recipe: everything that affects the result.
        output: the folder that is to be made.
        source: folder of the weights, in place of the recipe's model. A published model is planned without
            its weights if neither is here.
        memory_budget: bytes of hidden states held in memory.
        workers: processes that share the work on decoder layers.
        node_cores: cores of the machine that each of them has for itself, with a network of 10 Gbit/s and a
            disk of 2 GB/s that all share; None if they share this machine.
        probe: measures this machine once the model is known to be whole; without it no time is estimated.

    Raises:
        MsquantError: the model is unknown, incomplete or not supported, the recipe does not fit it, a source
            of its calibration text is not there, or nodes are described and no workers asked for.
    """
    if node_cores is not None and workers < 2:
        raise EngineError(
            "says how many cores each of several workers has, and there is one",
            where="--node-cores",
            remedy="say how many nodes by --workers too",
        )
    require_sources(recipe.calibration)
    subject = _subject(recipe, source)
    config, settings = subject.config, recipe.calibration
    folders = shapes_plans(recipe, config, subject.extras)
    batch = batch_samples(config, settings.sequence_length)
    tokens = Tokens(settings.total, settings.sequence_length, batch)
    predicted = quantized_predictions(recipe, config, subject.extras)
    said = subject.note, untying_note(config, folders[0]), prediction_note(recipe, config, subject.extras)
    notes = [note for note in said if note]
    measured = None
    if probe is not None:
        try:
            measured = probe(config, subject.checkpoint)
        except MsquantError as error:
            notes.append(f"the time was not estimated, because this machine could not be measured: {error}")
    stages: dict[Phase, Span] = dict.fromkeys(get_args(Phase), NOTHING)
    peaks, parts = [0], []
    costs: dict[int, LayerCost] = {}
    for group, (kind, index, shapes) in enumerate(_parts(subject)):
        sizes = {name: subject.source_bytes(name, shape) for name, shape in shapes.items()}
        source_bytes = sum(sizes.values())
        written, *others = (folder.group_bytes[group] for folder in folders)
        schemes: dict[str, Scheme] = {}
        seconds = None
        if index is not None and index < config.num_hidden_layers + predicted:
            blocks = LayerBlocks(config, recipe.quantization, index)
            schemes = blocks.schemes
            peaks.append(layer_bytes(blocks, tokens, memory_budget))
            taken: dict[TaskKind, float] = {}
            if measured is not None:
                rounds = feed_forward_rounds(config, tokens, memory_budget)
                seconds = measured.layer(blocks, tokens.count, rounds, source_bytes)
                stages["layers"] += seconds
                taken = measured.task_seconds(blocks, tokens.count, rounds)
                if index < config.num_hidden_layers:
                    stages["evaluation"] += measured.evaluated_layer(blocks)
            costs[index] = LayerCost.of(config, index, sizes, written, tokens, taken)
        elif measured is not None:
            seconds = measured.once("ends", written / measured.sample.folder.group_bytes[-1], source_bytes)
            stages["ends"] += seconds
        parts.append(
            PartPlan(
                kind=kind,
                index=index,
                linears=dict(Counter(map(str, schemes.values()))),
                experts=config.num_experts if kind == "experts" else 0,
                parameters=sum(map(prod, shapes.values())),
                source_bytes=source_bytes,
                output_bytes=written + sum(others),
                seconds=seconds,
            )
        )
    if measured is not None:
        stages["start"] = measured.once("start")
        stages["formats"] = measured.once("export", folders[0].file_bytes / measured.sample.folder.file_bytes)
    if measured is not None and recipe.evaluation.sequences:
        stages["evaluation"] += measured.once("head", config.vocab_size / measured.sample.config.vocab_size)
    shared, timelines = None, None
    if workers > 1:
        cuts = layer_cuts(config, folders[0], predicted, workers, tokens.batches)
        cluster = _cluster(workers, node_cores, measured)
        factors = (1.0, 1.0) if measured is None else measured.task_factors(here=node_cores is None)
        fast, slow = (
            play_layers(costs, cuts, replace(cluster, slower=cluster.slower * factor)) for factor in factors
        )
        shared = int(fast.transferred)
        if measured is not None:
            timelines = fast, slow
            stages["layers"] = Span(fast.seconds, slow.seconds)
    most = settings.most * settings.sequence_length
    scratch = hidden_bytes(config, most, predicted, workers, tokens.first)
    peak, writing = BASE_BYTES + max(peaks), 0
    if any(parse_source(word).place.writes for word in settings.sources):
        writing = BASE_BYTES + _whole_model_bytes(config)
        notes.append("the time in which the model writes its own calibration text is not in the estimate")
    written_bytes = sum(folder.file_bytes for folder in folders)
    free, available = free_bytes(output.absolute()), available_memory()
    return Plan(
        model=source or recipe.model,
        source=subject.folder,
        output=output,
        formats=tuple(
            FormatPlan(folder.format.name, folder.variant, folder.format.consumer, place, folder.file_bytes)
            for folder, place in zip(folders, output_folders(output, recipe.formats), strict=True)
        ),
        architecture=config.family.model_type,
        stored=subject.stored,
        variant=folders[0].variant,
        samples=settings.total,
        sequence_length=settings.sequence_length,
        sources=settings.sources,
        source_characters=most_characters(settings),
        parts=tuple(parts),
        parameters=sum(part.parameters for part in parts),
        source_bytes=sum(part.source_bytes for part in parts),
        output_bytes=written_bytes,
        serving=serving_need(config, folders[0].tensor_bytes, recipe.quantization.cache_quant),
        scratch_bytes=scratch,
        free_disk=free,
        peak_memory=peak if workers > 1 else max(peak, writing),
        available_memory=available,
        seconds=None if measured is None else sum(stages.values(), NOTHING),
        seconds_by_stage=None if measured is None else stages,
        machine=None if measured is None else measured.machine,
        notes=tuple(notes),
        problems=tuple(
            _problems(
                *(written_bytes + scratch, free, peak, writing, available),
                # Of other machines nothing is known here.
                workers if node_cores is None else 1,
            )
        ),
        workers=workers,
        node_cores=node_cores,
        shared_bytes=shared,
        timelines=timelines,
    )


def _cluster(workers: int, node_cores: int | None, measured: Measured | None) -> Cluster:
    """The workers of this machine, or so many machines with as many cores each."""
    parallel, cores, disk = 0.0, len(os.sched_getaffinity(0)), DISK
    if measured is not None:
        machine, disk = measured.machine, measured.read
        # By Amdahl's law, from how many cores one process used of those that are here.
        if machine.cores > 1 and machine.share > 1:
            parallel = min(1.0, (1 - 1 / machine.share) / (1 - 1 / machine.cores))
    if node_cores is None:
        crowded = max(1.0, workers / cores)
        return Cluster(1, workers, max(1, cores // workers), parallel, disk=disk, slower=crowded)
    return Cluster(workers, 1, node_cores, parallel, NETWORK, DISK)


def worker_memory(recipe: Recipe, output: Path, source: str | None, memory_budget: int) -> int:
    """Bytes that one worker takes at most, an estimate; 0 for a model whose config is not known here.

    It is the same for any number of them; text that the model writes itself is written before there are any.
    """
    try:
        return make_plan(recipe, output, source=source, memory_budget=memory_budget, workers=2).peak_memory
    except ModelError:
        return 0


def _subject(recipe: Recipe, source: str | None) -> _Subject:
    try:
        found = open_source(source or recipe.model, predictions=recipe.keeps_predictions)
    except ModelError as error:
        raw = None if source else published_config(recipe.model)
        if raw is None:
            raise
        config = parse_config(raw, "the published config.json")
        note = f"planned from the published config.json alone: {error.what}"
        extras = config.extra_layers if recipe.keeps_predictions else ()
        return _Subject(None, config, None, extras, note)
    return _Subject(found.folder, found.config, found.checkpoint, found.extras)


def _parts(subject: _Subject) -> list[tuple[Kind, int | None, Mapping[str, tuple[int, ...]]]]:
    """Kind, number and tensors of every group of the folder's plan, in its order."""
    config = subject.config
    parts: list[tuple[Kind, int | None, Mapping[str, tuple[int, ...]]]] = []
    for index in range(config.num_hidden_layers):
        kind: Kind = "experts" if config.has_experts(index) else "dense"
        parts.append((kind, index, config.layer_shapes(index)))
    for place, shapes in enumerate(subject.extras):
        parts.append(("prediction", config.num_hidden_layers + place, shapes))
    return [*parts, ("ends", None, {name: config.shapes[name] for name in config.end_names})]


def _whole_model_bytes(config: ModelConfig) -> int:
    """Of the float weights that generation holds: an embedding of its own is read by rows."""
    table = f"{config.family.names.embedding}.weight"
    held = {
        name: shape for name, shape in config.shapes.items() if config.tie_word_embeddings or name != table
    }
    return _FLOAT * sum(map(prod, held.values()))


def _problems(
    needed: int, free: int | None, peak: int, writing: int, available: int | None, workers: int
) -> list[str]:
    """What does not fit.

    Args:
        needed: bytes of the output and scratch.
        free: bytes of the output's disk.
        peak: bytes of memory for each worker.
        writing: bytes in which the model writes calibration text, 0 if it does not.
        available: bytes of memory.
        workers: processes at work.
    """
    problems = []
    if free is not None and needed > free:
        wanted, left = shown_sizes(needed, free)
        problems.append(
            f"disk: {wanted} are needed for the output and scratch, {left} are free there; free some space, "
            "or choose another disk with --output"
        )
    if available is not None and peak > available:
        wanted, left = shown_sizes(peak, available)
        problems.append(
            f"memory: about {wanted} are needed at the peak, {left} are available; use fewer "
            "--samples, a shorter --sequence-length or a smaller --memory-budget, or a larger machine"
        )
    elif available is not None and workers * peak > available:
        wanted, left = shown_sizes(workers * peak, available)
        problems.append(
            f"memory: about {wanted} are needed by {workers} workers, {left} are available; use --workers "
            f"{available // peak}"
        )
    if available is not None and writing > available:
        wanted, left = shown_sizes(writing, available)
        problems.append(
            f"memory: about {wanted} are needed for the model to write its own calibration text, {left} are "
            "available; use other sources than self, or a larger machine"
        )
    return problems


def require_room(
    recipe: Recipe,
    output: Path,
    source: str | None,
    cache: Path,
    planner: "Callable[..., Plan | ModelFreePlan]" = make_plan,
) -> None:
    """Refuse to begin with weights that are downloaded for hours and have no room to be quantized.

    A model whose config is not published here is let through: what it takes is known only afterwards.

    Args:
        recipe: what will be done.
        output: the folder that will be made.
        source: as `make_plan` takes it.
        cache: where the weights will go.
        planner: `make_plan`, or another that is called so.

    Raises:
        OutputError: the output's disk is too small, or the one disk for both; names all numbers.
    """
    try:
        plan = planner(recipe, output, source=source)
    except ModelError:
        return
    together = _device(output) == _device(cache)
    needed = plan.disk_bytes + (plan.source_bytes if together and plan.source is None else 0)
    free = free_bytes(output.absolute())
    if free is not None and free < needed:
        left, wanted, weights = shown_sizes(free, plan.disk_bytes, plan.source_bytes)
        both = f" and {weights} for the weights" if needed > plan.disk_bytes else ""
        raise OutputError(
            f"{left} are free on its disk, {wanted} are needed{both}",
            where=output,
            remedy="free some space, or choose other disks with --output and MSQUANT_CACHE; what memory and "
            f"time it needs too, says msquant plan {published_name(recipe.model) or recipe.model}",
        )


def _device(path: Path) -> int:
    """The number of the disk that holds a path or will."""
    return next(os.stat(each).st_dev for each in (path.absolute(), *path.absolute().parents) if each.exists())
