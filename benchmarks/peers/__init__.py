"""msquant beside its peers: the same models, tokens, texts and arithmetic, each peer in its own environment.

`python -m benchmarks peers` makes the environments (about 10 GB), trains the tiny models, runs everything one
after the other, and writes `docs/peers.md`. Peers that fail are in the table with their own last error.
`MSQUANT_PEERS_MODELS=tiny-qwen3,...` runs some of the models again, `MSQUANT_PEERS_SCHEMES=W4A8_DYNAMIC,...`
some of the schemes and `MSQUANT_PEERS=AutoRound,...` some of the peers; what was measured of the others
stays.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.peers.jobs import FOUR_BIT_SCHEMES, SCHEMES, Job, Result, Setting, peers_of, run_job
from benchmarks.peers.results import load_results, save_results
from benchmarks.peers.table import write_table
from benchmarks.rows import row
from benchmarks.smollm2 import float_folder
from benchmarks.tiny_deepseek import trained_model
from benchmarks.tiny_qwen import trained_qwen3, trained_qwen3_moe, trained_qwen3_next

MODELS: dict[str, Callable[[], Path]] = {
    "tiny-qwen3": trained_qwen3,
    "tiny-qwen3-moe": trained_qwen3_moe,
    "tiny-qwen3-next": trained_qwen3_next,
    "tiny-deepseek-v3": trained_model,
    "smollm2-135m": float_folder,
}
TEXT_SEQUENCES = dict.fromkeys(MODELS, 16) | {"smollm2-135m": 4}
"""Of each text: a router's choices, which flip, make the figures of a small model uncertain with fewer."""

MOST_CPU = {"msquant": 10.0, "msquant smoothquant": 1.5}
"""CPU seconds at most, as multiples of llm-compressor's; on `TIMED`: tiny ones are all start-up."""
TIMED = "smollm2-135m"


def measure() -> list[dict[str, Any]]:
    """Run every peer on every model in every scheme, and write the table after each of these."""
    models, schemes = (_named(f"MSQUANT_PEERS_{what}") for what in ("MODELS", "SCHEMES"))
    wanted = [each for each in _settings(models or MODELS) if not schemes or each[1] in schemes]
    for setting, found in _results(wanted, _named("MSQUANT_PEERS")):
        results = load_results()
        by_peer = {result.job.peer: result for result in [*results.get(setting, []), *found]}
        results[setting] = [by_peer[peer] for peer in peers_of(setting[1]) if peer in by_peer]
        results = {known: results[known] for known in _settings(MODELS) if known in results}
        save_results(results)
        write_table(list(results.values()))
    return [
        row(result.job.title, result.line, *_target(result, found))
        for found in load_results().values()
        for result in found
    ]


def _named(variable: str) -> list[str]:
    return [name for name in os.environ.get(variable, "").split(",") if name]


def _settings(models: Iterable[str]) -> Iterator[Setting]:
    return ((model, scheme) for model in models for scheme in SCHEMES[model])


def _results(wanted: Iterable[Setting], names: Collection[str]) -> Iterator[tuple[Setting, list[Result]]]:
    from benchmarks.accuracy import Reference

    for model, settings in groupby(wanted, key=lambda setting: setting[0]):
        folder = MODELS[model]()
        reference = Reference(folder, TEXT_SEQUENCES[model])
        for _, scheme in settings:
            found = []
            for peer in (name for name in peers_of(scheme) if not names or name in names):
                with tempfile.TemporaryDirectory(prefix="msquant-peers-") as parent:
                    found.append(run_job(Job(model, scheme, peer), folder, Path(parent), reference))
                print(f"{found[-1].job.title}: {found[-1].line}", file=sys.stderr)
            yield (model, scheme), found


def _target(result: Result, within: list[Result]) -> tuple[str, bool | None]:
    """The default is to have the lowest KL of its setting on every text; both are bounded in time."""
    if not result.job.is_ours:
        return "", None
    rivals = [other for other in within if other.kl and not other.job.is_ours]
    text, met = "", bool(result.kl)
    if result.job.peer == "msquant":
        text = "the lowest KL on every text; "
        met &= all(result.kl[name] <= rival.kl[name] for rival in rivals for name in result.kl)
    if result.job.model == TIMED and result.job.scheme not in FOUR_BIT_SCHEMES:
        most = MOST_CPU[result.job.peer]
        text += f"at most {most} times llm-compressor's CPU seconds"
        theirs = [other.measured.cpu_seconds for other in rivals if other.job.peer == "llm-compressor"]
        met &= all(result.measured.cpu_seconds <= most * seconds for seconds in theirs)
    return text.removesuffix("; "), met if text else None
