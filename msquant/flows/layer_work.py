"""One process's part of a quantization: it does the tasks on decoder layers that it is given, in any order.

All that tasks share lies in folders, so a task is done by whoever is free: the source, the hidden states
between layers, and the shards.
"""

import os
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msquant.calibration.tokens import Samples
from msquant.checkpoint.hidden_states import HiddenStates, HiddenStateStore
from msquant.checkpoint.output_folder import remove_path
from msquant.checkpoint.run_files import SourceHashes
from msquant.flows.calibration import Calibration
from msquant.flows.layer_graph import Result, Task
from msquant.flows.manifest import layer_record
from msquant.flows.source import Source, batch_tokens, folder_plan, open_source, rotated
from msquant.formats.folder_stream import FolderStream, GroupWriter
from msquant.interrupts import check_interrupt
from msquant.kernels.blas import one_blas_thread
from msquant.models.config import ModelConfig
from msquant.progress import Progress
from msquant.recipe.recipe import Recipe

Floats = NDArray[np.float32]

SCRATCH = "scratch"
"""The folder of hidden states within an unfinished result."""

PREDICTION = 99_998
"""The boundary before the decoder layer of a multi-token-prediction layer, among those of decoder layers."""

# Of a tensor that is carried through in floating point.
BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class LayerJob:
    """What every task on the layers of one model is to know; it can be sent to other processes.

    Attributes:
        recipe: everything that affects the result.
        batches: all calibration tokens, `[B, T]` each.
        searched: so many batches are smoothed and searched on; those behind them only feed the experts.
        length: tokens of the longest sample.
        predicted: multi-token-prediction layers that are quantized after the decoder layers.
        device: `cpu` or `ascend`.
        memory_budget: bytes of hidden states held in memory.
        verbose: show golden-stick's own log.
    """

    recipe: Recipe
    batches: list[NDArray[np.int32]]
    searched: int
    length: int
    predicted: int
    device: str
    memory_budget: int
    verbose: bool

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        calibration: Calibration,
        config: ModelConfig,
        predicted: int,
        device: str,
        memory_budget: int,
        verbose: bool,
    ) -> "LayerJob":
        """The job of quantizing a model of that shape with those samples."""
        sets: list[Samples] = [calibration.samples, *([calibration.spare] if calibration.spare else [])]
        most = batch_tokens(config)
        return cls(
            recipe,
            [batch for samples in sets for batch in samples.batches(most)],
            len(list(calibration.samples.batches(most))),
            max(samples.tokens.shape[1] for samples in sets),
            predicted,
            device,
            memory_budget,
            verbose,
        )

    def begin(self, source: Path, output: Path, number: int) -> "LayerWork":
        """As `Job.begin`."""
        stored = open_source(str(source), predictions=self.recipe.keeps_predictions)
        model = rotated(stored, self.recipe.quantization)
        writer = FolderStream(output, folder_plan(self.recipe, model))
        scratch = output / SCRATCH
        for left in scratch.glob(f"worker-{number}-*"):
            # Of the one that died in this one's place.
            remove_path(left)
        boundaries = HiddenStateStore(scratch, self.memory_budget, shared=True)
        between = HiddenStateStore(scratch / f"worker-{number}-{os.getpid()}", self.memory_budget)
        hashes = SourceHashes(model.checkpoint)
        return LayerWork(self, model, writer, hashes, boundaries, between, Progress())


