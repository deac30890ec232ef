"""The flow of `msquant quantize --max-kl` and its like: the smallest folder that keeps a promise.

Three sets of text that share nothing: the calibration text quantizes, the choice texts (`frontier.py`) say
what every unit costs, and the verdict texts say whether the promise is kept. The assignment of schemes with
the fewest bytes whose predicted loss is within the bound is quantized and measured. Where the verdict misses,
the bound is tightened, and only layers whose schemes change are quantized again; at most `ROUNDS` times.

Everything is kept in `<output>.promise` until the promise is kept: the losses, each round's folder and what
was measured of it. A run that was interrupted continues with the decoder layer that it was in, of the pass
that measures the losses or of a round.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from msquant.calibration.verdict import require_texts, verdict_domains
from msquant.checkpoint.disk import shard_file_bytes, shown_sizes, writing
from msquant.checkpoint.journal import JOURNAL_NAME
from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.memory import MEMORY_BUDGET, peak_memory
from msquant.checkpoint.output_folder import OutputFolder
from msquant.checkpoint.results import MANIFEST_NAME, remember_result
from msquant.checkpoint.tokenizer import load_tokenizer
from msquant.checkpoint.writer import write_json
from msquant.errors import CalibrationError, OutputError, RecipeError
from msquant.evaluation.inputs import Text
from msquant.flows.comparison import score_folders, text_windows
from msquant.flows.frontier import (
    Subject,
    UnitLosses,
    assigned,
    losses_identity,
    measure_losses,
    open_subject,
    scheme_counts,
)
from msquant.flows.pipeline import Reuse, quantize
from msquant.flows.source import folder_plan
from msquant.models.device import require_device
from msquant.progress import Progress
from msquant.quantization.assignment import Assignment, most_accurate, smallest
from msquant.recipe.recipe import Recipe
from msquant.schemes import Scheme

ROUNDS = 3
"""How often is quantized at most."""

HEADROOM = 0.85
"""The part of the bound that a prediction may take at first: the rest is for texts being different."""

TIGHTENED = 0.93
"""The part of the bound that is aimed at when a verdict has missed it."""

WORTH = 0.03
"""A further round for fewer bytes is made where it is predicted to save at least so much of them."""

LEAST_USED = 0.25
"""What a choice text is taken to use of a bound at least: perplexity may rise by little only by chance."""

SEQUENCES, SEQUENCE_LENGTH = 2, 256
"""Windows of each verdict text, and tokens in each."""

WORK_SUFFIX = ".promise"

_LOSSES, _ROUNDS, _PASS = "losses.json", "rounds.json", "pass"


@dataclass(frozen=True)
class Bounds:
    """What is promised; at least one of the three.

    Attributes:
        max_kl: KL from the float model on the verdict text on which it is greatest, in nats.
        max_bytes: of the folder's safetensors files.
        max_perplexity_increase: over the float model's perplexity, as a part of it, on the verdict text on
            which it is greatest.
    """

    max_kl: float | None = None
    max_bytes: int | None = None
    max_perplexity_increase: float | None = None

    def check(self) -> None:
        """Raise RecipeError for bounds that mean nothing."""
        if self.max_bytes is None and self.nats is None:
            raise RecipeError(
                "there is no bound",
                where="--max-kl",
                remedy="give --max-kl, --max-perplexity-increase or --max-size",
            )
        if self.max_kl is not None and not (0 < self.max_kl < math.inf):
            raise RecipeError(
                f"is {self.max_kl:g}: only the float model itself is at 0",
                where="--max-kl",
                remedy="give a KL in nats above 0, such as 0.02",
            )
        increase = self.max_perplexity_increase
        if increase is not None and not (0 < increase < math.inf):
            raise RecipeError(
                f"is {increase:g}",
                where="--max-perplexity-increase",
                remedy="give a part of the float model's perplexity above 0, such as 2%",
            )
        if self.max_bytes is not None and self.max_bytes < 1:
            raise RecipeError(f"is {self.max_bytes}", where="--max-size", remedy="give a size, such as 340GB")

    @property
    def nats(self) -> float | None:
        """What a predicted KL is held to; None where bytes alone are bounded.

        Where a text's next tokens are as likely as the float model says, KL is what their mean negative
        log-likelihood rises by, the logarithm of what perplexity is multiplied by.
        """
        increase = self.max_perplexity_increase
        given = [self.max_kl, None if increase is None else math.log1p(increase)]
        return min((bound for bound in given if bound is not None), default=None)

    def used(self, kl: Mapping[str, float], increase: Mapping[str, float]) -> tuple[float, str]:
        """The greatest part of a bound in nats that a text takes, above 1 if it is broken, and what it is.

        Args:
            kl: from the float model, of each text.
            increase: of perplexity, of each text.
        """
        parts = [(0.0, "")]
        if self.max_kl is not None:
            text, found = max(kl.items(), key=lambda item: item[1])
            parts.append((found / self.max_kl, f"the verdict text {text} is at a KL of {found:.4g}"))
        if self.max_perplexity_increase is not None:
            text, found = max(increase.items(), key=lambda item: item[1])
            part = math.log1p(found) / math.log1p(self.max_perplexity_increase)
            parts.append((part, f"on the verdict text {text} perplexity rises by {found:.2%}"))
        return max(parts)


@dataclass(frozen=True)
class Round:
    """One quantization on the way.

    Attributes:
        number: from 1.
        target: the predicted loss that was aimed at, in nats; None where bytes alone were bounded.
        predicted: of each choice text.
        choice: measured KL of each choice text.
        verdict: measured KL of each verdict text.
        choice_increase: of perplexity over the float model's, as a part of it, of each choice text.
        verdict_increase: of each verdict text.
        nbytes: of the folder's safetensors files.
        schemes: how many linears each has.
        reused: layers that were taken from an earlier round.
        kept: whether the promise is.
        folder: of the round.
        gap: the part by which the assignment may be larger than the smallest for its prediction.
    """

    number: int
    target: float | None
    predicted: dict[str, float]
    choice: dict[str, float]
    verdict: dict[str, float]
    choice_increase: dict[str, float]
    verdict_increase: dict[str, float]
    nbytes: int
    schemes: dict[str, int]
    reused: int
    kept: bool
    folder: str
    gap: float

    @property
    def worst(self) -> float:
        """KL on the verdict text on which it is greatest."""
        return max(self.verdict.values())


@dataclass(frozen=True)
class PromiseResult:
    """What became of a promise.

    Attributes:
        kept: whether it is.
        folder: the output if it is; else the best round's folder, None if there is none.
        rounds: what was quantized and measured, in order.
        best: the number of the round whose folder that is; None if there is none.
        losses: of the units.
        reason: what stands in the way; empty if it is kept.
        seconds: wall time of this run.
        cpu_seconds: processor time of this process so far.
        peak_memory: greatest resident set of this process so far, in bytes.
    """

    kept: bool
    folder: Path | None
    rounds: list[Round]
    best: int | None
    losses: UnitLosses
    reason: str
    seconds: float
    cpu_seconds: float
    peak_memory: int


def keep_promise(
    recipe: Recipe,
    output: Path,
    bounds: Bounds,
    *,
    schemes: Sequence[Scheme] = (),
    verdict_texts: Sequence[str] = (),
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
) -> PromiseResult:
    """Quantize a model into the smallest folder that keeps bounds, or continue what a call has begun.

    Args:
        recipe: in one format; its schemes are chosen here, its algorithm and calibration stay.
        output: the folder to make; it appears only when the promise is kept.
        bounds: the promise.
        schemes: to choose from beside floating point; by default the most accurate of 8 and of 4 bits that
            the format's server takes.
        verdict_texts: sources in place of the builtin verdict texts.
        source: folder of the weights, in place of the recipe's model.
        overwrite: replace an earlier result of msquant there.
        restart: forget what an interrupted call has finished.
        device: `cpu` or `ascend`.
        memory_budget: bytes of hidden states held in memory.
        verbose: show golden-stick's own log.
        fetch: downloads the weights of a hub id that are not here.
        offline: ask no hub for calibration text.
        progress: callbacks.
        remember: note the folder as the newest result.

    Returns:
        The result, also of a promise that cannot be kept.

    Raises:
        MsquantError: the input is bad, before any work where that can be told; or as `quantize`.
    """
    started = time.monotonic()
    progress = progress or Progress()
    bounds.check()
    require_device(device)
    require_texts(verdict_texts)
    if not recipe.evaluation.sequences:
        raise RecipeError(
            "leaves out the measurement that a promise is made of",
            where="--no-evaluate",
            remedy="leave it out, or give evaluation.sequences in the recipe",
        )
    with OutputFolder(output, overwrite=overwrite) as target:
        work = _Work(target.target.with_name(target.target.name + WORK_SUFFIX))
        if restart:
            work.clear()
        subject = open_subject(
            recipe, schemes=schemes, source=source, fetch=fetch, offline=offline, progress=progress
        )
        _require_possible(bounds, subject)
        verdict = verdict_tokens(subject, verdict_texts)
        identity = losses_identity(subject, device)
        losses = work.losses(identity)
        if losses is None:
            losses = measure_losses(
                subject,
                work.folder / _PASS,
                device=device,
                memory_budget=memory_budget,
                verbose=verbose,
                progress=progress,
            )
            work.keep_losses(identity, losses)
        run = _Run(
            subject, losses, bounds, work, verdict, source, device, memory_budget, verbose, offline, progress
        )
        rounds, reason = run.rounds()
        kept = [each for each in rounds if each.kept]
        if not kept:
            nearest = min(
                rounds, key=lambda each: bounds.used(each.verdict, each.verdict_increase), default=None
            )
            folder, best = (None, None) if nearest is None else (Path(nearest.folder), nearest.number)
        else:
            taken = min(kept, key=lambda each: each.nbytes)
            best, reason = taken.number, ""
            _record(taken, rounds, bounds, losses, verdict)
            with writing(target.path):
                # The manifest first: a round without one is not taken for a finished one.
                for path in sorted(Path(taken.folder).iterdir(), key=lambda each: each.name != MANIFEST_NAME):
                    path.rename(target.path / path.name)
            folder = target.finish()
            work.clear()
    if kept and remember and folder is not None:
        remember_result(folder)
    return PromiseResult(
        kept=bool(kept),
        folder=folder,
        rounds=rounds,
        best=best,
        losses=losses,
        reason=reason,
        seconds=time.monotonic() - started,
        cpu_seconds=time.process_time(),
        peak_memory=peak_memory(),
    )


def _require_possible(bounds: Bounds, subject: Subject) -> None:
    """Refuse what no measurement can make possible."""
    if bounds.max_bytes is not None and bounds.max_bytes < subject.least_bytes:
        given, least = shown_sizes(bounds.max_bytes, subject.least_bytes)
        raise RecipeError(
            f"{given} is less than the {least} of the smallest folder that this server takes",
            where="--max-size",
            remedy=f"give {math.ceil(subject.least_bytes / 1e6)}MB or more, or another server with --for",
        )


def verdict_tokens(subject: Subject, words: Sequence[str] = ()) -> list[Text]:
    """The tokens that a promise is judged by. Raises CalibrationError.

    Args:
        subject: the model.
        words: sources in place of the builtin texts.
    """
    domains = verdict_domains(words)
    if not domains:
        raise CalibrationError("there is no text to judge by", where="--verdict-text")
    length = min(SEQUENCE_LENGTH, subject.source.config.longest)
    texts = text_windows(domains, load_tokenizer(subject.source.folder), SEQUENCES, length)
    if len({text.name for text in texts}) < len(texts):
        raise CalibrationError(
            "two texts have one name", where="--verdict-text", remedy="give each file a name of its own"
        )
    return texts


class _Work:
    """The folder `<output>.promise`, which is msquant's own by the losses, or the pass over them, in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def clear(self) -> None:
        """Remove it. Raises OutputError if it is not msquant's."""
        if not self.folder.exists():
            return
        self._require_own()
        with writing(self.folder):
            shutil.rmtree(self.folder)

    def _require_own(self) -> None:
        marks = (_LOSSES, f"{_PASS}/{JOURNAL_NAME}")
        if any(self.folder.iterdir()) and not any((self.folder / name).is_file() for name in marks):
            raise OutputError(
                "was not made by msquant", where=self.folder, remedy="move it away, or name another --output"
            )

    def losses(self, identity: dict[str, Any]) -> UnitLosses | None:
        """What an earlier run has measured; None if there was none. Raises OutputError if of other input."""
        if not self.folder.exists():
            return None
        self._require_own()
        if not (self.folder / _LOSSES).is_file():
            return None
        found = read_json(self.folder / _LOSSES)
        if found.get("identity") != identity:
            changed = [key for key in identity if (found.get("identity") or {}).get(key) != identity[key]]
            raise OutputError(
                f"an unfinished run was started otherwise: {', '.join(changed)} differ",
                where=self.folder,
                remedy="start over with --restart, or name another folder with --output",
            )
        with self._readable(_LOSSES):
            return UnitLosses.from_dict(found["losses"])

    def keep_losses(self, identity: dict[str, Any], losses: UnitLosses) -> None:
        """Keep them for a later run, in place of what was measured of each layer."""
        write_json(self.folder / _LOSSES, {"identity": identity, "losses": losses.as_dict()})
        with writing(self.folder):
            shutil.rmtree(self.folder / _PASS)

    def round_folder(self, number: int) -> Path:
        """Where a round's folder is."""
        return self.folder / f"round-{number}"

    @contextmanager
    def _readable(self, name: str) -> Iterator[None]:
        """Raise OutputError for a file that does not hold what a run has left."""
        try:
            yield
        except (AttributeError, KeyError, TypeError, ValueError, RecipeError) as error:
            raise OutputError(
                f"is damaged: {error!r}", where=self.folder / name, remedy="start over with --restart"
            ) from error

    def rounds(self, settings: dict[str, Any]) -> list[tuple[Round, list[dict[str, Any]]]]:
        """The rounds that are finished under the same bounds and texts, with their journals' records."""
        path = self.folder / _ROUNDS
        found = read_json(path) if path.is_file() else {}
        if found.get("settings") != settings:
            return []
        with self._readable(_ROUNDS):
            # A folder that the file names is not taken: its files would be moved.
            made = [
                (Round(**{**each["round"], "folder": str(self.round_folder(number))}), list(each["records"]))
                for number, each in enumerate(found["rounds"], 1)
            ]
        whole = [(Path(each.folder) / MANIFEST_NAME).is_file() for each, _ in made]
        return made[: whole.index(False)] if False in whole else made

    def keep_rounds(
        self, settings: dict[str, Any], rounds: Sequence[tuple[Round, list[dict[str, Any]]]]
    ) -> None:
        """Keep them for a later run."""
        listed = [{"round": asdict(each), "records": records} for each, records in rounds]
        write_json(self.folder / _ROUNDS, {"settings": settings, "rounds": listed})


