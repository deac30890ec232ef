"""What a checkpoint folder holds and whether it keeps its contract, as plain data."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from msquant.checkpoint.download_marker import require_complete
from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.reader import Checkpoint
from msquant.checkpoint.results import MANIFEST_NAME
from msquant.errors import CheckpointError
from msquant.formats.golden_stick import (
    FLOAT,
    QUANT_METHOD,
    W8A8,
    W8A8_DYNAMIC,
    Finding,
    Variant,
    model_dtype,
    read_description,
    read_variant,
    serving_notes,
    validate,
    variant_of,
)
from msquant.formats.golden_stick_rules import description_files

_LAYERS = "model.layers."
_EXPERT = re.compile(r".*\.experts\.\d+\.")


@dataclass(frozen=True)
class ModuleSummary:
    """The tensors of one module.

    Attributes:
        name: for example `model.layers.0.self_attn.q_proj`.
        kind: the name without the layer and the expert's number, for example `mlp.experts.*.up_proj`.
        layer: the decoder layer it is in; None outside of the decoder.
        scheme: `W8A8`, `W8A8_DYNAMIC` or `FLOAT`.
        dtype: safetensors dtype of the weight.
        shape: of the weight.
        nbytes: of all its tensors on disk.
        weight_scale: smallest and largest of its rows; None in floating point.
        input_scale: smallest and largest; None without static activations.
        input_offset: the zero point; None without static activations, and where the columns differ.
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
        quantization: `golden-stick`, or None for a model in floating point.
        architecture: from config.json, or None.
        dtype: the model's, from config.json, or None.
        modules: in the order of their names, layers by number.
        layers: from `msquant.json`; empty if that says nothing of them.
        has_manifest: whether `msquant.json` is there.
        findings: the broken rules of the contract; always empty for a model in floating point.
        variant: the backend of vLLM-MindSpore that it is for, or None for a model in floating point.
        notes: what may keep that backend from serving a folder that breaks no rule.
    """

    folder: str
    quantization: str | None
    architecture: str | None
    dtype: str | None
    modules: list[ModuleSummary] = field(default_factory=list)
    layers: list[LayerSummary] = field(default_factory=list)
    has_manifest: bool = False
    findings: list[Finding] = field(default_factory=list)
    variant: Variant | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(module.nbytes for module in self.modules)

    @property
    def parameters(self) -> int:
        """Elements of all weights."""
        return sum(_elements(module) for module in self.modules)

    @property
    def quantized_parameters(self) -> int:
        """Elements of the weights in int8."""
        return sum(_elements(module) for module in self.modules if module.scheme != FLOAT)

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
    quantized = _is_golden_stick(folder)
    findings = validate(folder, verify_hashes=verify_hashes) if quantized and check else []
    try:
        config = read_json(folder / "config.json")
        checkpoint = Checkpoint.open(folder)
    except CheckpointError:
        if not findings:
            raise
        return Summary(str(folder), QUANT_METHOD, None, None, findings=findings)
    if not quantized:
        _refuse_other_formats(folder, config)
    try:
        described = read_description(folder) if quantized else {}
    except CheckpointError:
        described = {}
    architectures = config.get("architectures")
    return Summary(
        folder=str(folder),
        quantization=QUANT_METHOD if quantized else None,
        architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else None,
        dtype=model_dtype(config),
        modules=list(_modules(checkpoint, described)),
        layers=list(_layers(_manifest(folder))),
        has_manifest=bool(_manifest(folder)),
        findings=findings,
        variant=_variant(folder, config) if quantized else None,
        notes=serving_notes(config) if quantized else [],
    )


def _variant(folder: Path, config: dict[str, Any]) -> Variant:
    try:
        return read_variant(folder, config)
    except CheckpointError:
        return variant_of(config)


def _elements(module: ModuleSummary) -> int:
    return math.prod(module.shape)


def _is_golden_stick(folder: Path) -> bool:
    return bool(description_files(folder)) or _manifest(folder).get("format") == QUANT_METHOD


def _refuse_other_formats(folder: Path, config: dict[str, Any]) -> None:
    found = config.get("quantization_config")
    if found is not None:
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise CheckpointError(
            f"quantized as {method!r}, which msquant cannot inspect",
            where=folder / "config.json",
            remedy=f"inspect a folder in the {QUANT_METHOD} format or one in floating point",
        )


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


def _modules(checkpoint: Checkpoint, described: dict[str, str]) -> Iterator[ModuleSummary]:
    names: dict[str, list[str]] = defaultdict(list)
    for name in checkpoint.names():
        names[name.rpartition(".")[0] or name].append(name)
    for module in sorted(names, key=_natural_order):
        weight = f"{module}.weight" if f"{module}.weight" in checkpoint else names[module][0]
        scheme = described.get(weight, FLOAT)
        layer, kind = _place(module)
        scales: dict[str, Any] = {}
        if scheme == W8A8:
            scales = _static_scales(checkpoint, module)
        elif scheme == W8A8_DYNAMIC:
            scales = _dynamic_scales(checkpoint, module)
        yield ModuleSummary(
            name=module,
            kind=kind,
            layer=layer,
            scheme=scheme,
            dtype=checkpoint.dtype(weight),
            shape=checkpoint.shape(weight),
            nbytes=sum(checkpoint.nbytes(name) for name in names[module]),
            **scales,
        )


def _dynamic_scales(checkpoint: Checkpoint, module: str) -> dict[str, Any]:
    if f"{module}.weight_scale" not in checkpoint:
        return {}
    scale = checkpoint.raw(f"{module}.weight_scale").astype(np.float64)
    return {"weight_scale": (float(scale.min()), float(scale.max()))} if scale.size else {}


def _static_scales(checkpoint: Checkpoint, module: str) -> dict[str, Any]:
    parts = [f"{module}.{part}" for part in ("deq_scale", "input_scale", "input_offset")]
    if not all(part in checkpoint for part in parts):
        return {}
    deq, scale, offset = (checkpoint.raw(part).astype(np.float64).reshape(-1) for part in parts)
    if not deq.size or not scale.size or not offset.size or not (scale > 0).all():
        return {}
    return {
        "weight_scale": (float(deq.min() / scale.max()), float(deq.max() / scale.max())),
        "input_scale": (float(scale.min()), float(scale.max())),
        "input_offset": int(offset[0]) if (offset == offset[0]).all() else None,
    }


def _place(module: str) -> tuple[int | None, str]:
    """The decoder layer's number and the name below it, without an expert's number."""
    number, _, kind = module.removeprefix(_LAYERS).partition(".")
    if module.startswith(_LAYERS) and number.isdecimal():
        return int(number), re.sub(r"\bexperts\.\d+\.", "experts.*.", kind)
    return None, module


def _natural_order(module: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in module.split(".")]
