"""The flow of `msquant evaluate --tasks`: questions of lm_eval's tasks, asked of one or two models."""

import importlib.util
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msquant.checkpoint.memory import peak_memory
from msquant.errors import EngineError, RecipeError
from msquant.flows.engines import load_embedded
from msquant.flows.generation import find_named_model
from msquant.flows.requirements import pip_install
from msquant.models.config_json import read_config
from msquant.models.device import require_device
from msquant.progress import Progress

if TYPE_CHECKING:
    from lm_eval.api.model import LM

    from msquant.tasks.loading import LoadedTasks

# Resamplings of metrics that have no formula for their standard error.
BOOTSTRAPS = 1000


@dataclass(frozen=True)
class TaskScore:
    """One measure of one task or group.

    Attributes:
        task: its name.
        group: whether it is the mean over a group's tasks.
        member: whether it belongs to a group that was asked for.
        metric: what is measured, with the filter of the answers if there is one, as
            `exact_match,strict-match`.
        value: of the metric; the unit is the metric's, a share from 0 to 1 for `acc` and `exact_match`.
        stderr: standard error of the value; None where lm_eval gives none.
        questions: how many were asked.
        num_fewshot: examples before each question; None of a group whose tasks differ.
        version: of the task, which changes when its scores are not to be compared with older ones.
    """

    task: str
    group: bool
    member: bool
    metric: str
    value: float
    stderr: float | None
    questions: int
    num_fewshot: int | None
    version: str


@dataclass(frozen=True)
class TaskResult:
    """What `evaluate_tasks` measured.

    Attributes:
        model: the folder.
        endpoint: who answered for it; None if it was computed in this process.
        baseline: the float model's folder, if it was asked too.
        scores: of the model.
        baseline_scores: of the float model, in the same order; empty without one.
        absent: tasks of the groups for which there were no records.
        lm_eval: the version of lm_eval.
        limit: the most questions of each task.
        seconds: wall time.
        peak_memory: greatest resident set of this process so far, in bytes.
    """

    model: Path
    endpoint: str | None
    baseline: Path | None
    scores: list[TaskScore]
    baseline_scores: list[TaskScore]
    absent: list[str]
    lm_eval: str
    limit: int | None
    seconds: float
    peak_memory: int

    def as_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        paths = {"model": str(self.model), "baseline": str(self.baseline) if self.baseline else None}
        return asdict(self) | paths | {"seconds": round(self.seconds, 3)}


