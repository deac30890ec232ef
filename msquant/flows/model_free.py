"""The flow of `msquant quantize --calibration none`: weights rounded to nearest, whatever the architecture.

The source is read shard by shard, and what a shard becomes is noted in the journal, so a run that was killed
continues with the shards that it was in and ends with the same bytes. Nothing larger than one linear layer as
integers is in memory for each of the threads that work side by side.
"""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.disk import require_free_space, shard_file_bytes
from msquant.checkpoint.float_rows import FLOAT_DTYPES, require_finite
from msquant.checkpoint.journal import Journal
from msquant.checkpoint.memory import MEMORY_BUDGET, peak_memory
from msquant.checkpoint.output_folder import OutputFolder
from msquant.checkpoint.results import remember_folder, remember_result
from msquant.checkpoint.run_files import RunFiles, SourceHashes
from msquant.checkpoint.stored_matrix import StoredMatrix
from msquant.checkpoint.weights import QuantizedLinear
from msquant.errors import ModelError
from msquant.evaluation.inputs import Text
from msquant.families import find_family
from msquant.flows.conversion import other_folders, output_folders
from msquant.flows.layer_graph import Executor, InThreads, Result, Task
from msquant.flows.manifest import build_manifest, job_identity
from msquant.flows.model_free_source import ModelFreeSource, Piece, folder_plans, open_model_free
from msquant.flows.pipeline import QuantizeResult
from msquant.flows.short_evaluation import evaluate_result, short_texts
from msquant.flows.workers import Workers, working
from msquant.formats.folder_plan import FolderPlan
from msquant.formats.folder_stream import FolderStream, GroupWriter
from msquant.formats.registry import FormatName
from msquant.interrupts import check_interrupt, deferred_interrupts
from msquant.kernels.bfloat16_rounding import quantize_bfloat16
from msquant.kernels.fp8_rounding import quantize_codes
from msquant.kernels.weight_rounding import INT8, RoundedWeight, quantize_blocks
from msquant.models.config_json import read_config
from msquant.models.device import require_device
from msquant.progress import Progress
from msquant.recipe.recipe import Recipe
from msquant.schemes import Quant

BLOCK_BYTES = 1 << 20
"""What is read, rounded and forgotten at a time stays in a core's cache."""

CARRIED_BYTES = 8 << 20
"""Of a tensor that stays as it is: what is read and written at a time."""

MOST_THREADS = 4
"""More do not help: the hashes of what is read are made by one."""

WORKING_BYTES = 1 << 30
"""What the linear layers at hand may take together; a larger one is worked on alone."""

WORKER_THREADS = 2
"""Cores that a worker uses: it rounds, and hashes what it reads."""

BASE_BYTES = 200_000_000
"""Of a process that has loaded NumPy and what of msquant does the work."""

TENSOR_BYTES = 2_000
"""Of what is known of a tensor that is written: its name, its place and its description."""


def quantize_model_free(
    recipe: Recipe,
    output: Path,
    *,
    source: str | None = None,
    overwrite: bool = False,
    restart: bool = False,
    device: str = "cpu",
    memory_budget: int = MEMORY_BUDGET,
    fetch: Callable[[str], Path] | None = None,
    progress: Progress | None = None,
    remember: bool = True,
    workers: Workers | None = None,
) -> QuantizeResult:
    """Quantize a model of any architecture into a new folder, or continue what an interrupted call has begun.

    Arguments as for `msquant.flows.pipeline.quantize`; the recipe's calibration has no text. `device` and
    `memory_budget` are those of the comparison with the float model at the end, which is made where msquant
    knows the architecture. `workers` do the work on shards; without them threads of this process do. What
    else there is to say is in the result's notes.

    Raises:
        MsquantError: the input is bad, or the output cannot be written. Nothing that looks finished is left;
            finished shards are kept in `<output>.partial`, and the same call continues with them.
    """
    started = time.monotonic()
    progress = progress or Progress()
    require_device(device)
    with OutputFolder(output, overwrite=overwrite) as target:
        progress.stage(f"reading {source or recipe.model}")
        model = open_model_free(recipe, source or recipe.model, fetch, progress.stage)
        assert model.checkpoint is not None
        assert model.folder is not None
        plans = folder_plans(recipe, model)
        memory = needed_memory(model, plans[0], 2)
        team = replace(workers or Workers(), memory=memory, threads=WORKER_THREADS)
        texts, notes = _evaluation(recipe, model)
        if remember:
            remember_folder(target.path, "unfinished")
        identity = job_identity(recipe, model.checkpoint, {"source": recipe.calibration.source}, device)
        manifest = build_manifest(recipe, identity, ())
        with (
            other_folders(output, plans, manifest, overwrite=overwrite) as others,
            deferred_interrupts(),
        ):
            folders = [*others, (plans[0], target)]
            if restart:
                # Unlike an export, each of them has a journal of its own.
                for _, folder in folders:
                    folder.clear()
            to_come = sum(max(0, plan.file_bytes - _written(folder)) for plan, folder in folders)
            require_free_space(target.path, to_come)
            for plan, folder in folders:
                progress.stage(f"writing {plan.format.name} for {plan.format.consumer}")
                _write_folder(recipe, model, plan, folder, manifest, identity, team, progress)
                if folder is not target:
                    finished = folder.finish()
                    if remember:
                        remember_folder(finished, "export")
            # All shards are finished: the same command has only the comparison to do again.
            target.keep = True
            evaluation = evaluate_result(
                recipe.evaluation,
                texts,
                model.folder,
                target.path,
                device=device,
                memory_budget=memory_budget,
                progress=progress,
            )
        result = target.finish()
    if remember:
        remember_result(result)
    return QuantizeResult(
        folder=result,
        folders=dict(zip(recipe.formats, output_folders(result, recipe.formats), strict=True)),
        layers=[],
        evaluation=evaluation,
        layer_seconds=[],
        source_bytes=model.nbytes,
        output_bytes=plans[0].tensor_bytes,
        serving=None,
        notes=(*model.notes, *notes),
        seconds=time.monotonic() - started,
        peak_memory=peak_memory(),
    )


