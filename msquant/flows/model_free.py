"""The flow of `msquant quantize --calibration none`: weights rounded to nearest, whatever the architecture.

The source is read shard by shard, and what a shard becomes is noted in the journal, so a run that was killed
continues with the shards that it was in and ends with the same bytes. Nothing larger than one linear layer as
integers is in memory for each of the threads that work side by side.
"""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
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
from msquant.checkpoint.run_files import RunFiles
from msquant.checkpoint.stored_matrix import StoredMatrix
from msquant.checkpoint.weights import QuantizedLinear
from msquant.errors import ModelError
from msquant.evaluation.inputs import Text
from msquant.families import find_family
from msquant.flows.conversion import other_folders, output_folders
from msquant.flows.manifest import build_manifest, job_identity
from msquant.flows.model_free_source import ModelFreeSource, Piece, folder_plans, open_model_free
from msquant.flows.pipeline import QuantizeResult
from msquant.flows.short_evaluation import evaluate_result, short_texts
from msquant.formats.folder_plan import FolderPlan
from msquant.formats.folder_stream import FolderStream, GroupWriter
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
) -> QuantizeResult:
    """Quantize a model of any architecture into a new folder, or continue what an interrupted call has begun.

    Arguments as for `msquant.flows.pipeline.quantize`; the recipe's calibration has no text. `device` and
    `memory_budget` are those of the comparison with the float model at the end, which is made where msquant
    knows the architecture. What else there is to say is in the result's notes.

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
                _write_folder(model, plan, folder, manifest, identity, progress)
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


def _write_folder(
    model: ModelFreeSource,
    plan: FolderPlan,
    target: OutputFolder,
    manifest: dict[str, object],
    identity: dict[str, object],
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
        done = {record["group"] for record in journal.records}
        progress.layers(len(groups), len(done))
        finished = threading.Lock()

        def write(index: int) -> None:
            tensors = dict.fromkeys(name for piece in groups[index] for name in piece.tensors)
            source_read = files.reading(tensors)
            with writer.group(index) as shards:
                for piece in groups[index]:
                    check_interrupt()
                    _write_piece(model, checkpoint, plan, piece, shards)
            read = source_read()
            with finished:
                journal.append({"group": index, "files": shards.files, "source": read})
                names = ", ".join(shards.files)
                progress.layer({"index": len(journal.records) - 1, "shards": names})

        _in_threads(write, [index for index in range(len(groups)) if index not in done], _threads(model))
        if files.unverified:
            progress.stage("verifying what an earlier run has finished")
        files.finish()
        progress.stage("writing tokenizer and manifest")
        kept = {name: reason for name, reason in model.kept.items() if reason.startswith("keep_float")}
        writer.finish(model.folder, {**manifest, "kept_float": kept})


def working_memory(model: ModelFreeSource) -> int:
    """Bytes of the linear layers that are worked on side by side, at most."""
    return _threads(model) * _largest(model)


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


def _in_threads(work: Callable[[int], None], indices: list[int], threads: int) -> None:
    """Do all of it; after the first error, which is raised, no more is begun."""
    failed = threading.Event()

    def guarded(index: int) -> None:
        if failed.is_set():
            return
        try:
            work(index)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(threads, thread_name_prefix="round") as pool:
        futures = [pool.submit(guarded, index) for index in indices]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def _write_piece(
    model: ModelFreeSource, checkpoint: Checkpoint, plan: FolderPlan, piece: Piece, shards: GroupWriter
) -> None:
    linear = model.linears.get(piece.name)
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
