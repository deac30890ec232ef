"""SHA-256 of every safetensors file that tiny models become, by each algorithm, in each format.

`python -m benchmarks.checksums --output TABLE.json` writes the table, and `--compare TABLE.json` says what
differs from an earlier one: a change that is meant to keep every byte is measured before and after. The last
digits of a matrix product are the processor's own, so both tables have to come from one kind of machine.
Where the sources differ, too, the versions of torch or transformers that wrote them do.

Nothing but the command line of msquant is called, in this process, and what a change may rename stands in
the tables below: this file may be laid over an earlier commit and run there.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from msquant.models.device import silence_libraries

ALGORITHMS = {
    "rtn": "rtn",
    "smoothquant": "smoothquant",
    "osl-golden-stick": "osl",
    "osl": "osl-robust",
}
"""The algorithms' names now, and before `osl` became the name of the search on held-out tokens."""
RENAMED = "osl-golden-stick"
"""The name that `msquant quantize --help` shows from then on."""

FORMATS = {
    "golden-stick": "golden-stick",
    "compressed-tensors": "compressed-tensors",
    "ascend": "ascend",
}
"""The formats' names now, and before."""

SCHEMES = {"FLOAT": "skip", "W8A16": "weight_only", "W8A8_DYNAMIC": "dynamic"}
"""The words of a recipe, and the lists of patterns that they were before; the rest is W8A8."""


@dataclass(frozen=True)
class Plan:
    """One way to quantize a model.

    Attributes:
        schemes: of linears, by the first of these patterns in their name; the rest is W8A8.
        formats: those that can express it; the first is written layer by layer, the others from it.
        options: further entries of the recipe's `quantization`.
    """

    schemes: Mapping[str, str]
    formats: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


_DENSE = {"lm_head": "FLOAT"}
_LATENT = _DENSE | {"kv_b_proj": "FLOAT"}
_ALL = tuple(FORMATS)
# No version of vLLM-MindSpore serves a quantized Qwen3-MoE or DeepSeek-V2, nor DeepSeek-V3 with its attention
# per token below TP16.
_OTHERS = ("compressed-tensors", "ascend")


def _expert_plans(kept: Mapping[str, str], formats: tuple[str, ...] = _OTHERS) -> tuple[Plan, ...]:
    return (
        Plan({**kept, "mlp.": "W8A8_DYNAMIC"}, formats),
        Plan({**kept, "proj": "W8A8_DYNAMIC"}, _OTHERS[::-1], {"feed_forward_alpha": 0.5}),
    )


_NATIVE_PLANS = (
    Plan(_DENSE, _ALL),
    Plan(_DENSE | {"proj": "W8A8_DYNAMIC"}, _OTHERS),
    Plan(_DENSE | {"mlp.": "W8A16"}, ("ascend",)),
)

MODELS: Mapping[str, tuple[tuple[Plan, ...], Mapping[str, Any]]] = {
    "llama": (_NATIVE_PLANS, {}),
    "qwen2": (_NATIVE_PLANS, {"dtype": "bfloat16", "tie_word_embeddings": True}),
    "qwen3": (_NATIVE_PLANS, {"dtype": "float16", "max_shard_size": "100KB"}),
    "qwen3_moe": (_expert_plans(_DENSE), {"dtype": "bfloat16"}),
    "deepseek_v2": (_expert_plans(_LATENT), {"dtype": "bfloat16"}),
    "deepseek_v3": (_expert_plans(_LATENT, _ALL), {"dtype": "bfloat16", "prediction_layers": 1}),
}
"""What is done with each tiny model, and how it is written; DeepSeek-V3 is turned into FP8."""
FP8_BLOCK = (48, 40)
FP8 = "deepseek_v3"

SAMPLES, SEQUENCE_LENGTH = 4, 32


def measure(models: list[str]) -> dict[str, str]:
    """The checksums by `model/algorithm/number of the plan/format/file`, and by `model/source/file`.

    Args:
        models: which of `MODELS`.
    """
    sums: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="msquant-checksums-") as name:
        folder = Path(name)
        # `msquant run` takes the newest result that the user has made, which none of these is.
        os.environ["MSQUANT_CACHE"] = str(folder / "cache")
        calibration = folder / "calibration.txt"
        calibration.write_text(_text())
        for model in models:
            source = _write_model(folder / model, model)
            sums |= _checksums(source, f"{model}/source")
            for number, plan in enumerate(MODELS[model][0]):
                for algorithm in ALGORITHMS:
                    started = time.monotonic()
                    recipe = _recipe(source, calibration, plan, algorithm)
                    for form, made in _quantize(recipe, plan.formats, folder / "out").items():
                        sums |= _checksums(made, f"{model}/{algorithm}/{number}/{form}")
                    what = f"{model} {algorithm} {number}: {', '.join(plan.formats)}"
                    print(f"{what} in {time.monotonic() - started:.1f} s", file=sys.stderr)
    return sums


