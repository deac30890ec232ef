"""What a checkpoint folder holds and whether it keeps its contract, as plain data."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.download_marker import require_complete
from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.results import MANIFEST_NAME
from msquant.errors import CheckpointError
from msquant.formats.base import Format
from msquant.formats.dtypes import model_dtype
from msquant.formats.folder_rules import Finding, StoredTensor
from msquant.formats.registry import folder_format, refuse_other_formats
from msquant.formats.servers import ServedModel
from msquant.formats.stored import stored_scales
from msquant.formats.verdicts import Verdict, serving_table
from msquant.schemes import FLOAT, parse_scheme

_LAYERS = "model.layers."
_EXPERT = re.compile(r".*\.experts\.\d+\.")


@dataclass(frozen=True)
class ModuleSummary:
    """The tensors of one module.

    Attributes:
        name: for example `model.layers.0.self_attn.q_proj`.
        kind: the name without the layer and the expert's number, for example `mlp.experts.*.up_proj`.
        layer: the decoder layer it is in; None outside of the decoder.
        scheme: its word, for example `W8A8_DYNAMIC` or `FLOAT`.
        dtype: safetensors dtype of the weight.
        shape: of the weight.
        nbytes: of all its tensors on disk.
        weight_scale: smallest and largest of its rows; None in floating point.
        input_scale: smallest and largest; None without static activations.
        input_offset: the zero point; None without static activations, and where the columns differ.
        cache_scale: smallest and largest of the keys or values it makes; None in floating point.
    """

    name: str
    kind: str
    layer: int | None
    scheme: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    weight_scale: tuple[float, float] | None = None
    input_scale: tuple[float, float] | None = None
    input_offset: int | None = None
    cache_scale: tuple[float, float] | None = None


@dataclass(frozen=True)
class LayerSummary:
    """What the manifest says of one decoder layer.

    Attributes:
        index: its number.
        alphas: the smoothing strength that was chosen for each group of linear layers.
        error: relative error of the layer's output; None if it was not recorded.
    """

    index: int
    alphas: dict[str, float]
    error: float | None


@dataclass(frozen=True)
class Summary:
    """A checkpoint folder.

    Attributes:
        folder: where it is.
        quantization: the format, or None for a model in floating point.
        architecture: from config.json, or None.
        dtype: the model's, from config.json, or None.
        modules: in the order of their names, layers by number.
        layers: from `msquant.json`; empty if that says nothing of them.
        has_manifest: whether `msquant.json` is there.
        findings: the broken rules of the contract; always empty for a model in floating point.
        variant: what it is made for, or None for a model in floating point.
        consumer: the same, for people.
        notes: what may keep that from serving a folder that breaks no rule.
        served: who serves it and who does not; empty for a model in floating point.
    """

    folder: str
    quantization: str | None
    architecture: str | None
    dtype: str | None
    modules: list[ModuleSummary] = field(default_factory=list)
    layers: list[LayerSummary] = field(default_factory=list)
    has_manifest: bool = False
    findings: list[Finding] = field(default_factory=list)
    variant: str | None = None
    consumer: str | None = None
    notes: list[str] = field(default_factory=list)
    served: list[Verdict] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(module.nbytes for module in self.modules)

    @property
    def parameters(self) -> int:
        """Elements of all weights."""
        return sum(_elements(module) for module in self.modules)

    @property
    def quantized_by_bits(self) -> dict[int, int]:
        """Elements of the weights that are integers, by the integers' width in bits, ascending."""
        counts: dict[int, int] = defaultdict(int)
        for scheme, (_, elements) in self.schemes().items():
            if (quant := parse_scheme(scheme).weights) is not None:
                counts[quant.bits] += elements
        return dict(sorted(counts.items()))

    @property
    def quantized_parameters(self) -> int:
        """Elements of the weights that are integers of any width."""
        return sum(self.quantized_by_bits.values())

    @property
    def weight_bits(self) -> list[int]:
        """The widths of the integers that weights are in, ascending; empty for a model in floating point."""
        return list(self.quantized_by_bits)

    @property
    def experts(self) -> int:
        """Number of routed experts, over all layers."""
        found = (_EXPERT.match(module.name) for module in self.modules)
        return len({match[0] for match in found if match})

    def schemes(self) -> dict[str, tuple[int, int]]:
        """Number of modules and elements of their weights, by scheme."""
        counts: dict[str, tuple[int, int]] = {}
        for module in self.modules:
            modules, elements = counts.get(module.scheme, (0, 0))
            counts[module.scheme] = (modules + 1, elements + _elements(module))
        return dict(sorted(counts.items()))

    def kinds(self) -> dict[tuple[str, str, str, tuple[int, ...]], list[ModuleSummary]]:
        """Modules that are alike but for their layer, by kind, scheme, dtype and shape."""
        groups: dict[tuple[str, str, str, tuple[int, ...]], list[ModuleSummary]] = defaultdict(list)
        for module in self.modules:
            groups[module.kind, module.scheme, module.dtype, module.shape].append(module)
        return dict(groups)


