"""SmolLM2-135M by what it is calibrated on: KL to the float model on texts that no choice has seen.

The same algorithm (`osl`, W8A8 static, 16 samples of 128 tokens) with other calibration text. The greatest KL
over the domains counts. Two sets of texts, which share nothing with each other or with calibration: by the
builtin evaluation texts the shares of the builtin mix were chosen; the verdict is on the others, which were
looked at once, at the end.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.rows import row
from benchmarks.smollm2 import float_folder
from benchmarks.texts import verdict_files

SEQUENCES = 2
"""Of 512 tokens, of each of the domains."""

CHOICES: dict[str, dict[str, Any]] = {
    "builtin (default)": {"source": "builtin"},
    "builtin, dialogue as plain text": {"source": "builtin", "chat_template": False},
    "one domain: documentation": {"source": "builtin:documentation"},
    "one domain: fiction": {"source": "builtin:fiction"},
    "chat form alone: dialogue": {"source": "builtin:dialogue"},
    "mix: builtin and a quarter of its own words": {"source": ["builtin", "self=4"]},
    "its own words": {"source": "self"},
}


def measure() -> list[dict[str, Any]]:
    """One quantization a choice, and one comparison of all."""
    from msquant.calibration.evaluation import evaluation_domains
    from msquant.flows.comparison import compare
    from msquant.flows.pipeline import quantize
    from msquant.recipe.recipe import CalibrationSettings, default_recipe

    folder = float_folder()
    config = json.loads((folder / "config.json").read_text())
    recipe = default_recipe(str(folder), config).replace("evaluation", sequences=0)
    with tempfile.TemporaryDirectory(prefix="msquant-") as scratch:
        made = []
        for number, (name, settings) in enumerate(CHOICES.items()):
            chosen = recipe.model_copy(update={"calibration": CalibrationSettings(**settings)})
            print(f"quantizing with {name}", flush=True)
            made.append(str(quantize(chosen, Path(scratch) / str(number), remember=False).folder))
        texts = verdict_files(Path(scratch))
        print("comparing", flush=True)
        result = compare(made, baseline=str(folder), texts=[str(path) for path in texts], sequences=SEQUENCES)
    choosing = [domain.name for domain in evaluation_domains()]
    return [_row(name, model, choosing) for name, model in zip(CHOICES, result.models, strict=True)]


def _row(name: str, model: Any, choosing: list[str]) -> dict[str, Any]:
    scores = {text.text: text.kl for text in model.score.texts}
    parts = []
    for title, names in (
        ("choice", choosing),
        ("verdict", [each for each in scores if each not in choosing]),
    ):
        worst = max(names, key=lambda each: scores[each])
        listed = ", ".join(f"{each.removesuffix('.txt')} {scores[each]:.4f}" for each in names)
        parts.append(f"{title}: worst {scores[worst]:.4f} ({listed})")
    return row(name, "; ".join(parts))
