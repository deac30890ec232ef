"""The flow of `msquant upload`: a folder that keeps its contract, its model card, and a hub."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from msquant.calibration.sources import is_local
from msquant.checkpoint.file_names import STATE_FOLDER
from msquant.checkpoint.folder_files import listed_files
from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.results import MANIFEST_NAME
from msquant.errors import CheckpointError, ModelError, RecipeError, choices
from msquant.evaluation.ranking import rank_layers
from msquant.formats.base import Format
from msquant.formats.registry import DEFAULT_FORMAT, find_format, format_names
from msquant.formats.servers import SERVERS
from msquant.formats.summary import summarize
from msquant.hub.choose import make_hub
from msquant.hub.folder_upload import UploadResult, upload
from msquant.hub.names import is_hub_id
from msquant.hub.transfer_events import HubProgress
from msquant.schemes import W8A8, parse_scheme

HUBS = ("modelers", "huggingface")
CARD_NAME = "README.md"

# What people add to a folder for other people; no engine reads it.
_DOCUMENTS = (CARD_NAME, "LICENSE*", "NOTICE*", ".gitattributes")


@dataclass(frozen=True)
class Publication:
    """What would be uploaded.

    Attributes:
        files: contents by their names; the card is there as bytes where the folder has none.
        digests: the sha256 of files as the folder's manifest gives them.
        left_out: files that are in the folder and are no part of it, as its manifest or the record of its
            download does not list them.
    """

    files: Mapping[str, Path | bytes]
    digests: Mapping[str, str]
    left_out: Sequence[str]


def prepare(folder: Path, repository: str, license_name: str) -> Publication:
    """Look a folder over and collect what belongs into a repository.

    Args:
        folder: a checkpoint.
        repository: `organisation/name`.
        license_name: for the card, which is written where the folder has no README.md.

    Raises:
        ModelError: that is not the name of a repository.
        CheckpointError: `msquant inspect` would not accept the folder, or it holds links.
    """
    if not is_hub_id(repository):
        raise ModelError(
            f"{repository!r} is not the name of a repository",
            remedy="write it as organisation/name, for example MindSpore-Lab/DeepSeek-R1-W8A8",
        )
    findings = summarize(folder).findings
    if findings:
        raise CheckpointError(
            f"breaks its format: {findings[0].where}: {findings[0].problem}",
            where=folder,
            remedy=f"see all of it with: msquant inspect {folder}",
        )
    files: dict[str, Path | bytes] = {}
    left_out: list[str] = []
    listed = listed_files(folder)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.split("/")[0] in (STATE_FOLDER, ".git", ".cache"):
            continue
        if path.is_symlink():
            raise CheckpointError("is a link", where=path, remedy="put the file itself there")
        if not path.is_file():
            continue
        if listed is None or name in listed or any(fnmatchcase(name, pattern) for pattern in _DOCUMENTS):
            files[name] = path
        else:
            left_out.append(name)
    digests: dict[str, str] = {}
    if MANIFEST_NAME in files:
        manifest = read_json(folder / MANIFEST_NAME)
        digests = {name: entry["sha256"] for name, entry in manifest.get("files", {}).items()}
        if CARD_NAME not in files:
            files[CARD_NAME] = model_card(manifest, repository, license_name).encode()
    return Publication(files, digests, left_out)


def publish(
    folder: Path,
    repository: str,
    hub: str,
    *,
    create: bool = False,
    private: bool = False,
    license_name: str = "other",
    token_file: Path | None = None,
    progress: HubProgress | None = None,
) -> UploadResult:
    """Upload a folder that `msquant inspect` accepts.

    Args:
        folder: a checkpoint.
        repository: `organisation/name`.
        hub: `modelers` or `huggingface`.
        create: make the repository if it is not there.
        private: make it private then.
        license_name: for the generated card.
        token_file: holds the hub's token, in place of the environment's.
        progress: callbacks.

    Raises:
        MsquantError: as `prepare` and `upload`; or there is no such hub.
    """
    if hub not in HUBS:
        raise ModelError(f"there is no hub {hub!r}", where="--hub", remedy=choices(hub, tuple(HUBS)))
    progress = progress or HubProgress()
    progress.stage(f"inspecting {folder}")
    found = prepare(folder, repository, license_name)
    if found.left_out:
        progress.stage(f"left out, as it is no part of the result: {', '.join(found.left_out)}")
    client = make_hub(hub, token_file)
    return upload(
        client,
        repository,
        found.files,
        digests=found.digests,
        create=create,
        private=private,
        progress=progress,
    )


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
        _accuracy(manifest.get("layers", []), manifest.get("evaluation")),
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
    if source := calibration.get("source"):
        words = source if isinstance(source, list) else [source]
        shown = ["a text of the maker's" if is_local(str(word)) else word for word in words]
        kept["calibration"] = calibration | {"source": shown if isinstance(source, list) else shown[0]}
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


def _accuracy(layers: Any, evaluation: Any) -> str:
    rows = [layer for layer in layers if isinstance(layer, dict) and "error" in layer]
    if not rows:
        return ""
    errors = sorted(float(layer["error"]) for layer in rows)
    lines = [
        "## Error of each decoder layer\n",
        "Relative mean squared error of each decoder layer's output against the unquantized layer, on the "
        "calibration tokens.\n",
        "| decoder layers | smallest | median | largest |",
        "|---|---|---|---|",
        f"| {len(errors)} | {errors[0]:.2e} | {errors[len(errors) // 2]:.2e} | {errors[-1]:.2e} |\n",
    ]
    scored = evaluation.get("layers", []) if isinstance(evaluation, dict) else []
    snr = {layer["index"]: layer["own_snr"] for layer in scored if layer.get("own_snr") is not None}
    records = {layer["index"]: layer for layer in rows}
    ranked = [layer for layer in rank_layers(snr) if layer.key in records]
    if not ranked:
        return "\n".join(lines)
    lines += [
        "| layer | own signal-to-noise, dB | share of the noise | alpha of each smoothed group |",
        "|---|---|---|---|",
    ]
    for layer in ranked[:_SHOWN_LAYERS]:
        groups = ", ".join(
            f"{group['name']} {group['alpha']}" for group in records[layer.key].get("groups", [])
        )
        lines.append(f"| {layer.key} | {snr[layer.key]:.1f} | {layer.share:.1%} | {groups} |")
    if len(ranked) > _SHOWN_LAYERS:
        lines.append(
            f"\nThe {_SHOWN_LAYERS} layers that add most noise of their own; `msquant.json` has all of them."
        )
    return "\n".join(lines) + "\n"
