"""Several runs of msquant side by side: their scores beside their limits, and their decoder layers."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from msquant.checkpoint.results import MANIFEST_NAME
from msquant.errors import CheckpointError, RecipeError
from msquant.evaluation.ranking import listed, rank_layers
from msquant.reporting.collect import SOURCE_HASH, collect
from msquant.reporting.data import Report
from msquant.reporting.drawing import SERIES
from msquant.schemes import parse_scheme

MOST_RUNS = len(SERIES)
"""As many as a chart can tell apart."""
_WORST = 3


@dataclass(frozen=True)
class RunComparison:
    """Runs side by side.

    Attributes:
        labels: what each is called, no two alike.
        runs: what there is to know of each, without the histograms of its weights.
        remarks: what makes their scores unlike, and which is nearest to the float model; a sentence each.
    """

    labels: tuple[str, ...]
    runs: tuple[Report, ...]
    remarks: tuple[str, ...]


def compare_runs(
    folders: Sequence[Path], *, check: bool = True, stage: Callable[[str], None] = lambda text: None
) -> RunComparison:
    """Read several folders that msquant made.

    Args:
        folders: two to `MOST_RUNS`, each with its `msquant.json`.
        check: as for `collect`.
        stage: likewise.

    Raises:
        RecipeError: there are too few or too many, or one is named twice.
        CheckpointError: one is not there, was not made by msquant, or cannot be read.
    """
    _check_folders(folders)
    runs = tuple(collect(folder, check=check, most_weights=0, stage=stage) for folder in folders)
    labels = _labels(folders, runs)
    return RunComparison(labels, runs, tuple(_remarks(labels, runs)))


def _check_folders(folders: Sequence[Path]) -> None:
    if not 2 <= len(folders) <= MOST_RUNS:
        raise RecipeError(f"{len(folders)} runs cannot be compared", remedy=f"name 2 to {MOST_RUNS} folders")
    seen: set[Path] = set()
    for folder in folders:
        if not folder.is_dir():
            raise CheckpointError("there is no such folder", where=folder, remedy="check the path")
        if not (folder / MANIFEST_NAME).is_file():
            raise CheckpointError(
                f"was not made by msquant: it has no {MANIFEST_NAME}",
                where=folder,
                remedy="compare the predictions of folders of any origin with: msquant compare A B",
            )
        if folder.resolve() in seen:
            raise RecipeError("is named twice", where=folder, remedy="name every folder once")
        seen.add(folder.resolve())


def _labels(folders: Sequence[Path], runs: Sequence[Report]) -> tuple[str, ...]:
    """The names of the folders; where two are alike, with the folder that they are in."""
    names = Counter(run.name for run in runs)
    labels = [
        run.name if names[run.name] == 1 else f"{folder.resolve().parent.name}/{run.name}"
        for folder, run in zip(folders, runs, strict=True)
    ]
    again = Counter(labels)
    return tuple(
        label if again[label] == 1 else f"{label} ({number})" for number, label in enumerate(labels, 1)
    )


def _remarks(labels: Sequence[str], runs: Sequence[Report]) -> list[str]:
    remarks = []
    sources = {label: run.facts.get(SOURCE_HASH) for label, run in zip(labels, runs, strict=True)}
    if len(set(filter(None, sources.values()))) > 1:
        remarks.append("They were not made from the same model: their scores are no measure of the runs.")
    unknown = [label for label, source in sources.items() if source is None]
    remarks += [f"It is not recorded which model {label} was made from." for label in unknown]
    texts = {
        tuple((text.text, text.tokens) for text in run.evaluation.texts)
        for run in runs
        if run.evaluation and run.evaluation.texts
    }
    if len(texts) > 1:
        remarks.append("They were not evaluated on the same texts: their scores cannot be compared.")
    scores = {
        label: run.evaluation.overall.kl
        for label, run in zip(labels, runs, strict=True)
        if run.evaluation and run.evaluation.overall and run.evaluation.overall.kl is not None
    }
    remarks += [f"{label} was not evaluated." for label in labels if label not in scores]
    if not remarks and scores:
        best = min(scores, key=lambda label: scores[label])
        remarks.append(f"Nearest to the model in floating point: {best}, with a KL of {scores[best]:.3g}.")
    return remarks


def schemes(run: Report) -> str:
    """The schemes of a run's quantized modules, the most frequent first."""
    counts: Counter[str] = Counter()
    for kind in run.kinds:
        if not parse_scheme(kind.scheme).is_float:
            counts[kind.scheme] += kind.modules
    return ", ".join(f"{scheme} ({count})" for scheme, count in counts.most_common())


def own_snr(run: Report) -> dict[int, float | None]:
    """Signal-to-noise of each decoder layer's own, in dB."""
    return run.evaluation.own_snr if run.evaluation else {}


def worst(run: Report) -> str:
    """The decoder layers of a run that add most noise of their own, with that."""
    snr = own_snr(run)
    return listed(snr, rank_layers(snr)[:_WORST])


def texts(found: RunComparison) -> dict[str, list[float | None]]:
    """KL of every run on each text that one of them was evaluated on, and at last on all of them."""
    rows: dict[str, list[float | None]] = {}
    for place, run in enumerate(found.runs):
        if run.evaluation is None:
            continue
        overall = [run.evaluation.overall] if run.evaluation.overall else []
        for text in [*run.evaluation.texts, *overall]:
            rows.setdefault(text.text, [None] * len(found.runs))[place] = text.kl
    return rows


def layers(found: RunComparison) -> dict[int, list[float | None]]:
    """Signal-to-noise of each decoder layer's own in every run, in dB."""
    series = [own_snr(run) for run in found.runs]
    return {index: [snr.get(index) for snr in series] for index in sorted(set().union(*series))}
