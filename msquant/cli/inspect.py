"""`msquant inspect`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msquant.cli import console, options, scores
from msquant.errors import CheckpointError, EngineError, choices
from msquant.schemes import parse_scheme

if TYPE_CHECKING:
    from msquant.formats.summary import LayerSummary, ModuleSummary, Summary
    from msquant.formats.verdicts import Verdict

SHOWN_FINDINGS = 20


def inspect(
    folder: Annotated[
        Path,
        typer.Argument(
            help="A checkpoint folder, quantized or not.",
            show_default=False,
            autocompletion=options.complete_folders,
        ),
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document with every module.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Also compare every file's sha256 with msquant.json.")
    ] = False,
    server: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="vllm-mindspore, vllm-ascend or vllm: exit with 1 if no version of it serves the folder.",
            autocompletion=options.complete_servers,
        ),
    ] = None,
    tensor_parallel: Annotated[
        int | None,
        typer.Option(
            min=1, help="NPUs that share each matrix, for --for.  [default: of its serving section]"
        ),
    ] = None,
) -> None:
    """Show what a checkpoint holds, check it, and say which servers can serve a quantized one.

    Reads every quantized tensor and applies the rules of its format, of msquant or of another tool:
    msModelSlim, llm-compressor, GPTQModel, AutoAWQ or AutoRound. A folder that breaks one exits with 1 and
    names the tensor. A model in floating point is only listed.

    Example: msquant inspect smollm2-135m-osl --verify

    Example: msquant inspect DeepSeek-R1-W8A8 --for vllm-mindspore --tensor-parallel 16
    """
    from msquant.formats.servers import SERVER_NAMES

    named = next((name for name in SERVER_NAMES if name == server), None)
    if server is not None and named is None:
        raise typer.BadParameter(
            f"{server!r} is no server: {choices(server, SERVER_NAMES)}", param_hint="--for"
        )
    from msquant import api
    from msquant.flows.serving_checks import require_server

    summary = api.inspect(folder, verify=verify)
    evaluation = _evaluation(folder)
    if as_json:
        console.print_json(_as_document(summary) | {"evaluation": evaluation})
    else:
        _render(summary, verify, evaluation)
    if summary.findings:
        if not as_json:
            count = len(summary.findings)
            console.print_error(
                CheckpointError(
                    f"breaks the {summary.quantization} format in {count} place{'s' if count > 1 else ''}",
                    where=folder,
                    remedy="quantize the model again, or copy the folder again",
                )
            )
        raise typer.Exit(1)
    if named is not None:
        try:
            require_server(folder, named, tensor_parallel)
        except EngineError:
            if as_json:
                # The document says it.
                raise typer.Exit(1) from None
            raise


def _as_document(summary: "Summary") -> dict[str, Any]:
    totals = {
        "nbytes": summary.nbytes,
        "parameters": summary.parameters,
        "quantized_parameters": summary.quantized_parameters,
        "experts": summary.experts,
        "schemes": {
            scheme: {"modules": modules, "parameters": parameters}
            for scheme, (modules, parameters) in summary.schemes().items()
        },
    }
    served = [{"served": one.served, **asdict(one)} for one in summary.served]
    return {"valid": not summary.findings, "totals": totals, **asdict(summary), "served": served}


def _evaluation(folder: Path) -> dict[str, Any] | None:
    """What `quantize` measured, if the manifest has it whole; a damaged manifest is among the findings."""
    from msquant.reporting.manifest_data import read_manifest

    try:
        found = read_manifest(folder).evaluation
    except CheckpointError:
        return None
    if found is None or found.overall is None or found.overall.kl is None:
        return None
    return found.model_dump()


def _render(summary: "Summary", verified: bool, evaluation: dict[str, Any] | None) -> None:
    if summary.modules:
        columns = ["module", "count", "scheme", "dtype", "shape", "MB"]
        kinds = [(kind, modules) for (kind, *_), modules in summary.kinds().items()]
        rows = [_row(kind, modules) for kind, modules in kinds]
        console.print_table(_title(summary), columns, rows, caption=_caption(summary))
        if summary.quantization:
            _render_schemes(summary)
        if scales := [_scale_row(kind, modules) for kind, modules in kinds if modules[0].weight_scale]:
            console.print_table("Scales", ["module", "weights", "activations", "zero point"], scales)
        if caches := [_cache_row(kind, modules) for kind, modules in kinds if modules[0].cache_scale]:
            console.print_table("Key-value cache", ["module", "integers", "layers", "scales"], caches)
    if summary.layers:
        _render_layers(summary.layers)
    if evaluation is not None:
        scores.print_scores("Compared with the float model when it was made", evaluation)
    for finding in summary.findings[:SHOWN_FINDINGS]:
        console.print_line(f"{finding.where}: {finding.problem}")
    for note in summary.notes:
        console.print_line(f"Note: {note}.")
    if summary.served:
        columns = ["server", "TP", "served", "because"]
        console.print_table("Who can serve it", columns, [_served_row(one) for one in summary.served])
        reasons = [reason for one in summary.served for reason in one.refusals]
        for where, remedy in dict.fromkeys((reason.where, reason.remedy) for reason in reasons):
            console.print_line(f"{where}: {remedy}")
    if (more := len(summary.findings) - SHOWN_FINDINGS) > 0:
        console.print_line(f"and {more} more: see them with --json")
    if summary.quantization and not summary.findings:
        hashes = ", all file hashes match" if verified and summary.has_manifest else ""
        console.print_line(
            f"Valid: it keeps every rule of {summary.quantization!r} for {summary.consumer}{hashes}."
        )


def _served_row(verdict: "Verdict") -> list[Any]:
    sizes = ", ".join(map(str, verdict.tensor_parallel))
    reasons = "; ".join(f"{reason.where}: {reason.problem}" for reason in verdict.refusals)
    return [str(verdict.server), sizes, "yes" if verdict.served else "no", reasons]


def _title(summary: "Summary") -> str:
    state = summary.quantization or "not quantized"
    return f"{summary.folder}: {summary.architecture or 'unknown architecture'}, {summary.dtype}, {state}"


def _caption(summary: "Summary") -> str:
    size = f"{console.as_bytes(summary.nbytes)}, {summary.parameters / 1e6:,.1f} M parameters"
    if not summary.quantization:
        return size
    integers = " and ".join(f"int{bits}" for bits in summary.weight_bits) or "integers"
    return f"{size}, {summary.quantized_parameters / max(1, summary.parameters):.1%} of them in {integers}"


def _row(kind: str, modules: "list[ModuleSummary]") -> list[Any]:
    first = modules[0]
    shape = " x ".join(map(str, first.shape)) or "scalar"
    megabytes = sum(module.nbytes for module in modules) / 1e6
    return [kind, len(modules), first.scheme, first.dtype, shape, round(megabytes, 2)]


def _scale_row(kind: str, modules: "list[ModuleSummary]") -> list[Any]:
    weights = [bound for module in modules for bound in module.weight_scale or ()]
    inputs = [bound for module in modules for bound in module.input_scale or ()]
    offsets = [module.input_offset for module in modules if module.input_offset is not None]
    weight_range = f"{min(weights):.1e} to {max(weights):.1e}"
    if not inputs:
        alone = all(parse_scheme(module.scheme).is_weight_only for module in modules)
        return [kind, weight_range, "floating point" if alone else "by token", ""]
    zero_points = f"{min(offsets)} to {max(offsets)}" if offsets else "by column"
    return [kind, weight_range, f"{min(inputs):.1e} to {max(inputs):.1e}", zero_points]


def _cache_row(kind: str, modules: "list[ModuleSummary]") -> list[Any]:
    bounds = [bound for module in modules for bound in module.cache_scale or ()]
    cache = parse_scheme(modules[0].scheme).cache
    integers = "" if cache is None else f"int{cache.bits} by channel"
    return [kind, integers, len(modules), f"{min(bounds):.1e} to {max(bounds):.1e}"]


def _render_schemes(summary: "Summary") -> None:
    rows = [
        [parse_scheme(scheme).description, modules, round(parameters / 1e6, 2)]
        for scheme, (modules, parameters) in summary.schemes().items()
    ]
    experts = f"{summary.experts:,} routed experts" if summary.experts else None
    console.print_table("Schemes", ["scheme", "modules", "M parameters"], rows, caption=experts)


def _render_layers(layers: "list[LayerSummary]") -> None:
    groups = list(dict.fromkeys(group for layer in layers for group in layer.alphas))
    rows: list[list[Any]] = []
    for layer in layers:
        error = "" if layer.error is None else f"{layer.error:.2e}"
        rows.append([layer.index, *(layer.alphas.get(group, "") for group in groups), error])
    console.print_table("Chosen alpha by group", ["layer", *groups, "relative error"], rows)
