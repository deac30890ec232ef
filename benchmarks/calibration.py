"""SmolLM2-135M by what it is calibrated on: KL to the float model on texts that no choice has seen.

The same algorithm with other calibration text, 16 samples of 128 tokens: `osl` in W8A8 static, and `gptq` in
W4A16 with groups of 64 and zero points. The greatest KL over the domains counts. Two sets of texts, which
share nothing with each other or with calibration: by the builtin evaluation texts the shares of the builtin
mix were chosen; the verdict is on the others, which were looked at once, at the end. The default's target is
the least worst KL of the verdict among the choices of its scheme.

`MSQUANT_SCHEMES=W4A16_G64_ASYM` measures in one scheme alone.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import row
from benchmarks.smollm2 import SAMPLES, SEQUENCE_LENGTH, float_folder
from benchmarks.texts import verdict_files

SEQUENCES = 2
"""Of 512 tokens, of each of the domains."""

DEFAULT = "builtin (default)"
CHOICES: dict[str, dict[str, Any]] = {
    DEFAULT: {"source": "builtin"},
    "builtin, dialogue as plain text": {"source": "builtin", "chat_template": False},
    "one domain: documentation": {"source": "builtin:documentation"},
    "one domain: fiction": {"source": "builtin:fiction"},
    "chat form alone: dialogue": {"source": "builtin:dialogue"},
    "mix: builtin and a quarter of its own words": {"source": ["builtin", "self=4"]},
    "its own words": {"source": "self"},
}
FEW = (
    DEFAULT,
    "one domain: documentation",
    "mix: builtin and a quarter of its own words",
    "its own words",
)
SCHEMES: dict[str, tuple[dict[str, str], Sequence[str]]] = {
    "W8A8": ({}, tuple(CHOICES)),
    "W4A16_G64_ASYM": (
        {"algo": "gptq", "scheme": "W4A16_G64_ASYM", "formats": "compressed-tensors"},
        FEW,
    ),
}
"""What is done to the default recipe for a scheme, and which of the choices are measured."""


def measure() -> list[dict[str, Any]]:
    """One quantization a choice, and one comparison of all, in each scheme."""
    wanted = os.environ.get("MSQUANT_SCHEMES", ",".join(SCHEMES)).split(",")
    return [row for scheme in wanted for row in _measure(scheme, *SCHEMES[scheme])]


def _measure(scheme: str, adjusted: dict[str, str], names: Sequence[str]) -> list[dict[str, Any]]:
    from msquant.calibration.evaluation import evaluation_domains
    from msquant.flows.comparison import compare
    from msquant.flows.pipeline import quantize
    from msquant.recipe.recipe import CalibrationSettings, find_recipe

    folder = float_folder()
    recipe = find_recipe(str(folder)).adjusted(**adjusted).replace("evaluation", sequences=0)
    with tempfile.TemporaryDirectory(prefix="msquant-") as scratch:
        made = []
        for number, name in enumerate(names):
            settings = CalibrationSettings(samples=SAMPLES, sequence_length=SEQUENCE_LENGTH, **CHOICES[name])
            chosen = recipe.model_copy(update={"calibration": settings})
            print(f"quantizing to {scheme} with {name}", flush=True)
            made.append(str(quantize(chosen, Path(scratch) / str(number), remember=False).folder))
        texts = verdict_files(Path(scratch))
        print("comparing", flush=True)
        result = compare(made, baseline=str(folder), texts=[str(path) for path in texts], sequences=SEQUENCES)
    choosing = [domain.name for domain in evaluation_domains()]
    scores = [{text.text: text.kl for text in model.score.texts} for model in result.models]
    return _rows(scheme, dict(zip(names, scores, strict=True)), choosing)


def _rows(
    scheme: str, scores: Mapping[str, Mapping[str, float]], choosing: list[str]
) -> list[dict[str, Any]]:
    """A line for each choice, by its KL on every text; the default's has a target."""
    verdicts = {
        name: max(kl for text, kl in its.items() if text not in choosing) for name, its in scores.items()
    }
    rows = []
    for name, its in scores.items():
        described = f"{scheme}, {name}", _described(its, choosing)
        if name == DEFAULT:
            met = bool(verdicts[name] <= min(verdicts.values()))
            rows.append(row(*described, "the least worst verdict KL of its scheme", met))
        else:
            rows.append(row(*described))
    return rows


def _described(scores: Mapping[str, float], choosing: list[str]) -> str:
    parts = []
    for title, names in (
        ("choice", choosing),
        ("verdict", [each for each in scores if each not in choosing]),
    ):
        worst = max(names, key=lambda each: scores[each])
        listed = ", ".join(f"{each.removesuffix('.txt')} {scores[each]:.4f}" for each in names)
        parts.append(f"{title}: worst {scores[worst]:.4f} ({listed})")
    return "; ".join(parts)
