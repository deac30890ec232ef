"""GPTQ's, AWQ's and AutoRound's folders, as formats that are read."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.weights import Linear
from msquant.errors import CheckpointError
from msquant.formats.dtypes import DTYPE_CODES
from msquant.formats.folder_rules import Finding, StoredTensor, attempt, check_float
from msquant.formats.qweight.layout import (
    ORDER,
    PARTS,
    SCALES,
    WEIGHT,
    check_layout,
    decode_linear,
    stored_shape,
)
from msquant.formats.qweight.section import (
    Section,
    find_section,
    read_auto_round,
    read_awq,
    read_gptq,
)
from msquant.formats.read_only import ReadOnlyFormat
from msquant.formats.stored import FolderSource
from msquant.schemes import FLOAT, Scheme


class QweightCheckpoint(FolderSource):
    """A folder as a `WeightSource`: layers that have a `qweight` with their integers, the rest as float32.

    Attributes:
        section: what its `config.json` says.
    """

    def __init__(self, checkpoint: Checkpoint, section: Section) -> None:
        super().__init__(checkpoint)
        self.section = section

    def linear(self, module: str) -> Linear:
        """Return the layer `module`.

        Raises:
            CheckpointError: `config.json` does not quantize it, though it has a `qweight`; a part is missing,
                or of a dtype or shape that does not fit; or as `decode_linear`.
        """
        if f"{module}.{WEIGHT}" not in self.checkpoint:
            return self.checkpoint.linear(module)
        layer = self.section.of(module)
        if layer is None:
            raise CheckpointError(
                f"has a {WEIGHT}, but config.json leaves the layer in floating point",
                where=f"{self.checkpoint.folder}, {module}",
                remedy="use the config.json that belongs to these weights",
            )
        names = [*PARTS, *([ORDER] if f"{module}.{ORDER}" in self.checkpoint else [])]
        parts = self.parts(module, names, check_layout(self.checkpoint, module, layer))
        try:
            return decode_linear(module, parts, layer)
        except CheckpointError as error:
            where = f"{self.checkpoint.folder}, {error.where}"
            raise CheckpointError(error.what, where=where, remedy=error.remedy) from error


@dataclass(frozen=True)
class QweightFormat(ReadOnlyFormat):
    """What the three have in common. Weights alone are integers, inputs stay in floating point.

    Attributes:
        methods: what `quant_method` in `config.json` is.
        read: what the section of `config.json` says; raises CheckpointError.
    """

    methods: ClassVar[tuple[str, ...]]
    read: "ClassVar[staticmethod[[Mapping[str, Any]], Section]]"
    engine: ClassVar[str] = "vLLM"
    server = "vllm"

    @classmethod
    def is_in(cls, folder: Path, config: Mapping[str, Any]) -> bool:
        """Whether `config.json` has the section."""
        return find_section(config, cls.methods) is not None

    @classmethod
    def section(cls, folder: Path) -> Section:
        """What a folder's `config.json` says.

        Raises:
            CheckpointError: it is damaged, or says what msquant does not compute.
        """
        path = folder / "config.json"
        return _read(cls, path, path.stat().st_mtime_ns if path.is_file() else 0)

    def stored(self, checkpoint: Checkpoint, name: str) -> StoredTensor | None:
        """What holds a tensor, of a weight its `qweight`. Raises CheckpointError as `section`."""
        module = name.removesuffix(".weight")
        tensor = f"{module}.{WEIGHT}"
        if name in checkpoint or module == name or tensor not in checkpoint:
            return super().stored(checkpoint, name)
        layer = self.section(checkpoint.folder).of(module)
        if layer is None:
            return StoredTensor(tensor, checkpoint.shape(tensor))
        return StoredTensor(tensor, stored_shape(checkpoint, module, layer))

    def stored_schemes(self, checkpoint: Checkpoint, modules: Iterable[str]) -> dict[str, Scheme]:
        """Of layers with a `qweight` what `config.json` says."""
        section = attempt([], lambda: self.section(checkpoint.folder))
        schemes = dict.fromkeys(modules, FLOAT)
        for module in schemes:
            layer = section.of(module) if section and f"{module}.{WEIGHT}" in checkpoint else None
            if layer is not None:
                schemes[module] = layer.scheme
        return schemes

    def scale_dtype(self, checkpoint: Checkpoint) -> str | None:
        """That of `scales`, which tools store in float16 whatever the model's is; the widest of several."""
        codes = {checkpoint.dtype(name) for name in checkpoint.names() if name.endswith(f".{SCALES}")}
        found = {dtype for dtype, code in DTYPE_CODES.items() if code in codes}
        return found.pop() if len(found) == 1 else "float32" if found else None

    def open(self, folder: Path) -> QweightCheckpoint:
        """Raises CheckpointError as `section` and `Checkpoint.open`."""
        return QweightCheckpoint(Checkpoint.open(folder), self.section(folder))

    def own_findings(
        self, folder: Path, config: Mapping[str, Any] | None, checkpoint: Checkpoint | None
    ) -> list[Finding]:
        """What of `config.json` and the tensors is not understood, or contradicts itself."""
        findings: list[Finding] = []
        section = attempt(findings, lambda: self.section(folder)) if config is not None else None
        if checkpoint is None or section is None:
            return findings
        source = QweightCheckpoint(checkpoint, section)
        quantized = {
            name.removesuffix(f".{WEIGHT}") for name in checkpoint.names() if name.endswith(f".{WEIGHT}")
        }
        if not quantized:
            findings.append(Finding("config.json", f"is of {self.name}, but no tensor is a {WEIGHT}"))
        for module in sorted(quantized):
            layer = section.of(module)
            problems = [] if layer is None else check_layout(checkpoint, module, layer)
            if f"{module}.weight" in checkpoint:
                problems.append(Finding(f"{module}.weight", f"is there beside a {WEIGHT}"))
            findings += problems
            if not problems:
                attempt(findings, lambda module=module: source.linear(module))  # type: ignore[misc]
        for name in checkpoint.names():
            if name.rpartition(".")[0] not in quantized:
                findings += check_float(checkpoint, name)
        return findings


@lru_cache(maxsize=8)
def _read(form: type[QweightFormat], path: Path, changed: int) -> Section:
    """What a `config.json` says; every tensor is asked for, and the file read once until it changes."""
    found = find_section(read_json(path), form.methods)
    if found is None:
        raise CheckpointError(f"has no quantization_config of {form.name}", where=path)
    try:
        return form.read(found)
    except CheckpointError as error:
        raise CheckpointError(error.what, where=path, remedy=error.remedy) from error


@dataclass(frozen=True)
class GptqFormat(QweightFormat):
    """GPTQ's layout, of GPTQModel, AutoGPTQ and AutoRound's `auto_gptq`."""

    name = "gptq"
    methods = ("gptq",)
    read = staticmethod(read_gptq)


@dataclass(frozen=True)
class AwqFormat(QweightFormat):
    """AWQ's `gemm` layout, of AutoAWQ, GPTQModel and AutoRound's `auto_awq`."""

    name = "awq"
    methods = ("awq",)
    read = staticmethod(read_awq)


@dataclass(frozen=True)
class AutoRoundFormat(QweightFormat):
    """AutoRound's own format, which is in one of the two layouts."""

    name = "auto-round"
    methods = ("auto-round", "auto_round", "intel/auto-round")
    read = staticmethod(read_auto_round)
