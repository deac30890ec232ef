"""`msquant quantize --max-kl` and its like: what was promised and measured, for people and as JSON."""

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from msquant.cli import console, options
from msquant.errors import RecipeError
from msquant.schemes import Scheme, parse_scheme

if TYPE_CHECKING:
    from msquant.flows.promise import PromiseResult

EXIT_NOT_KEPT = 3
"""Exit code of a promise that cannot be kept."""


def parse_schemes(text: str | None) -> tuple[Scheme, ...]:
    """The schemes that `--schemes` names, with commas between them. Raises RecipeError."""
    if text is None:
        return ()
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise RecipeError("names no scheme", where="--schemes", remedy="write W8A8_DYNAMIC,W4A16")
    try:
        return tuple(dict.fromkeys(map(parse_scheme, words)))
    except RecipeError as error:
        raise RecipeError(error.what, where="--schemes", remedy=error.remedy) from error


def refuse_without_bounds(given: Mapping[str, object]) -> None:
    """Raise RecipeError for an option that says how a promise is kept where there is none."""
    remedy = "give --max-kl, --max-perplexity-increase or --max-size, or leave it out"
    options.refuse(given, "is for a promise, and none is made", remedy)


def refuse_with_bounds(given: Mapping[str, object]) -> None:
    """Raise RecipeError for an option that contradicts a promise."""
    shared = "shares one quantization, and a promise takes several: it is kept in one process"
    reasons = {
        "--scheme": "gives all linears one scheme, and the bounds of a promise choose them",
        "--group-size": "is of one scheme, and the bounds of a promise choose schemes",
        "--dry-run": "says what a recipe makes, and the schemes are still to be chosen",
        "--workers": shared,
        "--ray-address": shared,
    }
    options.refuse(given, reasons, "leave out {}, or --max-kl, --max-perplexity-increase and --max-size")


def parse_part(text: str | None, option: str) -> float | None:
    """A part of a whole, `0.02` or `2%`. Raises RecipeError."""
    if text is None:
        return None
    number = text.strip().removesuffix("%")
    try:
        return float(number) / (100 if number != text.strip() else 1)
    except ValueError:
        raise RecipeError(f"{text!r} is no number", where=option, remedy="write 0.02 or 2%") from None


def promise_as_json(result: "PromiseResult") -> dict[str, Any]:
    """What `--json` prints."""
    losses = result.losses
    return {
        "kept": result.kept,
        "folder": None if result.folder is None else str(result.folder),
        "reason": result.reason,
        "round": result.best,
        "rounds": [asdict(each) for each in result.rounds],
        "texts": list(losses.texts),
        "interaction": losses.interaction,
        "seconds": round(result.seconds, 3),
        "cpu_seconds": round(result.cpu_seconds, 3),
        "peak_memory_bytes": result.peak_memory,
    }


def print_promise(result: "PromiseResult") -> None:
    """Show the rounds, the texts of the best one, and whether the promise is kept."""
    rows = [
        [
            each.number,
            "" if each.target is None else f"{each.target:.4f}",
            f"{max(each.predicted.values()):.4f}",
            f"{max(each.choice.values()):.4f}",
            f"{each.worst:.4f}",
            f"{max(each.verdict_increase.values()):+.1%}",
            console.as_bytes(each.nbytes),
            ", ".join(f"{count} {word}" for word, count in each.schemes.items()),
            "yes" if each.kept else "no",
        ]
        for each in result.rounds
    ]
    if rows:
        console.print_table(
            "Rounds: greatest KL to the float model over the texts, in nats",
            ["round", "aimed at", "predicted", "choice", "verdict", "perplexity", "size", "linears", "kept"],
            rows,
            caption="choice: texts that the schemes were chosen by. verdict: texts that nothing has seen; "
            "perplexity: its greatest increase over them.",
        )
    best = next((each for each in result.rounds if each.number == result.best), None)
    if best is not None:
        verdict = sorted(best.verdict.items(), key=lambda item: -item[1])
        console.print_table(
            f"KL and increase of perplexity on the verdict texts, round {best.number}",
            ["text", "KL", "perplexity"],
            [[name, f"{kl:.4f}", f"{best.verdict_increase[name]:+.1%}"] for name, kl in verdict],
        )
    console.print_line(f"time: {result.seconds:.0f} s, {result.cpu_seconds:.0f} s of the processor")
    if result.kept:
        console.print_line(f"Kept: {result.folder}")
        console.print_next(f"msquant inspect {shlex.quote(str(result.folder))}")
        return
    where = "" if result.folder is None else f" The best that was found is in {result.folder}."
    console.print_warning(f"the promise cannot be kept: {result.reason}.{where}", severe=True)
