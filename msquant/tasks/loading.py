"""Tasks of lm_eval by their names; imported only where lm_eval is installed."""

import difflib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory

from msquant.errors import CalibrationError, MsquantError, RecipeError
from msquant.tasks.records import Records, TaskFolder

NEAR_NAMES = 4


@dataclass
class LoadedTasks:
    """What is to be asked.

    Attributes:
        tasks: by their names, as lm_eval's `evaluate` takes them.
        groups: likewise.
        absent: tasks of the groups for which there are no records.
    """

    tasks: dict[str, Task] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)


class _Absent:
    """Stands for a task without records until its group is whole."""

    def __init__(self, name: str, places: str) -> None:
        self.task_name, self.places = name, places


class _LocalFactory(TaskFactory):
    """Builds lm_eval's tasks, by their own configurations, over records on this machine."""

    def __init__(self, folder: TaskFolder, num_fewshot: int | None) -> None:
        super().__init__()
        self._folder, self._num_fewshot = folder, num_fewshot
        self.requested = ""

    def _build_task(self, entry: Any, overrides: dict[str, Any] | None) -> Any:
        config = self._load_full_config(entry, overrides)
        name = config["task"]
        if "class" in config or config.get("custom_dataset"):
            raise CalibrationError(
                "the task reads its questions by a program of its own, not from records",
                where=name,
                remedy="choose another task, or leave --task-data out to let it download them",
            )
        asked = config.get("test_split") or config.get("validation_split") or "test"
        subject = config.get("dataset_name")
        found = {asked: self._folder.split(name, self.requested, subject, asked, asked=True)}
        if found[asked] is None:
            places = self._folder.candidates(self.requested, asked, asked=True)
            return _Absent(name, " or ".join(map(str, places)))
        if self._num_fewshot is not None and config.get("num_fewshot") != 0:
            config["num_fewshot"] = self._num_fewshot
        examples = config.get("fewshot_split") or config.get("training_split")
        if examples and config.get("num_fewshot"):
            found[examples] = self._folder.split(name, self.requested, subject, examples, asked=False)
            if found[examples] is None:
                path = self._folder.candidates(self.requested, examples, asked=False)[0]
                raise CalibrationError(
                    f"{name} shows {config['num_fewshot']} examples with every question: they are not there",
                    where=path,
                    remedy="put that split of its data set there, or ask without examples: --num-fewshot 0",
                )
        for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
            if config.get(key) not in found:
                config.pop(key, None)
        return _built(config, {split: records for split, records in found.items() if records}, asked)


def load_tasks(
    names: Sequence[str], folder: TaskFolder | None = None, num_fewshot: int | None = None
) -> LoadedTasks:
    """Load tasks and groups with their questions.

    Args:
        names: of tasks, groups or tags of lm_eval.
        folder: of their records; if None, lm_eval downloads them.
        num_fewshot: examples before each question; if None, as many as the task says.

    Raises:
        RecipeError: a name is unknown, or two of them have a task in common.
        CalibrationError: records are missing or do not fit the task.
    """
    manager = _manager()
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, NEAR_NAMES, 0.6)
            raise RecipeError(
                f"there is no task {name!r}",
                where="--tasks",
                remedy=f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists them all",
            )
    factory = _LocalFactory(folder, num_fewshot) if folder else TaskFactory()
    loaded = LoadedTasks()
    for name in names:
        if isinstance(factory, _LocalFactory):
            factory.requested = name
        with quiet():
            built = _build(manager, factory, name, local=folder is not None)
        _collect(built, name, loaded)
    if folder is None and num_fewshot is not None:
        for task in loaded.tasks.values():
            if task.get_config("num_fewshot") != 0:
                task.set_config(key="num_fewshot", value=num_fewshot)
    for task in loaded.tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)
    return loaded


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the logging of lm_eval and its progress bars from the terminal."""
    from datasets import disable_progress_bars
    from lm_eval.api import task

    disable_progress_bars()
    logger = logging.getLogger("lm_eval")
    level, bar = logger.level, task.tqdm
    logger.setLevel(logging.CRITICAL)
    task.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        logger.setLevel(level)
        task.tqdm = bar


@cache
def _manager() -> TaskManager:
    """lm_eval's index of its thousands of tasks, which takes seconds to make."""
    with quiet():
        return TaskManager()