class _Run:
    """The rounds of one promise."""

    def __init__(
        self,
        subject: Subject,
        losses: UnitLosses,
        bounds: Bounds,
        work: _Work,
        verdict: Sequence[Text],
        source: str | None,
        device: str,
        memory_budget: int,
        verbose: bool,
        offline: bool,
        progress: Progress,
    ) -> None:
        self._subject, self._losses, self._bounds, self._work = subject, losses, bounds, work
        self._verdict, self._source, self._device, self._memory_budget = (
            verdict,
            source,
            device,
            memory_budget,
        )
        self._verbose, self._offline, self._progress = verbose, offline, progress
        shapes = {text.name: list(text.tokens.shape) for text in verdict}
        sums = {text.name: hashlib.sha256(text.tokens.tobytes()).hexdigest() for text in verdict}
        self.settings: dict[str, Any] = json.loads(
            json.dumps({"bounds": asdict(bounds), "verdict": shapes, "sha256": sums})
        )

    def rounds(self) -> tuple[list[Round], str]:
        """Quantize and measure until the promise is kept or cannot be; the rounds, and what is in the way."""
        bounds, finished = self._bounds, self._work.rounds(self.settings)
        target = None if bounds.nats is None else bounds.nats * HEADROOM
        done: list[tuple[Round, list[dict[str, Any]]]] = []
        seen: list[Assignment] = []
        reason = ""
        for number in range(1, ROUNDS + 1):
            assignment = self._assignment(target)
            if assignment is None:
                reason = self._too_tight(target)
                break
            if all(option.scheme.is_float for option in assignment.chosen):
                reason = f"only the float model is predicted to stay within {target:.4g}"
                break
            if any(assignment.chosen == earlier.chosen for earlier in seen):
                reason = "a tighter bound gives the same schemes"
                break
            seen.append(assignment)
            if len(finished) >= number:
                done.append(finished[number - 1])
            else:
                done.append(self._round(number, target, assignment, done))
                self._work.keep_rounds(self.settings, done)
            last = done[-1][0]
            further = self._next_target(last, assignment, target, [each for each, _ in done])
            if further is None:
                break
            target = further
        rounds = [each for each, _ in done]
        if rounds and not any(each.kept for each in rounds) and not reason:
            last = rounds[-1]
            part, where = bounds.used(last.verdict, last.verdict_increase)
            reason = f"after {len(rounds)} rounds {where}" if part > 1 else f"it takes {last.nbytes} bytes"
        return rounds, reason

    def _assignment(self, target: float | None) -> Assignment | None:
        units, room = self._losses.units, None
        if self._bounds.max_bytes is not None:
            room = self._bounds.max_bytes - self._subject.other_bytes
        while True:
            if target is not None:
                made = smallest(units, self._losses.sums(target), room)
            else:
                assert room is not None
                made = most_accurate(units, room)
            if made is None or room is None or all(option.scheme.is_float for option in made.chosen):
                return made
            # Headers of the shards grow with the number of tensors, which bytes of units leave out.
            recipe = assigned(self._subject.recipe, units, made)
            over = folder_plan(recipe, self._subject.source).file_bytes - (self._bounds.max_bytes or 0)
            if over <= 0:
                return made
            room -= over

    def _too_tight(self, target: float | None) -> str:
        if self._bounds.max_bytes is None or target is None:
            return f"no assignment is predicted to stay within {target:.4g}"
        room = self._bounds.max_bytes - self._subject.other_bytes
        least = most_accurate(self._losses.units, room)
        (size,) = shown_sizes(self._bounds.max_bytes)
        loss = math.nan if least is None else max(self._losses.predicted(least.losses))
        return f"within {size} the least predicted KL is {loss:.4g}, and {target:.4g} is aimed at"

    def _next_target(
        self, last: Round, assignment: Assignment, target: float | None, done: Sequence[Round]
    ) -> float | None:
        """The predicted loss to aim at next; None to stop."""
        if target is None:
            return None
        predicted = max(last.predicted.values())
        if not last.kept:
            if any(each.kept for each in done):
                return None
            # The prediction is off by this much, and the verdict texts are this much harder.
            used, _ = self._bounds.used(last.verdict, last.verdict_increase)
            return min(predicted, target) * TIGHTENED / used
        # The verdict has been kept. Only the choice texts say whether there is room left.
        used, _ = self._bounds.used(last.choice, last.choice_increase)
        room = HEADROOM * predicted / max(used, LEAST_USED)
        if room <= target:
            return None
        wider = self._assignment(room)
        if wider is None or assignment.nbytes - wider.nbytes < WORTH * last.nbytes:
            return None
        return room

    def _round(
        self,
        number: int,
        target: float | None,
        assignment: Assignment,
        done: Sequence[tuple[Round, list[dict[str, Any]]]],
    ) -> tuple[Round, list[dict[str, Any]]]:
        subject, progress = self._subject, self._progress
        counts = scheme_counts(self._losses.units, assignment)
        listed = ", ".join(f"{count} {word}" for word, count in counts.items())
        predicted = self._losses.predicted(assignment.losses)
        progress.stage(f"round {number}: {listed}, predicted KL {max(predicted):.4f}")
        recipe = assigned(subject.recipe, self._losses.units, assignment)
        reuse = [Reuse(Path(each.folder), records) for each, records in reversed(done)]
        folder = self._work.round_folder(number)
        if folder.exists():
            # Made, but not measured; or what is left of one that was on its way to the output.
            with writing(folder):
                shutil.rmtree(folder)
        result = quantize(
            recipe,
            folder,
            source=self._source,
            device=self._device,
            memory_budget=self._memory_budget,
            verbose=self._verbose,
            offline=self._offline,
            progress=progress,
            remember=False,
            reuse=reuse,
        )
        progress.stage("measuring on the verdict texts")
        _, score = score_folders(
            [subject.source.folder, result.folder],
            self._verdict,
            self._device,
            self._memory_budget,
            Progress(layer=lambda record: progress.step(f"verdict, decoder layer {record['index']}")),
        )
        assert result.evaluation is not None
        choice, choice_increase = _measured(result.evaluation["texts"])
        verdict, verdict_increase = _measured([asdict(text) for text in score.texts])
        nbytes, room = shard_file_bytes(result.folder), self._bounds.max_bytes
        used, _ = self._bounds.used(verdict, verdict_increase)
        kept = used <= 1 and (room is None or nbytes <= room)
        made = Round(
            number=number,
            target=target,
            predicted=dict(zip(self._losses.texts, predicted, strict=True)),
            choice=choice,
            verdict=verdict,
            choice_increase=choice_increase,
            verdict_increase=verdict_increase,
            nbytes=nbytes,
            schemes=counts,
            reused=result.reused,
            kept=kept,
            folder=str(result.folder),
            gap=assignment.gap,
        )
        said = "kept" if kept else "missed"
        progress.stage(f"round {number}: {said}, {made.worst:.4f} on the worst verdict text")
        return made, result.records


def _measured(texts: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """KL and the increase of perplexity by the names of texts, from `TextScore`s as plain data."""
    return (
        {text["text"]: float(text["kl"]) for text in texts},
        {text["text"]: text["perplexity"] / text["baseline_perplexity"] - 1 for text in texts},
    )


def _record(
    taken: Round,
    rounds: Sequence[Round],
    bounds: Bounds,
    losses: UnitLosses,
    verdict: Sequence[Text],
) -> None:
    """Write into a folder's manifest what was promised and measured, and on which text each number is."""
    path = Path(taken.folder) / MANIFEST_NAME
    record = {
        "max_kl": bounds.max_kl,
        "max_bytes": bounds.max_bytes,
        "max_perplexity_increase": bounds.max_perplexity_increase,
        "kept": taken.kept,
        "kl": taken.worst,
        "texts": {
            "choice": list(losses.texts),
            "verdict": {text.name: list(text.tokens.shape) for text in verdict},
        },
        "interaction": losses.interaction,
        "rounds": [{key: value for key, value in asdict(each).items() if key != "folder"} for each in rounds],
        "round": taken.number,
    }
    write_json(path, read_json(path) | {"promise": record})