def summarize(folder: Path | str, *, verify_hashes: bool = False, check: bool = True) -> Summary:
    """Read a folder back and check it against the contract of the format it is in.

    Args:
        folder: a Hugging Face folder, quantized or not.
        verify_hashes: also compare every file's sha256 with the manifest.
        check: read every quantized tensor to check the contract; without it there are no findings.

    Returns:
        The summary. A quantized folder that breaks its contract has findings, and lists the modules that
        could be read.

    Raises:
        CheckpointError: there is no such folder, its download is not complete, it is in a format that is not
            read here, or it is in floating point and damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError("there is no such folder", where=folder, remedy="check the path")
    require_complete(folder)
    form = folder_format(folder)
    findings = form.validate(folder, verify_hashes=verify_hashes) if form and check else []
    name = form.name if form else None
    try:
        config = read_json(folder / "config.json")
        checkpoint = Checkpoint.open(folder)
    except CheckpointError:
        if not findings:
            raise
        return Summary(str(folder), name, None, None, findings=findings)
    if form is None:
        refuse_other_formats(folder)
    architectures = config.get("architectures")
    modules = list(_modules(checkpoint, form))
    served = serving_table(_served_model(form, config, modules)) if form else []
    return Summary(
        folder=str(folder),
        quantization=name,
        architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else None,
        dtype=model_dtype(config),
        modules=modules,
        layers=list(_layers(_manifest(folder))),
        has_manifest=bool(_manifest(folder)),
        findings=findings,
        variant=form.variant if form else None,
        consumer=form.consumer if form else None,
        notes=[*form.notes(config), *_unserved(form, served)] if form else [],
        served=served,
    )


def _served_model(form: Format, config: dict[str, Any], modules: list[ModuleSummary]) -> ServedModel:
    linears = {module.name: parse_scheme(module.scheme) for module in modules}
    return ServedModel(form.name, form.variant, config, linears)


def _unserved(form: Format, served: list[Verdict]) -> Iterator[str]:
    """That no version of the server which the format is for serves the folder, if it is so."""
    mine = [verdict for verdict in served if verdict.server.name == form.server]
    if form.written and not any(verdict.served for verdict in mine):
        verdict = next((one for one in mine if one.refusals[0].rule != "backend"), mine[0])
        refusal = verdict.refusals[0]
        yield f"no version of {verdict.server.name} serves it: {refusal.where}: {refusal.problem}"


def _elements(module: ModuleSummary) -> int:
    return math.prod(module.shape)


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / MANIFEST_NAME)
    except CheckpointError:
        return {}


def _layers(manifest: dict[str, Any]) -> Iterator[LayerSummary]:
    try:
        for layer in manifest.get("layers", []):
            error = layer.get("error")
            alphas = {str(group["name"]): float(group["alpha"]) for group in layer.get("groups", [])}
            yield LayerSummary(int(layer["index"]), alphas, None if error is None else float(error))
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        return


def _modules(checkpoint: Checkpoint, form: Format | None) -> Iterator[ModuleSummary]:
    names: dict[str, list[str]] = defaultdict(list)
    for name in checkpoint.names():
        owner = form.owner(name) if form else name.rpartition(".")[0]
        names[owner or name].append(name)
    schemes = form.stored_schemes(checkpoint, names) if form else dict.fromkeys(names, FLOAT)
    for module in sorted(names, key=_natural_order):
        found = _stored(checkpoint, form, f"{module}.weight")
        weight = found or StoredTensor(names[module][0], checkpoint.shape(names[module][0]))
        layer, kind = _place(module)
        scales = stored_scales(checkpoint, module, schemes[module])
        yield ModuleSummary(
            name=module,
            kind=kind,
            layer=layer,
            scheme=str(schemes[module]),
            dtype=checkpoint.dtype(weight.name),
            shape=weight.shape,
            nbytes=sum(checkpoint.nbytes(name) for name in names[module]),
            weight_scale=_range(scales.weight),
            input_scale=_range(scales.input),
            input_offset=scales.offset,
            cache_scale=_range(scales.cache),
        )


def _stored(checkpoint: Checkpoint, form: Format | None, name: str) -> StoredTensor | None:
    """What holds a tensor; None where nothing does, or its shape cannot be read, which the rules report."""
    if form is None:
        return StoredTensor(name, checkpoint.shape(name)) if name in checkpoint else None
    try:
        return form.stored(checkpoint, name)
    except CheckpointError:
        return None


def _range(values: NDArray[np.float64] | None) -> tuple[float, float] | None:
    return None if values is None else (float(values.min()), float(values.max()))


def _place(module: str) -> tuple[int | None, str]:
    """The decoder layer's number and the name below it, without an expert's number."""
    number, _, kind = module.removeprefix(_LAYERS).partition(".")
    if module.startswith(_LAYERS) and number.isdecimal():
        return int(number), re.sub(r"\bexperts\.\d+\.", "experts.*.", kind)
    return None, module


def _natural_order(module: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in module.split(".")]
