"""The README.md of a quantized model on a hub: what it was made from, how well, and how to serve it."""

from collections.abc import Mapping
from typing import Any

import yaml

from msquant.errors import RecipeError
from msquant.formats.base import Format
from msquant.formats.registry import DEFAULT_FORMAT, find_format, format_names
from msquant.formats.servers import SERVERS
from msquant.schemes import W8A8, parse_scheme

_SHOWN_LAYERS = 8
_BUNDLED = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}


def model_card(manifest: Mapping[str, Any], repository: str, license_name: str) -> str:
    """A model card from `msquant.json`.

    Args:
        manifest: what that file holds.
        repository: `organisation/name` that the card is for.
        license_name: as hubs write it, for example `mit`; that of the base model.

    Returns:
        Markdown with the front matter that the hubs read.
    """
    recipe = manifest.get("recipe", {})
    model = str(recipe.get("model", ""))
    base = _BUNDLED.get(model, model)
    # A path of the machine it was made on is nobody's business.
    parts_of = base.split("/")
    base = base if len(parts_of) == 2 and all(parts_of) and not base.startswith((".", "~")) else ""
    front: dict[str, Any] = {"license": license_name, "library_name": "mindspore"}
    if base:
        front |= {"base_model": base, "base_model_relation": "quantized"}
    name = str(manifest.get("format") or DEFAULT_FORMAT)
    form = find_format(name if name in format_names() else DEFAULT_FORMAT)
    word, what = _quantized(recipe)
    front["tags"] = ["msquant", word.lower().replace("_", "-"), name, form.engine.lower()]
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {repository.split('/')[-1]}\n",
        f"{word} ({what}){f' of {base}' if base else ''}, made by msquant "
        f"{manifest.get('msquant', '')} through MindSpore Golden Stick, for {form.engine}.\n",
        _serving(repository, str(manifest.get("variant", "")), form),
        _recipe(recipe),
        _measured(manifest.get("evaluation"), word),
        _accuracy(manifest.get("layers", [])),
    ]
    return "\n".join(part for part in parts if part)


def _serving(repository: str, variant: str, form: type[Format]) -> str:
    name = repository.split("/")[-1]
    backends = (server.backend for server in SERVERS if server.name == form.server)
    backend = next((backend for backend in backends if variant and backend.lower() == variant), None)
    export = f"    export VLLM_MS_MODEL_BACKEND={backend}\n" if backend else ""
    return (
        "## Serve it\n\n"
        f"    msquant download {repository}\n"
        f"{export}"
        f"    {form.serve_command(name)}\n\n"
        "Or continue a prompt without an NPU:\n\n"
        f'    msquant run --model {name} --prompt "I am"\n'
    )


def _recipe(recipe: Mapping[str, Any]) -> str:
    if not recipe:
        return ""
    kept = {key: recipe[key] for key in ("quantization", "calibration", "format") if key in recipe}
    # Where the text lay is a path of the machine it was made on.
    calibration = dict(kept.get("calibration", {}))
    if calibration and calibration.get("source") != "builtin":
        kept["calibration"] = calibration | {"source": "a text of the maker's"}
    text = yaml.safe_dump(kept, sort_keys=False, default_flow_style=None)
    return f"## Recipe\n\n```yaml\n{text}```\n\nAll of it, with versions and hashes, is in `msquant.json`.\n"


def _quantized(recipe: Mapping[str, Any]) -> tuple[str, str]:
    """How most linears are computed, by the recipe's last rule: its word, and what that means."""
    try:
        rules = recipe["quantization"]["schemes"]
        schemes = [parse_scheme(str(word)) for rule in reversed(rules) for word in rule.values()]
    except (KeyError, TypeError, AttributeError, RecipeError):
        # A manifest of an older version, or of another hand.
        schemes = []
    scheme = next((scheme for scheme in schemes if not scheme.is_float), W8A8)
    assert scheme.weights is not None
    weights = f"int{scheme.weights.bits}"
    if scheme.inputs is None:
        size = scheme.weights.group_size
        return str(scheme), f"weights in {weights}" + (f", groups of {size}" if size else "")
    inputs = f"int{scheme.inputs.bits}"
    # The scale of the activations is a detail of W8A8 for whoever reads the card.
    word = str(scheme).replace("_DYNAMIC", "")
    if inputs == weights:
        return word, f"weights and activations in {weights}"
    return word, f"weights in {weights}, activations in {inputs}"


def _measured(evaluation: Any, word: str) -> str:
    """The table of perplexity and divergence, if the result was evaluated against the float model."""
    scores = evaluation if isinstance(evaluation, dict) else {}
    rows = [*scores.get("texts", []), scores.get("overall")]
    rows = [row for row in rows if isinstance(row, dict) and row.get("kl") is not None]
    if not rows:
        return ""
    lines = [
        "## Compared with the float model\n",
        "On held-out text: perplexity, KL divergence of the next-token distributions in nats, and after how "
        "many tokens both find the same next one most likely.\n",
        f"| text | tokens | float | {word} | KL | same token |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        perplexities = f"{row['baseline_perplexity']:.3f} | {row['perplexity']:.3f}"
        agreement = f"{row['kl']:.4f} | {row['top1']:.1%}"
        lines.append(f"| {row['text']} | {row['tokens']} | {perplexities} | {agreement} |")
    return "\n".join(lines) + "\n"


def _accuracy(layers: Any) -> str:
    rows = [layer for layer in layers if isinstance(layer, dict) and "error" in layer]
    if not rows:
        return ""
    errors = sorted(float(layer["error"]) for layer in rows)
    worst = sorted(rows, key=lambda layer: -float(layer["error"]))[:_SHOWN_LAYERS]
    lines = [
        "## Error of each decoder layer\n",
        "Relative mean squared error of each decoder layer's output against the unquantized layer, on the "
        "calibration tokens.\n",
        "| decoder layers | smallest | median | largest |",
        "|---|---|---|---|",
        f"| {len(errors)} | {errors[0]:.2e} | {errors[len(errors) // 2]:.2e} | {errors[-1]:.2e} |\n",
        "| layer | error | alpha of each smoothed group |",
        "|---|---|---|",
    ]
    for layer in worst:
        groups = ", ".join(f"{group['name']} {group['alpha']}" for group in layer.get("groups", []))
        lines.append(f"| {layer['index']} | {float(layer['error']):.2e} | {groups} |")
    if len(rows) > len(worst):
        lines.append(f"\nThe {len(worst)} layers with the largest errors; `msquant.json` has all of them.")
    return "\n".join(lines) + "\n"
