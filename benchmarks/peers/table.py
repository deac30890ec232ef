"""`docs/peers.md`: the table of the peers, as the benchmark measured it."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.peers.environments import versions
from benchmarks.peers.jobs import RUNNERS

if TYPE_CHECKING:
    from benchmarks.peers.jobs import Result

DOCUMENT = Path(__file__).parents[2] / "docs" / "peers.md"
INTRODUCTION = """# Beside its peers

Written by `python -m benchmarks peers`, one process after the other on {cores} cores:
{versions}. All get the same float32 model and the same 16 x 128 calibration tokens. CPU seconds, wall
time and peak memory are of the whole process, imports and writing included. KL is to the float model in
nats per token, on 4 x 512 tokens of each text (16 x 512 for the tiny models): the calibrated kind, the
King James Bible and Hamlet; every folder is computed by the same integer arithmetic on torch, which shares
no code with msquant, and once more by `msquant compare`. Lower is better.

`static` quantizes activations with one scale per tensor, `dynamic` with one per token; `mixed` is static
in attention and per token in feed-forward blocks, which is how experts can be served. llm-compressor runs
SmoothQuant at 0.5, AutoRound SignRound in 200 steps a layer, msModelSlim `iter_smooth`, golden-stick its
own OSL on its own models. msquant is `msquant quantize` with the recipe it makes for such a model, and
once more with `--algo smoothquant`, whose migration strength is 0.6.
"""
COLUMNS = ("", "KL", "KL, `msquant compare`", "perplexity", "CPU s", "wall s", "peak GB", "shards MB")


def write_table(settings: Sequence[Sequence["Result"]], document: Path = DOCUMENT) -> None:
    """Write the document.

    Args:
        settings: the results of each model and scheme.
        document: the Markdown file.
    """
    import os

    parts = [
        INTRODUCTION.format(
            cores=os.cpu_count(),
            versions=", ".join(map(versions, RUNNERS)),
        )
    ]
    for found in settings:
        job = found[0].job
        rows = "\n".join(_rows(found))
        dates = " and ".join(sorted({result.date for result in found}))
        parts.append(f"## {job.model}, {job.scheme}\n\nMeasured on {dates}.\n\n{rows}\n")
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
            yield _line([result.job.peer, f"failed: `{_plain(result.error)}`", "", "", *costs, ""])
            continue
        kl, compared = (_listed(values, ".3g") for values in (result.kl, result.compared_kl))
        perplexity = _listed(result.perplexity, ".2f")
        yield _line([result.job.peer, kl, compared, perplexity, *costs, f"{result.nbytes / 1e6:.1f}"])


def _listed(values: Mapping[str, float], form: str) -> str:
    return ", ".join(f"{value:{form}}" for value in values.values())


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    return text.replace("|", "/").replace("`", "'")