def evaluate_tasks(
    model: str,
    tasks: Sequence[str],
    *,
    baseline: str | None = None,
    endpoint: str | None = None,
    task_data: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> TaskResult:
    """Ask a model the questions of tasks, and its float model beside it.

    Args:
        model: a folder, or a recipe or a name of a float model; with `endpoint`, the tokenizer's folder.
        tasks: names of lm_eval's tasks, groups or tags.
        baseline: the float model, as `model`; computed in this process.
        endpoint: URL of an OpenAI-compatible server of the model, up to `/v1`; None computes it here.
        task_data: folder of the questions; None downloads them from the hub.
        limit: so many questions of each task at most.
        num_fewshot: examples before each question; None as the task says.
        device: where the embedded engine computes, `cpu` or `ascend`.
        progress: callbacks; `layers` counts questions and their answers, not decoder layers.

    Raises:
        EngineError: lm_eval is not installed; the endpoint is not there or cannot serve what the tasks need.
        RecipeError: a task is unknown, or would run programs that the model writes.
        CalibrationError: questions are missing or do not fit their task.
        MsquantError: a model cannot be loaded, as `load_embedded` says.
    """
    started = time.monotonic()
    progress = progress or Progress()
    if not (names := list(dict.fromkeys(name.strip() for name in tasks if name.strip()))):
        raise RecipeError("no task is named", where="--tasks", remedy="name some, as gsm8k,mmlu")
    if importlib.util.find_spec("lm_eval") is None:
        raise EngineError(
            "lm_eval is not installed", where="--tasks", remedy=f"install it: {pip_install('eval')}"
        )
    if endpoint is None or baseline is not None:
        require_device(device)
    folder = find_named_model(model)
    float_folder = find_named_model(baseline) if baseline is not None else None
    from msquant.tasks.loading import load_tasks
    from msquant.tasks.records import TaskFolder

    records = TaskFolder(task_data) if task_data is not None else None
    progress.stage("reading tasks")
    loaded = load_tasks(names, records, num_fewshot)
    _require_plain(loaded)
    if endpoint is not None:
        scores = _ask(_endpoint(endpoint, folder, loaded, progress), loaded, limit)
    else:
        scores = _ask_folder(folder, loaded, limit, device, progress)
    return TaskResult(
        model=folder,
        endpoint=endpoint,
        baseline=float_folder,
        scores=scores,
        baseline_scores=_ask_folder(float_folder, loaded, limit, device, progress) if float_folder else [],
        absent=loaded.absent,
        lm_eval=version("lm_eval"),
        limit=limit,
        seconds=time.monotonic() - started,
        peak_memory=peak_memory(),
    )


def _endpoint(url: str, folder: Path, loaded: "LoadedTasks", progress: Progress) -> "LM":
    from msquant.tasks.language_model import EndpointLM

    scored = any(task.OUTPUT_TYPE != "generate_until" for task in loaded.tasks.values())
    # A server may compute more than this process does.
    longest = read_config(folder).max_position_embeddings
    return EndpointLM(url, folder, longest, scored, progress)


def _ask_folder(
    folder: Path, loaded: "LoadedTasks", limit: int | None, device: str, progress: Progress
) -> list[TaskScore]:
    from msquant.tasks.language_model import EmbeddedLM

    progress.stage(f"loading {folder}")
    with closing(load_embedded(folder, device)) as engine:
        return _ask(EmbeddedLM(engine, progress), loaded, limit)


def _ask(model: "LM", loaded: "LoadedTasks", limit: int | None) -> list[TaskScore]:
    from lm_eval.evaluator import evaluate

    from msquant.tasks.loading import quiet

    groups = {name: group.child_names for name, group in loaded.groups.items()}
    with quiet():
        results = evaluate(
            model,
            {"tasks": loaded.tasks, "groups": loaded.groups, "group_map": groups},
            limit=limit,
            log_samples=False,
            bootstrap_iters=BOOTSTRAPS,
        )
    return _scores(results, loaded)


def _require_plain(loaded: "LoadedTasks") -> None:
    for name, task in loaded.tasks.items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            what = "runs programs that the model writes" if task.UNSAFE_CODE else "asks about images or sound"
            raise RecipeError(f"{name} {what}: not done here", where="--tasks", remedy="leave it out")


def _scores(results: Mapping[str, Any], loaded: "LoadedTasks") -> list[TaskScore]:
    """lm_eval's measures, whose names are `metric,filter`, and of their errors `metric_stderr,filter`."""
    scores, asked = [], results["n-samples"]
    inner = {name for group in loaded.groups.values() for name in group.child_names}
    for name, measured in results["results"].items():
        members = [name] if name in asked else [t.task_name for t in loaded.groups[name].get_all_tasks()]
        for key, value in measured.items():
            metric, _, kept = key.partition(",")
            if not kept or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = measured.get(f"{metric}_stderr,{kept}")
            scores.append(
                TaskScore(
                    task=name,
                    group=name not in asked,
                    member=name in inner,
                    metric=metric if kept == "none" else key,
                    value=float(value),
                    stderr=float(error) if isinstance(error, int | float) else None,
                    questions=sum(asked[member]["effective"] for member in members),
                    num_fewshot=results["n-shot"].get(name),
                    version=str(results["versions"].get(name)),
                )
            )
    return scores
