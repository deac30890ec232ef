"""The flow of `msquant quantize`: a recipe and a source checkpoint in, a verified folder out for each format.

One decoder layer is in memory at a time. The next layer's inputs are the unquantized layer's outputs, as in
golden-stick; they are kept on disk beside a journal of the finished layers, so a run that was killed
continues with the layer it was in and ends with the same bytes.
"""

import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msquant.checkpoint.disk import require_free_space, writing
from msquant.checkpoint.hidden_states import HiddenStateStore
from msquant.checkpoint.journal import Journal
from msquant.checkpoint.memory import MEMORY_BUDGET, peak_memory
from msquant.checkpoint.output_folder import OutputFolder
from msquant.checkpoint.results import remember_folder, remember_result
from msquant.checkpoint.run_files import RunFiles
from msquant.checkpoint.shard_stream import shard_bytes
from msquant.errors import CalibrationError, MsquantError
from msquant.evaluation.inputs import Model, Text
from msquant.flows.calibration import Calibration, calibration_of, require_sources
from msquant.flows.conversion import other_folders, output_folders, write_export
from msquant.flows.forecast import Forecast
from msquant.flows.layer_graph import Executor, InProcess, Result, Task, layer_tasks
from msquant.flows.layer_work import SCRATCH, LayerJob, LayerWork, carry, joined_record, layer_cuts
from msquant.flows.manifest import build_manifest, job_identity
from msquant.flows.short_evaluation import evaluate_result, short_texts
from msquant.flows.source import (
    Source,
    folder_plans,
    hidden_bytes,
    open_model,
    prediction_note,
    quantized_predictions,
    rotated,
    untying_note,
)
from msquant.flows.workers import Workers, layers_ahead, working
from msquant.formats.folder_plan import FolderPlan
from msquant.formats.folder_stream import FolderStream
from msquant.formats.registry import FormatName
from msquant.formats.verdicts import served_model
from msquant.inference.serving_need import ServingNeed, serving_need
from msquant.interrupts import deferred_interrupts
from msquant.models.config import ModelConfig
from msquant.models.device import require_device
from msquant.progress import Phase, Progress
from msquant.recipe.recipe import Recipe
from msquant.schemes import FLOAT

if TYPE_CHECKING:
    from msquant.flows.worker_pool import WorkerPool


_TAKEN = "taken"
"""Of a record of the journal: whether the layer was taken from another result."""


@dataclass(frozen=True)
class QuantizeResult:
    """A finished quantization.

    Attributes:
        folder: the written folder.
        folders: the folder of each format, that one first.
        layers: the manifest's record of every decoder layer.
        evaluation: the manifest's record of the short evaluation; None if the recipe wants none.
        layer_seconds: wall time of each decoder layer that this run made; an earlier one made the others.
        source_bytes: bytes of all tensors of the source.
        output_bytes: bytes of all tensors in `folder`.
        serving: what `folder` needs to be served; None if no number of NPUs is enough, or for a model
            that msquant does not know.
        notes: what the user should know of the result.
        seconds: wall time of this run.
        peak_memory: greatest resident set of this process so far, in bytes.
        records: the journal's, of every group of tensors; what `Reuse` takes.
        reused: layers that were taken from an earlier result.
    """

    folder: Path
    folders: dict[FormatName, Path]
    layers: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    layer_seconds: list[float]
    source_bytes: int
    output_bytes: int
    serving: ServingNeed | None
    notes: tuple[str, ...]
    seconds: float
    peak_memory: int
    records: list[dict[str, Any]] = field(default_factory=list)
    reused: int = 0


@dataclass(frozen=True)
class Reuse:
    """An earlier result by the same recipe but for the schemes, whose layers are taken where those are equal.

    Attributes:
        folder: of the result.
        records: its `QuantizeResult.records`.
    """

    folder: Path
    records: Sequence[dict[str, Any]]


