"""`docs/peers.md`: the table of the peers, as the benchmark measured it."""

import datetime
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.peers.environments import versions
from benchmarks.peers.jobs import RUNNERS

if TYPE_CHECKING:
    from benchmarks.peers.jobs import Result

DOCUMENT = Path(__file__).parents[2] / "docs" / "peers.md"
INTRODUCTION = """# Beside its peers

Written by `python -m benchmarks peers` on {date}, one process after the other on {cores} cores:
{versions}. All get the same float32 model and the same 16 x 128 calibration tokens. CPU seconds, wall
time and peak memory are of the whole process, imports and writing included. KL is to the float model in
nats per token, on 4 x 512 tokens of each text: the calibrated kind, the King James Bible and Hamlet;
every folder is computed by the same integer arithmetic on torch, which shares no code with msquant. Lower
is better.

`static` quantizes activations with one scale per tensor, `dynamic` with one per token; `mixed` is static
in attention and per token in feed-forward blocks, which is how experts can be served. llm-compressor runs
SmoothQuant at 0.5, AutoRound SignRound in 200 steps a layer, msModelSlim `iter_smooth`, golden-stick its
own OSL on its own models. msquant is `msquant quantize` with the recipe it makes for such a model, and
once more with `--algo smoothquant`.
"""
COLUMNS = ("", "KL", "perplexity", "CPU s", "wall s", "peak GB", "shards MB")


def write_table(results: Sequence["Result"], document: Path = DOCUMENT) -> None:
    """Write the document.

    Args:
        results: those of one model and scheme next to each other.
        document: the Markdown file.
    """
    import os

    parts = [
        INTRODUCTION.format(
            date=datetime.date.today().isoformat(),
            cores=os.cpu_count(),
            versions=", ".join(map(versions, RUNNERS)),
        )
    ]
    for (model, scheme), group in groupby(results, key=lambda result: result.job.setting):
        parts.append(f"## {model}, {scheme}\n\n" + "\n".join(_rows(list(group))) + "\n")
    document.write_text("\n".join(parts))


def _rows(results: Sequence["Result"]) -> Iterator[str]:
    yield _line(COLUMNS)
    yield _line(["---"] * len(COLUMNS))
    for result in results:
        measured = result.measured
        costs = [
            f"{measured.cpu_seconds:.0f}",
            f"{measured.seconds:.0f}",
            f"{measured.peak_memory / 1e9:.1f}",
        ]
        if result.error:
            yield _line([result.job.peer, f"failed: `{_plain(result.error)}`", "", *costs, ""])
            continue
        kl = ", ".join(f"{value:.4f}" for value in result.kl.values())
        perplexity = ", ".join(f"{value:.2f}" for value in result.perplexity.values())
        yield _line([result.job.peer, kl, perplexity, *costs, f"{result.nbytes / 1e6:.1f}"])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    return text.replace("|", "/").replace("`", "'")
