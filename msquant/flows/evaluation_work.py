"""The evaluation of models as tasks that several processes share; see `evaluation/lockstep.py`.

A decoder layer of a model waits for the one before, and for the float model's, whose states it is given too.
So each model, and each piece of the tokens, is a chain of its own:

    embed ─► forward 0 ─► forward 1 ─► ... ─► predict
                 └─► differ 0 ─► differ 1 ─► ...
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msquant.checkpoint.hidden_states import HiddenStateStore
from msquant.evaluation.domain_scores import LayerScore, ModelScore
from msquant.evaluation.inputs import Model, Text
from msquant.flows.layer_graph import Executor, Key, Result, Task
from msquant.models.config_json import read_config

if TYPE_CHECKING:
    from msquant.evaluation.lockstep import Lockstep, Predictions

# Layers that the float model may be ahead of what is compared.
_AHEAD = 4


@dataclass(frozen=True)
class EvaluationJob:
    """What every task of an evaluation is to know, see `Job`.

    Attributes:
        folders: of the models; the first is the baseline of the others.
        prefill: of each, whether it is scored as prompts are read with it.
        texts: what they are scored on.
        device: `cpu` or `ascend`.
        memory_budget: bytes of hidden states held in memory.
        pieces: into how many the tokens are cut.
    """

    folders: tuple[Path, ...]
    prefill: tuple[bool, ...]
    texts: tuple[Text, ...]
    device: str
    memory_budget: int
    pieces: int = 1

    def models(self) -> list[Model]:
        """The models, open."""
        from msquant.flows.comparison import opened_model

        return [opened_model(folder, asked) for folder, asked in zip(self.folders, self.prefill, strict=True)]

    def begin(self, source: Path, output: Path, number: int) -> "EvaluationWork":
        """As `Job.begin`; hidden states are in `output`."""
        return self.work(HiddenStateStore(output, self.memory_budget, shared=True))

    def work(self, store: HiddenStateStore) -> "EvaluationWork":
        """What does its tasks, by hidden states that are there."""
        from msquant.evaluation.lockstep import Lockstep
        from msquant.models.device import use_device

        dtype = use_device(self.device)
        return EvaluationWork(Lockstep(self.models(), self.texts, dtype, store, self.pieces), store)


class EvaluationWork:
    """Does tasks of an evaluation, see `Work`.

    Args:
        steps: that they are made of.
        store: of the hidden states.
    """

    def __init__(self, steps: "Lockstep", store: HiddenStateStore) -> None:
        self.steps, self._store = steps, store

    def run(self, task: Task) -> Result:
        """As `Work.run`."""
        made: dict[str, Any] | None = None
        started = time.monotonic()
        number, piece = divmod(task.part, self.steps.pieces)
        if task.kind == "embed":
            self.steps.embed(task.part)
        elif task.kind == "forward":
            self.steps.forward(task.index, number, piece)
        elif task.kind == "differ":
            made = {"layers": self.steps.differ(task.index)}
        else:
            made = {"predictions": self.steps.predict(task.part)}
        return Result(time.monotonic() - started, made)

    def release(self) -> None:
        """As `Work.release`: other workers discard what this one would hold."""
        self._store.release()


def evaluation_tasks(layers: int, models: int, pieces: int, ends: int) -> list[Task]:
    """The tasks of an evaluation.

    Args:
        layers: decoder layers of a model.
        models: how many, the float model among them.
        pieces: of the tokens, in the layers.
        ends: of the tokens, in the head.
    """
    tasks = [Task("embed", 0, (), number, models) for number in range(models)]
    before = {(number, piece): Key("embed", 0, number) for number in range(models) for piece in range(pieces)}
    for index in range(layers):
        room = (Key("differ", index - _AHEAD),) if index >= _AHEAD else ()
        made = {}
        for number, piece in before:
            after = dict.fromkeys((before[number, piece], before[0, piece], *room))
            task = Task("forward", index, tuple(after), number * pieces + piece, models * pieces)
            made[number, piece] = task.key
            tasks.append(task)
        last = (Key("differ", index - 1),) if index else ()
        tasks.append(Task("differ", index, (*made.values(), *last)))
        before = made
    return tasks + [Task("predict", layers, tuple(before.values()), end, ends) for end in range(ends)]


def evaluate_shared(
    job: EvaluationJob,
    executor: Executor,
    store: HiddenStateStore,
    on_layer: Callable[[int, list[LayerScore]], None],
) -> list[ModelScore]:
    """As `lockstep.evaluate`, by workers that have begun the job.

    Args:
        job: what they do.
        executor: who runs its tasks.
        store: of the hidden states, which the workers have in common.
        on_layer: called with a decoder layer's index and its scores in every model but the first.

    Raises:
        MsquantError: as `lockstep.evaluate`, or a worker's own.
    """
    steps = job.work(store).steps
    count = read_config(job.folders[0]).num_hidden_layers
    layers: list[list[LayerScore]] = []
    predictions: dict[int, Predictions] = {}

    def done(task: Task, result: Result) -> None:
        if task.kind == "differ":
            assert result.record is not None
            layers.append(result.record["layers"])
            steps.discard(task.index)
            on_layer(task.index, layers[-1])
        elif task.kind == "predict":
            assert result.record is not None
            predictions[task.part] = result.record["predictions"]

    executor.run(evaluation_tasks(count, len(job.folders), steps.pieces, steps.ends), done)
    return steps.scores([predictions[part] for part in sorted(predictions)], layers)
