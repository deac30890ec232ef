"""`python -m benchmarks [NAME ...]`: run measurements, print a table and write JSON for each."""

import argparse
import importlib
import json
import sys
from pathlib import Path

from msquant.cli import console
from msquant.models.device import silence_libraries

NAMES = (
    "quantize",
    "accuracy",
    "scales",
    "four_bits",
    "kv_cache",
    "families",
    "calibration",
    "coverage",
    "sources",
    "perplexity",
    "generation",
    "decode",
    "search",
    "deepseek",
    "memory",
    "scaling",
    "r1",
    "model_free",
    "promise",
    "download",
)
ON_REQUEST = ("peers", "dense_shape")
"""Make environments of up to 10 GB; the first takes hours."""

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    """Run what was asked for; the exit code is 1 if a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names",
        nargs="*",
        help=f"any of {', '.join(NAMES)} (all of them if none is given), or {', '.join(ON_REQUEST)}",
    )
    names = parser.parse_args().names or NAMES
    if unknown := set(names) - {*NAMES, *ON_REQUEST}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join([*NAMES, *ON_REQUEST])}")
    silence_libraries()
    missed = 0
    RESULTS.mkdir(exist_ok=True)
    for name in names:
        module = importlib.import_module(f"benchmarks.{name}")
        rows = module.measure()
        (RESULTS / f"{name}.json").write_text(json.dumps(rows, indent=2) + "\n")
        title = (module.__doc__ or name).splitlines()[0]
        met = {True: "yes", False: "NO", None: ""}
        cells = [[row["what"], row["measured"], row["target"], met[row["met"]]] for row in rows]
        console.print_table(title, ["what", "measured", "target", "met"], cells)
        missed += sum(row["met"] is False for row in rows)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
