"""A folder read into a `Report`: its summary, its manifest, its integers and, if given, an analysis."""

import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, Field, ValidationError

from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.results import MANIFEST_NAME
from msquant.deploy.vllm_mindspore_server import PROGRAM, cluster_commands
from msquant.errors import CheckpointError, MsquantError
from msquant.evaluation.ranking import rank, rank_layers
from msquant.families import find_family
from msquant.flows.serving_checks import serving_settings
from msquant.formats.registry import find_format
from msquant.formats.summary import ModuleSummary, Summary, summarize
from msquant.inference import vllm_mindspore
from msquant.reporting.data import (
    Command,
    ExpertsRow,
    FrontierRow,
    FrontierRows,
    KindRow,
    Limits,
    RankedRow,
    Ranking,
    Reads,
    Report,
    Size,
)
from msquant.reporting.fix import fix
from msquant.reporting.histograms import SAMPLED_WEIGHTS, histograms
from msquant.reporting.manifest_data import (
    Count,
    Manifest,
    Name,
    Number,
    RecordedLimits,
    parse,
    printable,
    read_manifest,
)
from msquant.reporting.verdict import judge

_STEPS = 255
_EMBEDDING = "embed_tokens"
_HEAD = "lm_head"

SOURCE_HASH = "sha256 of the source's config, index and headers"
"""The fact that tells which model a folder was made from."""


Error = Annotated[float, Field(ge=0, lt=1e30)]


class _AnalyzedGroup(BaseModel):
    layer: Count
    group: Name
    linears: list[Name]
    scheme: Name
    error: Error
    dynamic_error: Number = None
    float_bytes: Count | None = None


class _Analysis(BaseModel):
    """What `msquant analyze --json` prints, as far as it is shown."""

    groups: list[_AnalyzedGroup]


class _FrontierPoint(BaseModel):
    bytes: Count
    kl: Error
    linears: dict[Name, Count]


class _FrontierUnit(BaseModel):
    linears: list[Name]


class _Frontier(BaseModel):
    """What `msquant analyze --frontier --json` prints, as far as it is shown."""

    points: Annotated[list[_FrontierPoint], Field(min_length=1)]
    units: list[_FrontierUnit]