def _recipe(source: Path, calibration: Path, plan: Plan, algorithm: str) -> dict[str, Any]:
    name = algorithm if _renamed() else ALGORITHMS[algorithm]
    # Rounding to nearest smooths nothing, and has no options.
    options = plan.options if algorithm != "rtn" else {}
    quantization: dict[str, Any] = {"algorithm": name, **options}
    if importlib.util.find_spec("msquant.schemes"):
        rules = {**plan.schemes, "*": "W8A8"}
        quantization["schemes"] = [{pattern: word} for pattern, word in rules.items()]
    else:
        for scheme, key in SCHEMES.items():
            quantization[key] = [pattern for pattern, word in plan.schemes.items() if word == scheme]
    settings = {"source": str(calibration), "samples": SAMPLES, "sequence_length": SEQUENCE_LENGTH}
    return {"model": str(source), "quantization": quantization, "calibration": settings}


def _quantize(recipe: Mapping[str, Any], formats: tuple[str, ...], output: Path) -> dict[str, Path]:
    """The folder of each format; those of the run before are gone."""
    path = output.with_suffix(".yaml")
    # JSON is YAML.
    path.write_text(json.dumps(recipe))
    names = {name if _renamed() else FORMATS[name]: name for name in formats}
    for old in output.parent.glob(f"{output.name}*/"):
        shutil.rmtree(old)
    arguments = ("--format", ",".join(names), "--output", output, "--no-evaluate", "--json")
    result = json.loads(_msquant("quantize", path, *arguments))
    return {names[name]: Path(folder) for name, folder in result["folders"].items()}


@cache
def _renamed() -> bool:
    return RENAMED in _msquant("quantize", "--help")


def _write_model(folder: Path, model: str) -> Path:
    from tests.fixtures.fp8 import to_fp8
    from tests.fixtures.tiny_families import write_tiny

    written = write_tiny(folder, model, **MODELS[model][1])
    return to_fp8(written, folder.with_name(f"{folder.name}-fp8"), FP8_BLOCK) if model == FP8 else written


def _text() -> str:
    """The same 600 sentences every time."""
    generator = random.Random(0)
    words = [
        "the",
        "module",
        "imports",
        "names",
        "from",
        "other",
        "files",
        "and",
        "each",
        "is",
        "run",
        "once",
    ]
    return "\n".join(" ".join(generator.choices(words, k=16)) + "." for _ in range(600))


def _checksums(folder: Path, name: str) -> dict[str, str]:
    return {
        f"{name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*.safetensors"))
    }


def _msquant(*arguments: object) -> str:
    """What `msquant ...` prints, run in this process: importing MindSpore takes longer than a tiny model."""
    from msquant.cli.app import app

    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()):
        app([str(argument) for argument in arguments], standalone_mode=False)
    return output.getvalue()


def main() -> int:
    """Write or compare the table; the exit code is 1 if files differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checksums", description=__doc__)
    parser.add_argument("models", nargs="*", help=f"any of {', '.join(MODELS)}; all of them if none is given")
    parser.add_argument("--output", type=Path, help="the table to write")
    parser.add_argument("--compare", type=Path, help="an earlier table, to say what differs from it")
    options = parser.parse_args()
    if unknown := set(options.models) - set(MODELS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(MODELS)}")
    silence_libraries()
    found = measure(options.models or list(MODELS))
    print(f"{len(found)} files")
    if options.output:
        options.output.write_text(json.dumps(found, indent=0) + "\n")
    if options.compare is None:
        return 0
    known = json.loads(options.compare.read_text())
    expected = {name: known[name] for name in known if name.split("/")[0] in (options.models or MODELS)}
    differing = differences(expected, found)
    print("\n".join(differing) or "all as before")
    return 1 if differing else 0


def differences(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """What differs between two tables, a line for each file."""
    names = sorted({*expected, *found})
    words = {name: _difference(expected.get(name), found.get(name)) for name in names}
    return [f"{name}: {word}" for name, word in words.items() if word]


def _difference(expected: str | None, found: str | None) -> str | None:
    if expected == found:
        return None
    return "is new" if expected is None else "is gone" if found is None else "has other bytes"


if __name__ == "__main__":
    sys.exit(main())