class LayerWork:
    """Does tasks on decoder layers.

    Args:
        job: what to do.
        source: the model.
        writer: of the folder that is made.
        hashes: of what is read.
        boundaries: the hidden states between layers.
        between: hidden states within a layer, which no other process reads.
        progress: callbacks.

    Raises:
        EngineError: the device is not there.
    """

    def __init__(
        self,
        job: LayerJob,
        source: Source,
        writer: FolderStream,
        hashes: SourceHashes,
        boundaries: HiddenStateStore,
        between: HiddenStateStore,
        progress: Progress,
    ) -> None:
        from msquant.kernels import golden_stick
        from msquant.models.device import use_device
        from msquant.quantization.decoder_pass import DecoderPass

        self.dtype = use_device(job.device)
        golden_stick.set_log_level(job.verbose)
        self._job, self._source, self._writer, self._hashes = job, source, writer, hashes
        self._boundaries, self._between, self._step = boundaries, between, progress.step
        self._decoder = DecoderPass(
            source.config,
            source.weights,
            job.recipe.quantization,
            job.length,
            self.dtype,
            between,
            progress.step,
            lambda: progress.lap("attention"),
            searched=job.searched,
        )

    def run(self, task: Task) -> Result:
        """Do a task.

        Raises:
            MsquantError: a tensor is missing, damaged or of a wrong shape, or holds NaN; the search finds
                nothing; the disk is full; the hidden states that it reads are gone.
        """
        started, record = time.monotonic(), None
        with one_blas_thread():
            if task.kind == "embed":
                embed(self._source, self._job.batches, self._boundaries, self.dtype)
            elif task.kind == "compute":
                with self._boundaries.write(task.index + 1) as outputs:
                    self._decoder.compute(task.index, self._inputs(task.index), outputs.append)
            else:
                record = self._quantize(task.index, outputs=task.kind == "pass")
        self._between.discard(PREDICTION)
        return Result(time.monotonic() - started, record)

    def release(self) -> None:
        """As `Work.release`: other workers discard what this one would hold."""
        self._boundaries.release()

    def _quantize(self, index: int, *, outputs: bool) -> dict[str, Any]:
        """Quantize and write a layer; returns the journal's record of it."""
        config, policy = self._source.config, self._job.recipe.quantization
        source_read = self._hashes.reading(config.layer_shapes(index))
        inputs = self._inputs(index)
        with ExitStack() as stack:
            shards = stack.enter_context(self._writer.group(index))
            put: Callable[[Floats], None] = lambda output: None  # noqa: E731
            if outputs:
                put = stack.enter_context(self._boundaries.write(index + 1)).append
            report = self._decoder.run(index, inputs, put, shards)
            if index >= config.num_hidden_layers:
                within = config.decoder_shapes(index)
                carry(
                    self._source, [name for name in config.layer_shapes(index) if name not in within], shards
                )
        record = layer_record(index, report, policy)
        return {"group": index, "layer": record, "files": shards.files, "source": source_read()}

    def _inputs(self, index: int) -> HiddenStates:
        if index < self._source.config.num_hidden_layers:
            return self._boundaries.open(index)
        self._step("inputs")
        self._predict(index)
        return self._between.open(PREDICTION)

    def _predict(self, index: int) -> None:
        """Make what the decoder layer of a multi-token-prediction layer reads."""
        from msquant.models.network import PredictionInput

        prediction = PredictionInput(self._source.config, self._source.weights, index, self.dtype)
        with self._between.write(PREDICTION) as inputs:
            for batch, states in zip(self._job.batches, self._boundaries.open(index), strict=True):
                check_interrupt()
                inputs.append(prediction(states, batch))


def embed(source: Source, batches: Iterable[NDArray[np.int32]], store: HiddenStateStore, dtype: Any) -> None:
    """Put the inputs of the first decoder layer into the store.

    Args:
        source: the model.
        batches: the calibration tokens, `[B, T]` each.
        store: takes them at boundary 0.
        dtype: compute dtype.
    """
    from msquant.models.network import Embedding

    embedding = Embedding(source.config, source.weights, dtype)
    with store.write(0) as hidden:
        for batch in batches:
            hidden.append(embedding(batch).asnumpy().astype(np.float32))


def carry(source: Source, names: Iterable[str], shards: GroupWriter) -> None:
    """Write tensors in floating point, block by block."""
    for name in names:
        check_interrupt()
        for start, block in source.weights.row_blocks(name, BLOCK_BYTES):
            shards.tensor_rows(name, start, block)