def quantize(
    recipe: Recipe,
    output: Path,
    *,
    source: str | None = None,
    overwrite: bool = False,
    restart: bool = False,
    device: str = "cpu",
    memory_budget: int = MEMORY_BUDGET,
    verbose: bool = False,
    fetch: Callable[[str], Path] | None = None,
    offline: bool = False,
    progress: Progress | None = None,
    remember: bool = True,
    workers: Workers | None = None,
    reuse: Sequence[Reuse] = (),
) -> QuantizeResult:
    """Quantize a model by a recipe into a new folder, or continue what an interrupted call has begun there.

    Args:
        recipe: everything that affects the result.
        output: the folder to make; it appears only when it is complete. Further formats of the recipe are
            exported from it, into the folders that `export.output_folders` names.
        source: folder of the weights, in place of the recipe's model.
        overwrite: replace an earlier result of msquant there.
        restart: forget what an interrupted call has finished.
        device: `cpu` or `ascend`.
        memory_budget: bytes of hidden states held in memory.
        verbose: show golden-stick's own log.
        fetch: downloads the weights of a hub id that are not here; without it that is an error.
        offline: ask no hub for calibration text.
        progress: callbacks.
        workers: who does the work on decoder layers; this process alone if None. The bytes are the same.
        remember: note the folder as the newest result, which `msquant run` takes, and `msquant list` shows.
        reuse: results of the same model, text, algorithm and options, of which layers with the same schemes
            are taken. A layer depends on no other layer's schemes, so the bytes are the same without it.

    Raises:
        MsquantError: the input is bad, or the output cannot be written. Nothing that looks finished is left;
            finished layers are kept in `<output>.partial`, and the same call continues with them.
    """
    started = time.monotonic()
    progress, workers = progress or Progress(), workers or Workers()
    require_device(device)
    _announce(recipe, progress)
    with OutputFolder(output, overwrite=overwrite) as target:
        require_sources(recipe.calibration)
        stored = open_model(recipe, source, fetch, progress.stage)
        model = rotated(stored, recipe.quantization)
        plans = folder_plans(recipe, model)
        plan = plans[0]
        predicted = quantized_predictions(recipe, model.config, model.extras)
        said = untying_note(stored.config, plan), prediction_note(recipe, stored.config, stored.extras)
        calibration = calibration_of(recipe.calibration, model.folder, offline=offline, progress=progress)
        _require_further_tokens(calibration, predicted, model.config)
        texts = short_texts(recipe.evaluation, model.folder, model.config)
        if remember:
            remember_folder(target.path, "unfinished")
        if restart:
            target.clear()
        identity = job_identity(recipe, model.checkpoint, calibration.record, device)
        journal = Journal.open(target.path, identity)
        with (
            other_folders(output, plans, build_manifest(recipe, identity, ()), overwrite=overwrite) as others,
            target.continued_later(
                lambda: len(_finished_layers(journal)),
                model.config.num_hidden_layers + predicted,
                "decoder layers",
            ),
            deferred_interrupts(),
            RunFiles(journal, model.checkpoint) as files,
        ):
            reused = _take_layers(reuse, plan, model.config, predicted, journal)
            needed = _bytes_to_come(plan, journal) + sum(other.file_bytes for other, _ in others)
            writer = FolderStream(target.path, plan)
            for record in journal.records:
                writer.restore(record["group"], record["files"])
            finished = len(_finished_layers(journal))
            progress = Forecast(
                progress, model.config, finished, bool(texts), len(others), predicted
            ).progress
            job = LayerJob.of(recipe, calibration, model.config, predicted, device, memory_budget, verbose)
            left = model.config.num_hidden_layers + predicted - finished
            team = workers if left else Workers()
            with working(team, job, model.checkpoint, target.path, progress) as pool:
                count = 1 if pool is None else pool.count
                first = job.batches[0].size
                states = hidden_bytes(model.config, calibration.size, predicted, count, first)
                require_free_space(target.path, needed + states)
                progress.lap("start")
                progress.phase("ends")
                # First, because what is wrong with them should not be found out hours later.
                progress.stage("writing embeddings and output head")
                _write_rest(model, predicted, journal, writer, files)
                progress.lap("ends")
                progress.phase("layers")
                seconds = _write_layers(model, texts, journal, writer, files, job, pool, progress)
            if files.unverified:
                progress.stage("verifying what an earlier run has finished")
            files.finish()
            progress.stage("writing tokenizer and manifest")
            layers = list(_finished_layers(journal).values())
            writer.finish(model.folder, build_manifest(recipe, identity, layers))
            progress.lap("start")
            if texts:
                progress.phase("evaluation")
            evaluation = evaluate_result(
                recipe.evaluation,
                texts,
                model.folder,
                target.path,
                device=device,
                memory_budget=memory_budget,
                progress=progress,
            )
            if others:
                progress.phase("formats")
            for other, folder in others:
                progress.stage(f"writing {other.format.name}")
                write_export(plan.format.open(target.path), target.path, other, folder.path)
                finished_export = folder.finish()
                if remember:
                    remember_folder(finished_export, "export")
                progress.lap("export")
        result = target.finish(scratch=[SCRATCH])
    if remember:
        remember_result(result)
    return QuantizeResult(
        folder=result,
        folders=dict(zip(recipe.formats, output_folders(result, recipe.formats), strict=True)),
        layers=layers,
        evaluation=evaluation,
        layer_seconds=seconds,
        source_bytes=model.nbytes,
        output_bytes=plan.tensor_bytes,
        serving=serving_need(model.config, plan.tensor_bytes, recipe.quantization.cache_quant),
        notes=tuple(note for note in said if note),
        seconds=time.monotonic() - started,
        peak_memory=peak_memory(),
        records=journal.records,
        reused=reused,
    )