def collect(
    folder: Path,
    *,
    sensitivity: Path | None = None,
    frontier: Path | None = None,
    check: bool = True,
    most_weights: int = SAMPLED_WEIGHTS,
    stage: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Find out all that a report says.

    Args:
        folder: a checkpoint in any format that `summarize` reads; without `msquant.json`, what only that
            holds is left out.
        sensitivity: what `msquant analyze --json` printed for the model; without it the layers are ranked by
            the short evaluation in the manifest.
        frontier: what `msquant analyze --frontier --json` printed for the model.
        check: read every quantized tensor to check the format's contract.
        most_weights: integer weights to read for the histograms; 0 for none.
        stage: called with a line that says what begins.
        progress: called with the bytes of weights that are read and those to read in all.

    Raises:
        CheckpointError: there is no such folder; it cannot be read; its manifest or an analysis is damaged,
            or an analysis is of another model.
    """
    stage(f"reading {folder}" + (" and checking its format" if check else ""))
    summary = summarize(folder, check=check)
    if not summary.modules:
        raise CheckpointError(
            f"cannot be read: {summary.findings[0]}" if summary.findings else "holds no tensors",
            where=folder,
            remedy="copy or download the whole folder again, or quantize again",
        )
    manifest = read_manifest(folder)
    config = read_json(folder / "config.json")
    ranking = _analyzed(sensitivity, summary) if sensitivity else _ranked(manifest)
    points = _frontier(frontier, summary) if frontier else None
    counted = []
    if most_weights:
        stage("counting the levels of integer weights")
        counted = histograms(folder, summary.modules, most=most_weights, progress=progress)
    return Report(
        name=printable(folder.resolve().name),
        architecture=summary.architecture and printable(summary.architecture),
        format=summary.quantization,
        consumer=summary.consumer,
        dtype=summary.dtype,
        checked=check,
        findings=tuple(printable(str(finding)) for finding in summary.findings),
        notes=tuple(summary.notes),
        verdict=judge(summary, manifest, checked=check),
        size=_size(summary, manifest),
        reads=_reads(summary, config),
        evaluation=manifest.evaluation,
        kinds=tuple(_kind(*group) for group in summary.kinds().items()),
        layers=tuple(manifest.layers),
        histograms=tuple(counted),
        experts=tuple(
            ExpertsRow(layer.index, tuple(layer.experts.tokens), len(layer.experts.few_tokens))
            for layer in manifest.layers
            if layer.experts is not None
        ),
        min_expert_tokens=_minimum(manifest),
        ranking=ranking,
        fix=None if ranking is None else fix(folder, summary, manifest, config, ranking),
        frontier=points,
        limits=_limits(manifest),
        date=_date(folder / MANIFEST_NAME),
        recipe=_yaml(manifest.recipe),
        facts=_facts(manifest),
        versions=manifest.versions,
        files=manifest.files,
        serving=tuple(commands(folder, summary)),
    )


def _limits(manifest: Manifest) -> Limits:
    try:
        found = RecordedLimits.model_validate(manifest.recipe.get("evaluation"))
    except ValidationError:
        return Limits()
    return Limits(found.max_kl, found.max_perplexity_increase)


def _date(path: Path) -> str | None:
    if not path.exists():
        return None
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).date().isoformat()


def _minimum(manifest: Manifest) -> int | None:
    policy = manifest.recipe.get("quantization")
    minimum = policy.get("min_expert_tokens") if isinstance(policy, dict) else None
    return minimum if isinstance(minimum, int) and 0 < minimum < 2**31 else None


def _size(summary: Summary, manifest: Manifest) -> Size:
    shards = manifest.source.shards
    return Size(
        tensors=summary.nbytes,
        source=sum(shards.values()) if shards else None,
        half=2 * summary.parameters,
        parameters=summary.parameters,
        quantized=summary.quantized_by_bits,
    )


def _elements(module: ModuleSummary) -> int:
    return math.prod(module.shape)


def _reads(summary: Summary, config: dict[str, Any]) -> Reads | None:
    """Of a mixture of experts, None if config.json does not say how many of how many work on a token."""
    working = 1.0
    if any("experts.*" in module.kind for module in summary.modules):
        family = find_family(config.get("model_type"))
        count = config.get(family.expert_count) if family and family.expert_count else None
        each = config.get("num_experts_per_tok")
        if not isinstance(count, int) or not isinstance(each, int) or count < 1:
            return None
        working = each / count
    layers = config.get("num_hidden_layers")
    tied = not any(module.kind == _HEAD for module in summary.modules)
    stored = half = 0.0
    for module in summary.modules:
        part = working if "experts.*" in module.kind else 1.0
        if module.kind.endswith(_EMBEDDING) and not tied:
            part = 1 / max(1, module.shape[0])
        elif module.layer is not None and isinstance(layers, int) and module.layer >= layers:
            # Prediction of further tokens, which decoding does without.
            part = 0.0
        stored += part * module.nbytes
        half += part * 2 * _elements(module)
    return Reads(round(stored), round(half))


def _kind(key: tuple[str, str, str, tuple[int, ...]], modules: list[ModuleSummary]) -> KindRow:
    kind, scheme, dtype, shape = key
    scales = [scale for module in modules for scale in module.input_scale or ()]
    return KindRow(
        kind=printable(kind),
        modules=len(modules),
        scheme=printable(scheme),
        dtype=dtype,
        shape=shape,
        nbytes=sum(module.nbytes for module in modules),
        static_range=(_STEPS * min(scales), _STEPS * max(scales)) if scales else None,
    )


def _ranked(manifest: Manifest) -> Ranking | None:
    snr = manifest.evaluation.own_snr if manifest.evaluation else {}
    rows = [
        RankedRow(f"layer {row.key}", (f"model.layers.{row.key}.*",), snr[row.key], row.noise, row.share)
        for row in rank_layers(snr)
    ]
    return Ranking(MANIFEST_NAME, tuple(rows)) if rows else None


def _analyzed(path: Path, summary: Summary) -> Ranking:
    remedy = "give what this prints for the model: msquant analyze MODEL --json > FILE"
    groups = parse(_Analysis, read_json(path), path, remedy).groups
    if not groups:
        raise CheckpointError("names no groups", where=path, remedy=remedy)
    _require_there([linear for group in groups for linear in group.linears], summary, path, remedy)
    rows = [
        RankedRow(
            name=f"layer {group.layer} {group.group}",
            patterns=tuple(group.linears),
            snr=-10 * math.log10(row.noise) if row.noise else None,
            noise=row.noise,
            share=row.share,
            scheme=group.scheme,
            float_bytes=group.float_bytes,
            dynamic_error=group.dynamic_error,
        )
        for row in rank({place: group.error for place, group in enumerate(groups)})
        for group in [groups[row.key]]
    ]
    return Ranking(printable(path.name), tuple(rows))


def _frontier(path: Path, summary: Summary) -> FrontierRows:
    remedy = "give what this prints for the model: msquant analyze MODEL --frontier --json > FILE"
    found = parse(_Frontier, read_json(path), path, remedy)
    _require_there([linear for unit in found.units for linear in unit.linears], summary, path, remedy)
    rows = sorted((FrontierRow(point.bytes, point.kl, point.linears) for point in found.points), key=_bytes)
    return FrontierRows(printable(path.name), tuple(rows))


def _bytes(row: FrontierRow) -> int:
    return row.nbytes


def _require_there(linears: Sequence[str], summary: Summary, path: Path, remedy: str) -> None:
    """Raise CheckpointError for an analysis of linears that the folder does not have."""
    known = {module.name for module in summary.modules}
    if missing := [linear for linear in linears if linear not in known]:
        raise CheckpointError(
            f"is of another model: there is no {missing[0]} in {summary.folder}", where=path, remedy=remedy
        )


def _facts(manifest: Manifest) -> dict[str, str]:
    shape, policy = manifest.calibration.shape, manifest.recipe.get("quantization")
    facts = {
        "model": manifest.recipe.get("model"),
        "algorithm": policy.get("algorithm") if isinstance(policy, dict) else None,
        "device": manifest.device,
        "calibration tokens": " x ".join(map(str, shape)) if shape else None,
        "sha256 of the calibration tokens": manifest.calibration.sha256,
        "source shards": len(manifest.source.shards) or None,
        SOURCE_HASH: manifest.source.sha256,
    }
    if (promise := manifest.promise) is not None:
        bounds = [] if promise.max_kl is None else [f"KL <= {promise.max_kl:g}"]
        if promise.max_perplexity_increase is not None:
            bounds.append(f"perplexity +{promise.max_perplexity_increase:.2%}")
        bounds += [] if promise.max_bytes is None else [f"{promise.max_bytes:.0f} bytes"]
        facts |= {
            "promise": f"{', '.join(bounds)}: {'kept' if promise.kept else 'not kept'}",
            "KL on the verdict texts": promise.of("verdict"),
            "KL on the texts that schemes were chosen by": promise.of("choice"),
        }
    return {name: printable(str(value)) for name, value in facts.items() if value is not None}


def _yaml(recipe: dict[str, Any]) -> str:
    if not recipe:
        return ""
    return printable(
        yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)
    )


_HOST, _PORT = "0.0.0.0", 8000
_HEAD_ADDRESS = "ADDRESS-OF-NODE-0"


def commands(folder: Path, summary: Summary) -> list[Command]:
    """What to run, on an NPU and without one.

    A folder's own serving section counts; one that is not valid is left out, as `msquant run` reports it.

    Args:
        folder: as it is to be called in the commands.
        summary: of it.
    """
    name = shlex.quote(str(folder))
    form = None if summary.quantization is None else find_format(summary.quantization)
    if form is None or form.server == vllm_mindspore.NAME:
        found = _vllm_mindspore(folder)
    else:
        found = [Command(f"Serve it with {form.engine}", (form.serve_command(name),))]
    found.append(Command("Serve it here, without an NPU", (f"msquant serve --model {name}",)))
    prompt = f"msquant run --model {name} --prompt 'I am'"
    found.append(Command("Continue a prompt here", (prompt,)))
    return [Command(command.what, tuple(map(printable, command.lines))) for command in found]


def _vllm_mindspore(folder: Path) -> list[Command]:
    try:
        settings = serving_settings(folder)
        if settings.nodes > 1 and settings.head_address is None:
            settings = settings.changed({"head_address": _HEAD_ADDRESS})
        launches = cluster_commands(folder, settings, _HOST, _PORT, environment={})
    except MsquantError:
        return []
    lines: list[str] = []
    for launch in launches:
        # The program as it is called elsewhere, not where it lies on this machine.
        program, *arguments = launch.argv
        name = PROGRAM if Path(program).name == PROGRAM else program
        lines += replace(launch, argv=(name, *arguments)).shell().splitlines()
    return [Command("Serve it with vLLM-MindSpore", tuple(lines))]