def _build(manager: TaskManager, factory: TaskFactory, name: str, *, local: bool) -> list[Any]:
    try:
        built = factory.build(manager.task_index[name], registry=manager.task_index)
    except MsquantError:
        raise
    # Whatever a data set's download and a task's own program raise.
    except Exception as error:
        offline = (
            f"without a way to the hub, put them into a folder as {name}.jsonl, or {name}/SPLIT.jsonl for "
            "each split, one JSON object a line with the fields of the hub's data set: --task-data FOLDER"
        )
        raise CalibrationError(
            f"the task's questions cannot be had ({type(error).__name__}: {error})",
            where=name,
            remedy=None if local else offline,
        ) from error
    return built if isinstance(built, list) else [built]


def _collect(built: Sequence[Any], name: str, loaded: LoadedTasks) -> None:
    """Add what was built to the others, without the tasks that are absent."""
    tasks: list[Task] = []
    absent: list[_Absent] = []

    def walk(item: Any) -> bool:
        if isinstance(item, _Absent):
            absent.append(item)
            return False
        if not isinstance(item, Group):
            tasks.append(item)
            return True
        for child in list(item):
            if not walk(child):
                item.pop(child.task_name if isinstance(child, _Absent) else child.name)
        if len(item):
            loaded.groups[item.name] = item
        return len(item) > 0

    for item in built:
        walk(item)
    if not tasks:
        raise CalibrationError(
            "there are no records for this task",
            where=name,
            remedy=f"put them into {absent[0].places}, one JSON object a line with the fields of the hub's "
            "data set",
        )
    for task in tasks:
        if task.task_name in loaded.tasks:
            raise RecipeError(
                f"{task.task_name} is asked for twice",
                where="--tasks",
                remedy=f"leave out {name} or what else contains it",
            )
        loaded.tasks[task.task_name] = task
    loaded.absent += [item.task_name for item in absent]


def _built(config: dict[str, Any], found: dict[str, Records], asked: str) -> Task:
    """A task over records; each of them is checked with the task's own templates."""
    from datasets import Dataset

    splits = {split: Dataset.from_list(records.rows) for split, records in found.items()}
    config = {key: value for key, value in config.items() if key not in ("tag", "group", "task_list")}
    config |= {"custom_dataset": lambda **_: splits, "dataset_kwargs": None}
    records = found[asked]
    try:
        task = ConfigurableTask(config=config)
    # A template names a field that is not there, or a program of the task meets what it cannot take.
    except Exception as error:
        raise _does_not_fit(config["task"], f"{records.path}:{records.lines[0]}", error) from error
    for split, of_split in found.items():
        docs = task.eval_docs if split == asked else task.fewshot_docs()
        same = len(docs) == len(of_split.rows)
        for i, doc in enumerate(docs):
            where = f"{of_split.path}:{of_split.lines[i]}" if same else str(of_split.path)
            _check(task, doc, where)
    return task


def _check(task: Task, doc: dict[str, Any], where: str) -> None:
    try:
        task.doc_to_text(doc)
        target = task.doc_to_target(doc)
        choices = task.doc_to_choice(doc) if task.OUTPUT_TYPE == "multiple_choice" else None
    except Exception as error:
        raise _does_not_fit(task.task_name, where, error) from error
    if choices is None or task.multiple_input or isinstance(target, list):
        return
    right = range(len(choices)) if isinstance(target, int) else choices
    if target not in right:
        raise CalibrationError(
            f"the record's answer {target!r} is none of the {len(choices)} choices of {task.task_name}",
            where=where,
            remedy="write the answer as the hub's data set does",
        )


def _does_not_fit(task: str, where: str, error: Exception) -> CalibrationError:
    return CalibrationError(
        f"the record does not fit the task {task} ({type(error).__name__}: {error})",
        where=where,
        remedy="write the fields of the hub's data set of this task",
    )