def _take_layers(
    reuse: Sequence[Reuse], plan: FolderPlan, config: ModelConfig, predicted: int, journal: Journal
) -> int:
    """Copy layers of earlier results that the plan has in the same files and schemes; returns how many."""
    finished = {record["group"] for record in journal.records}
    taken, folder = 0, journal.path.parent
    for earlier in reuse:
        schemes = served_model(earlier.folder)
        for record in earlier.records:
            group = record["group"]
            if group in finished or schemes is None or group >= config.num_hidden_layers + predicted:
                continue
            prefix = f"{config.family.layer_name(group)}."
            wanted = {name: scheme for name, scheme in plan.linears.items() if name.startswith(prefix)}
            there = {name: schemes.linears.get(name, FLOAT).without_cache for name in wanted}
            same = there == {name: scheme.without_cache for name, scheme in wanted.items()}
            sizes = {shard.file_name: shard_bytes(shard.specs) for shard in plan.groups[group]}
            if not same or sizes != {name: entry["size"] for name, entry in record["files"].items()}:
                continue
            for name in record["files"]:
                with writing(folder / name):
                    shutil.copyfile(earlier.folder / name, folder / name)
            journal.append({**record, _TAKEN: True})
            finished.add(group)
            taken += 1
    return taken


def _require_further_tokens(calibration: Calibration, predicted: int, config: ModelConfig) -> None:
    """Raise CalibrationError for samples that leave a multi-token-prediction layer without a token."""
    sets = [calibration.samples, *([calibration.spare] if calibration.spare else [])]
    shortest = min(int(samples.lengths.min()) for samples in sets)
    if predicted and shortest <= predicted:
        layer = config.family.layer_name(config.num_hidden_layers + predicted - 1)
        raise CalibrationError(
            f"a sample has {shortest} tokens, of which none is left to quantize {layer} with: it predicts "
            f"{predicted + 1} tokens ahead",
            remedy="pack the samples, leave out the texts that are so short, or write prediction_layers: "
            "float in the recipe",
        )


def _announce(recipe: Recipe, progress: Progress) -> None:
    """Tell which phases the whole run will have, and begin the first."""
    phases: list[Phase] = ["start", "ends", "layers"]
    if recipe.evaluation.sequences:
        phases.append("evaluation")
    if recipe.formats[1:]:
        phases.append("formats")
    progress.phases(phases)
    progress.phase("start")


