"""What `msquant evaluate --tasks` shows."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from msquant.cli import console
from msquant.errors import RecipeError

if TYPE_CHECKING:
    from msquant.tasks.task_run import TaskResult, TaskScore

# Of progress where there is no bar.
MOST_LINES = 20


def refuse(options: Mapping[str, Any], remedy: str) -> None:
    """Refuse options that would have no effect. Raises RecipeError at the first that is given."""
    for option, value in options.items():
        if value is not None:
            raise RecipeError(
                "the option has no effect here", where=option, remedy=f"leave it out, or {remedy}"
            )


def run(model: str, tasks: list[str], *, verbose: bool, **settings: Any) -> "TaskResult":
    """Ask questions with progress on the terminal; see `msquant.tasks.task_run.evaluate_tasks`."""
    from msquant.models.device import silence_libraries

    if not verbose:
        silence_libraries()
    from msquant.cli.layer_progress import LayerProgress
    from msquant.progress import Progress
    from msquant.tasks.task_run import evaluate_tasks

    with LayerProgress("answer", MOST_LINES) as display:
        progress = Progress(
            stage=display.stage,
            layers=display.start,
            layer=lambda record: display.advance(""),
        )
        return evaluate_tasks(model, tasks, progress=progress, **settings)


def show(result: "TaskResult", *, as_json: bool) -> None:
    """Write a result: every score as JSON, or a table of what was asked for, without the tasks of groups."""
    if as_json:
        console.print_json(result.as_dict())
        return
    columns = ["task", "metric", "value", "stderr", "questions"]
    if result.baseline is not None:
        columns.append("float")
    floats = {(score.task, score.metric): score for score in result.baseline_scores}
    rows = [
        _row(score, floats.get((score.task, score.metric)))
        for score in result.scores
        if score.group or not score.member
    ]
    against = f" against {result.baseline}" if result.baseline else ""
    by = f" at {result.endpoint}" if result.endpoint else ""
    caption = f"lm_eval {result.lm_eval}" + (f", {result.limit} questions a task" if result.limit else "")
    console.print_table(f"{result.model}{by}{against}", columns, rows, caption=caption)
    if result.absent:
        console.print_warning(f"no records, and left out of their groups: {', '.join(result.absent)}")
    console.print_line(f"Took {result.seconds:.0f} s and {console.as_bytes(result.peak_memory)} of memory.")


def _row(score: "TaskScore", beside: "TaskScore | None") -> list[Any]:
    error = "" if score.stderr is None else f"{score.stderr:.4f}"
    row = [
        f"{score.task} v{score.version}",
        score.metric.replace(",", ", "),
        f"{score.value:.4f}",
        error,
        score.questions,
    ]
    return [*row, f"{beside.value:.4f}"] if beside else row