def _evaluation(recipe: Recipe, model: ModelFreeSource) -> tuple[list[Text], list[str]]:
    """The texts to compare the result with the float model on, or none and the reason."""
    assert model.folder is not None
    if not recipe.evaluation.sequences:
        return [], []
    kind = model.config.get("model_type")
    if find_family(kind) is None:
        return [], [f"the result was not compared with the float model: msquant cannot run {kind!r}"]
    try:
        return short_texts(recipe.evaluation, model.folder, read_config(model.folder)), []
    except ModelError as error:
        return [], [f"the result was not compared with the float model: {error.what}"]


def _written(target: OutputFolder) -> int:
    """Bytes of the shards that an earlier run has left."""
    return shard_file_bytes(target.path)


@dataclass(frozen=True)
class ModelFreeJob:
    """What every task on the shards of one model is to know, see `Job`.

    Attributes:
        recipe: everything that affects the result.
        form: the format of the folder that is made.
    """

    recipe: Recipe
    form: FormatName

    @property
    def device(self) -> None:
        """As `Job.device`: every processor rounds single numbers alike."""

    def begin(self, source: Path, output: Path, number: int) -> "ModelFreeWork":
        """As `Job.begin`."""
        model = open_model_free(self.recipe, str(source))
        assert model.checkpoint is not None
        plan = next(plan for plan in folder_plans(self.recipe, model) if plan.format.name == self.form)
        return ModelFreeWork(model, FolderStream(output, plan), SourceHashes(model.checkpoint))


class ModelFreeWork:
    """Rounds and writes groups of a model's tensors.

    Args:
        model: they are of.
        writer: of the folder that is made.
        hashes: of what is read.
    """

    def __init__(self, model: ModelFreeSource, writer: FolderStream, hashes: SourceHashes) -> None:
        self._model, self._writer, self._hashes = model, writer, hashes

    def run(self, task: Task) -> Result:
        """As `Work.run`; may be called in several threads at once.

        Raises:
            MsquantError: a tensor is damaged or holds NaN; the disk is full.
        """
        started, group = time.monotonic(), self._model.groups[task.index]
        source_read = self._hashes.reading(dict.fromkeys(name for piece in group for name in piece.tensors))
        with self._writer.group(task.index) as shards:
            for piece in group:
                check_interrupt()
                _write_piece(self._model, self._writer.plan, piece, shards)
        record = {"group": task.index, "files": shards.files, "source": source_read()}
        return Result(time.monotonic() - started, record)

    def release(self) -> None:
        """As `Work.release`: nothing here is for one task alone."""


def _write_folder(
    recipe: Recipe,
    model: ModelFreeSource,
    plan: FolderPlan,
    target: OutputFolder,
    manifest: dict[str, object],
    identity: dict[str, object],
    workers: Workers,
    progress: Progress,
) -> None:
    """Write one folder, all but giving it its name."""
    checkpoint, groups = model.checkpoint, model.groups
    assert checkpoint is not None
    assert model.folder is not None
    journal = Journal.open(target.path, {**identity, "format": plan.format.name})
    later = target.continued_later(lambda: len(journal.records), len(groups), "parts")
    with later, RunFiles(journal, checkpoint) as files:
        writer = FolderStream(target.path, plan)
        for record in journal.records:
            writer.restore(record["group"], record["files"])
        finished = {record["group"] for record in journal.records}
        progress.layers(len(groups), len(finished))
        tasks = [Task("round", index) for index in range(len(groups)) if index not in finished]

        def done(task: Task, result: Result) -> None:
            assert result.record is not None
            journal.append(result.record)
            shards = result.record["files"]
            writer.files.update(shards)
            progress.layer({"index": len(journal.records) - 1, "shards": ", ".join(shards)})

        job = ModelFreeJob(recipe, plan.format.name)
        with working(workers if tasks else Workers(), job, checkpoint, target.path, progress) as pool:
            executor: Executor = pool or InThreads(ModelFreeWork(model, writer, files).run, _threads(model))
            executor.run(tasks, done)
        if files.unverified:
            progress.stage("verifying what an earlier run has finished")
        files.finish()
        progress.stage("writing tokenizer and manifest")
        kept = {name: reason for name, reason in model.kept.items() if reason.startswith("keep_float")}
        writer.finish(model.folder, {**manifest, "kept_float": kept})


