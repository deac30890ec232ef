"""What the peers' benchmark has measured so far: a run of some models keeps those of the others."""

import json
from collections.abc import Mapping, Sequence

from benchmarks.peers.jobs import Result, Setting
from msquant.checkpoint.cache import cache_folder


def load_results() -> dict[Setting, list[Result]]:
    """What earlier runs have left; empty if there was none."""
    path = cache_folder() / "benchmarks" / "peers" / "results.json"
    raw = json.loads(path.read_text()) if path.is_file() else []
    results = [[Result.from_json(item) for item in setting] for setting in raw]
    return {(found[0].job.model, found[0].job.scheme): found for found in results}


def save_results(results: Mapping[Setting, Sequence[Result]]) -> None:
    """Write all of them."""
    path = cache_folder() / "benchmarks" / "peers" / "results.json"
    path.write_text(json.dumps([[result.to_json() for result in found] for found in results.values()]))