def _write_layers(
    source: Source,
    texts: Sequence[Text],
    journal: Journal,
    writer: FolderStream,
    files: RunFiles,
    job: LayerJob,
    pool: "WorkerPool | None",
    progress: Progress,
) -> list[float]:
    """Quantize, write and journal the layers that are not finished; returns each one's seconds.

    The decoder layers come first, and the multi-token-prediction layers after them.
    """
    count, finished = source.config.num_hidden_layers + job.predicted, set(_finished_layers(journal))
    if len(finished) >= count:
        return []
    from msquant.quantization.cut_layer import discard_computed, discard_layer

    store = HiddenStateStore(writer.folder / SCRATCH, job.memory_budget)
    made = {index for index in range(count) if store.path(index).exists()} if finished else set[int]()
    progress.layers(count, len(finished))
    executor: Executor
    if pool is None:
        progress.stage("loading MindSpore and golden-stick")
        work = LayerWork(job, source, writer, files, store, store, progress)
        executor, ahead, cuts = InProcess(work.run), None, {}
    else:
        executor, ahead = pool, layers_ahead(pool.count)
        batches = len(job.batches)
        cuts = layer_cuts(source.config, writer.plan, job.predicted, pool.count, batches)
    taken = any(record.get(_TAKEN) for record in journal.records)
    tasks = layer_tasks(count, finished, made, ahead, recompute=taken, cuts=cuts)
    left = {task.key for task in tasks}
    # Of a layer that is cut: what its tasks say, and their seconds.
    pieces: dict[int, list[dict[str, Any]]] = defaultdict(list)
    spent: dict[int, float] = defaultdict(float)
    seconds: list[float] = []
    if finished:
        progress.lap("start")

    def done(task: Task, result: Result) -> None:
        left.discard(task.key)
        if task.kind == "embed":
            progress.lap("start")
            if texts and pool is None:
                # What is wrong with the layer, the pass over it says better.
                with suppress(MsquantError):
                    from msquant.evaluation.lockstep import first_layer

                    states = HiddenStateStore(store.folder / "evaluation", store.budget_bytes)
                    first_layer(
                        Model(str(source.folder), source.config, source.weights), texts, work.dtype, states
                    )
                    progress.lap("evaluation sample")
        record = result.record
        spent[task.index] += result.seconds
        if task.cut is not None:
            pieces[task.index] += [] if record is None else [record]
            record = None
            if task.kind == "combine":
                discard_computed(store, task.index, task.cut.experts)
            elif task.kind == "finish":
                record = joined_record(task.index, pieces.pop(task.index), job.recipe.quantization)
        if record is not None:
            journal.append(record)
            writer.files.update(record["files"])
        # What no task reads any more, no later run has to continue from.
        if task.kind != "embed" and not any(key.layer == task.index for key in left):
            store.discard(task.index)
            discard_layer(store, task.index)
        if record is not None:
            seconds.append(spent[task.index] if task.cut is not None else result.seconds)
            progress.lap("layer")
            progress.layer(record["layer"])
            files.check()

    executor.run(tasks, done)
    return seconds


def _write_rest(
    source: Source, predicted: int, journal: Journal, writer: FolderStream, files: RunFiles
) -> None:
    """Carry the two ends through in floating point, and multi-token-prediction layers unless quantized."""
    groups: list[Iterable[str]] = [*source.extras, source.config.end_names]
    finished = {record["group"] for record in journal.records}
    for group, names in list(enumerate(groups, start=source.config.num_hidden_layers))[predicted:]:
        if group in finished:
            continue
        source_read = files.reading(names)
        with writer.group(group) as shards:
            carry(source, names, shards)
        journal.append({"group": group, "files": shards.files, "source": source_read()})


def _finished_layers(journal: Journal) -> dict[int, dict[str, Any]]:
    """The records of the layers that are finished, by the number of each, in ascending order."""
    layers = [record["layer"] for record in journal.records if "layer" in record]
    return {layer["index"]: layer for layer in sorted(layers, key=lambda layer: int(layer["index"]))}


def _bytes_to_come(plan: FolderPlan, journal: Journal) -> int:
    written = sum(entry["size"] for record in journal.records for entry in record["files"].values())
    return max(0, plan.file_bytes - written)