def needed_memory(model: ModelFreeSource, plan: FolderPlan, workers: int = 1) -> int:
    """Bytes that each process takes at most, an estimate; a worker has one linear layer at a time.

    Args:
        model: that is quantized.
        plan: of its first folder.
        workers: processes that share the work.
    """
    at_once = _threads(model) if workers == 1 else 1
    return BASE_BYTES + TENSOR_BYTES * len(plan.weight_map) + at_once * _largest(model)


def _threads(model: ModelFreeSource) -> int:
    """How many groups are worked on side by side: as many as cores, and as memory for their layers."""
    return max(1, min(MOST_THREADS, os.cpu_count() or 1, WORKING_BYTES // _largest(model)))


def _largest(model: ModelFreeSource) -> int:
    return max((_working_bytes(model, module) for module in model.linears), default=CARRIED_BYTES)


def _working_bytes(model: ModelFreeSource, module: str) -> int:
    """Bytes in memory while a layer is rounded: its integers twice, and a transposed expert as it lies."""
    matrix = model.linears[module].matrix
    rows, columns = matrix.shape
    whole = 0
    if matrix.transposed or matrix.packed:
        spec = model.specs[matrix.tensor]
        whole = spec.row_bytes
    return 2 * rows * columns + whole


def _write_piece(model: ModelFreeSource, plan: FolderPlan, piece: Piece, shards: GroupWriter) -> None:
    checkpoint, linear = model.checkpoint, model.linears.get(piece.name)
    assert checkpoint is not None
    if linear is None:
        _carry(model, checkpoint, piece.name, shards)
        return
    scheme = plan.linears[piece.name]
    assert scheme.weights is not None
    rounded = _rounded(checkpoint, linear.matrix, scheme.weights, scheme.scale_dtype(plan.dtype))
    if not np.isfinite(rounded.scale).all():
        linear.matrix.require_finite(checkpoint)
    bias = linear.matrix.bias(checkpoint, linear.bias) if linear.bias else None
    shards.linear(
        piece.name,
        QuantizedLinear(rounded.weight, rounded.scale, scheme, bias, weight_offset=rounded.offset),
    )


def _rounded(checkpoint: Checkpoint, matrix: StoredMatrix, quant: Quant, dtype: str) -> RoundedWeight:
    """A weight rounded to nearest, read a block at a time; the thread's next one takes its memory."""
    memory = _integers(matrix.shape)
    if matrix.expert is None and quant == INT8:
        rows = checkpoint.float_rows(matrix.tensor)
        if rows.has_even_blocks:
            found = quantize_codes(rows.codes(BLOCK_BYTES), matrix.shape, dtype, memory)
            if found is not None:
                return found
    codes = matrix.bfloat16_codes(checkpoint, BLOCK_BYTES) if quant.symmetric else None
    if codes is not None:
        return quantize_bfloat16(codes, matrix.shape, dtype, quant, memory)
    return quantize_blocks(matrix.blocks(checkpoint, BLOCK_BYTES), matrix.shape, dtype, quant)


_memory = threading.local()


def _integers(shape: tuple[int, int]) -> NDArray[np.int8]:
    """Int8 memory of a shape, the same each time in a thread: the system would clear new memory first."""
    size = shape[0] * shape[1]
    kept: NDArray[np.int8] = getattr(_memory, "kept", np.empty(0, np.int8))
    if kept.size < size:
        kept = _memory.kept = np.empty(size, np.int8)
    return kept[:size].reshape(shape)


def _carry(model: ModelFreeSource, checkpoint: Checkpoint, name: str, shards: GroupWriter) -> None:
    """Write a tensor that is not quantized: its bytes, or rounded to the dtype that is planned for it."""
    spec = model.specs[name]
    if shards.dtype(name) != spec.dtype:
        for start, block in checkpoint.row_blocks(name, CARRIED_BYTES):
            check_interrupt()
            shards.tensor_rows(name, start, block.reshape((-1, *spec.shape[1:])) if spec.shape else block[0])
        return
    for start, rows in checkpoint.shards[checkpoint.weight_map[name]].row_blocks(name, CARRIED_BYTES):
        check_interrupt()
        if spec.dtype in FLOAT_DTYPES:
            require_finite(name, rows, checkpoint.shard_path(name))
        shards.stored_rows(name, start, rows if spec.shape else rows.reshape(()))
