"""The ranking of a model's linears as tasks that several processes share; see `layer_graph.py`.

Only the floating-point pass is a chain; what quantizing a layer's groups costs is measured beside it:

    embed ─► compute 0 ─► compute 1 ─► ...
        └─► measure 0  └─► measure 1  └─► ...

In one process a layer is one task, `pass`, because measuring needs its outputs as well.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.hidden_states import HiddenStateStore
from msquant.flows.layer_graph import Executor, InProcess, Key, Result, Task
from msquant.flows.layer_work import embed
from msquant.flows.source import Source, open_source, rotated
from msquant.flows.workers import Workers, layers_ahead, scratch_folder, working
from msquant.kernels.blas import one_blas_thread
from msquant.kernels.layer_report import GroupError
from msquant.progress import Progress
from msquant.recipe.recipe import Recipe

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class AnalysisJob:
    """What every task of a ranking is to know, see `Job`.

    Attributes:
        recipe: what would be done to the model.
        batches: the calibration tokens, `[B, T]` each.
        length: tokens of a sample.
        per_token: measure static groups with a scale per token, too.
        device: `cpu` or `ascend`.
        memory_budget: bytes of hidden states held in memory.
        verbose: show golden-stick's own log.
    """

    recipe: Recipe
    batches: list[NDArray[np.int32]]
    length: int
    per_token: bool
    device: str
    memory_budget: int
    verbose: bool

    def begin(self, source: Path, output: Path, number: int) -> "AnalysisWork":
        """As `Job.begin`; hidden states are in `output`."""
        model = rotated(open_source(str(source)), self.recipe.quantization)
        boundaries = HiddenStateStore(output, self.memory_budget, shared=True)
        between = HiddenStateStore(output / f"worker-{number}-{os.getpid()}", self.memory_budget)
        return AnalysisWork(self, model, boundaries, between, lambda text: None)


class AnalysisWork:
    """Does tasks of a ranking, see `Work`.

    Args:
        job: what to do.
        source: the model.
        boundaries: the hidden states between layers.
        between: hidden states within a layer, which no other process reads.
        step: called with a line that says what is done within a layer.

    Raises:
        EngineError: the device is not there.
    """

    def __init__(
        self,
        job: AnalysisJob,
        source: Source,
        boundaries: HiddenStateStore,
        between: HiddenStateStore,
        step: Callable[[str], None],
    ) -> None:
        from msquant.kernels import golden_stick
        from msquant.models.device import use_device
        from msquant.quantization.group_errors import SensitivityPass

        self._dtype = use_device(job.device)
        golden_stick.set_log_level(job.verbose)
        self._job, self._source, self._boundaries = job, source, boundaries
        policy = job.recipe.quantization
        self._decoder = SensitivityPass(
            source.config, source.weights, policy, job.length, self._dtype, between, step
        )

    def run(self, task: Task) -> Result:
        """As `Work.run`; the record of `measure` and `pass` has the layer's `errors`, see `GroupError`."""
        started, index = time.monotonic(), task.index
        errors: list[GroupError] | None = None
        with one_blas_thread():
            if task.kind == "embed":
                embed(self._source, self._job.batches, self._boundaries, self._dtype)
            elif task.kind == "compute":
                with self._boundaries.write(index + 1) as outputs:
                    self._decoder.compute(index, self._boundaries.open(index), outputs.append)
            elif task.kind == "measure":
                errors = self._errors(index, lambda output: None)
            else:
                with self._boundaries.write(index + 1) as outputs:
                    errors = self._errors(index, outputs.append)
        return Result(time.monotonic() - started, None if errors is None else {"errors": errors})

    def _errors(self, index: int, put: Callable[[Floats], None]) -> list[GroupError]:
        inputs = self._boundaries.open(index)
        return self._decoder.errors(index, inputs, put, dynamic=self._job.per_token)

    def release(self) -> None:
        """As `Work.release`: other workers discard what this one would hold."""
        self._boundaries.release()


def analysis_tasks(layers: int, ahead: int | None) -> list[Task]:
    """The tasks of a ranking.

    Args:
        layers: decoder layers of the model.
        ahead: how many the floating-point pass may be ahead of what is measured; None for one process.
    """
    tasks, before = [Task("embed", 0)], Key("embed", 0)
    for index in range(layers):
        if ahead is None:
            tasks.append(Task("pass", index, (before,)))
            before = tasks[-1].key
            continue
        measured = Task("measure", index, (before,))
        if index + 1 < layers:
            room = (Key("measure", index - ahead),) if index >= ahead else ()
            tasks.append(Task("compute", index, (before, *room)))
            before = tasks[-1].key
        tasks.append(measured)
    return tasks


def measure(job: AnalysisJob, source: Source, workers: Workers, progress: Progress) -> list[GroupError]:
    """The error of every group of linears, in the order of the layers.

    Args:
        job: what to do.
        source: the model.
        workers: who does it; the numbers are the same.
        progress: callbacks; a layer's record holds its `index` and the `errors` of its groups by name.

    Raises:
        MsquantError: as the tasks, or a worker's own.
    """
    count = source.config.num_hidden_layers
    measured: dict[int, list[GroupError]] = {}
    with (
        scratch_folder(workers, source.folder) as folder,
        working(workers, job, source.checkpoint, folder, progress) as pool,
    ):
        boundaries = HiddenStateStore(folder, job.memory_budget, shared=pool is not None)
        executor: Executor
        if pool is None:
            progress.stage("loading MindSpore and golden-stick")
            executor = InProcess(AnalysisWork(job, source, boundaries, boundaries, progress.step).run)
        else:
            executor = pool
        tasks = analysis_tasks(count, None if pool is None else layers_ahead(pool.count))
        left = {task.key for task in tasks}
        progress.layers(count, 0)

        def done(task: Task, result: Result) -> None:
            left.discard(task.key)
            if task.kind != "embed" and not any(key.layer == task.index for key in left):
                boundaries.discard(task.index)
            if result.record is not None:
                errors = measured[task.index] = result.record["errors"]
                progress.layer({"index": task.index, "errors": {each.group: each.error for each in errors}})

        executor.run(tasks, done)
    return [error for index in sorted(measured) for error in measured[index]]
