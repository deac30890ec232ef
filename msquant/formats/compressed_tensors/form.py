"""compressed-tensors for vLLM, as one of the formats.

Read in vllm 0.11.0 and 0.32.0: compressed_tensors.py (`_is_static_tensor_w8a8`, `_is_dynamic_token_w8a8`,
`get_quant_method`), compressed_tensors_moe (`CompressedTensorsW8A8Int8MoEMethod`), and the weight that latent
attention takes apart (v1/attention/backends/mla/common.py, quant_utils.py: `get_and_maybe_dequant_weights`).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.weights import QuantizedLinear
from msquant.errors import CheckpointError
from msquant.families import folded_linears
from msquant.formats.base import Format
from msquant.formats.compressed_tensors import layout, packed
from msquant.formats.compressed_tensors.layout import SERVED_DTYPES, exact_scale
from msquant.formats.compressed_tensors.reader import CompressedTensorsCheckpoint
from msquant.formats.compressed_tensors.rules import check_fused_targets, check_tensors, section_schemes
from msquant.formats.compressed_tensors.section import (
    FORMAT,
    QUANT_METHOD,
    find_section,
    format_of,
    make_section,
    read_section,
)
from msquant.formats.dtypes import model_dtype
from msquant.formats.folder_rules import Finding, StoredTensor, attempt
from msquant.formats.scales import input_parameters, weight_scales
from msquant.schemes import FLOAT, W4A8_DYNAMIC, W4A16, W8A8, W8A8_DYNAMIC, W8A16, Scheme

# Beside these, int4 weights with per-token activations in groups, see `layout.takes`, and weights alone in
# other groups and widths, see `packed.is_packed`.
_WORDS: Mapping[Scheme, str] = {
    scheme: str(scheme) for scheme in (FLOAT, W8A8, W8A8_DYNAMIC, W4A8_DYNAMIC, W8A16, W4A16)
}


@dataclass(frozen=True)
class CompressedTensorsFormat(Format):
    """The tensors of `layout` and of `packed`; everything beside the shards is in `config.json`.

    The variant is what `format` in `config.json` says of all layers.

    Attributes:
        scale_dtype_of_packed: what packed scales are stored in; None for the model's dtype, which servers
            round them to when they load them.
    """

    name = QUANT_METHOD
    engine = "vLLM"
    server = "vllm"
    dtypes = SERVED_DTYPES
    words = _WORDS
    no_cache = "whose caches are float8 at most; vllm-ascend takes an int8 one, in the ascend format"
    expert_schemes = "weights alone quantized, or per-token activations (W8A8_DYNAMIC, W4A8_DYNAMIC)"

    variant: str = FORMAT
    scale_dtype_of_packed: str | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any], manifest: Mapping[str, Any]) -> "CompressedTensorsFormat":
        """The format as `config.json` says it."""
        return cls(str((find_section(config) or {}).get("format", FORMAT)))

    @classmethod
    def is_in(cls, folder: Path, config: Mapping[str, Any]) -> bool:
        """Whether `config.json` has the section."""
        return find_section(config) is not None

    def takes(self, scheme: Scheme) -> bool:
        """One of `words`, also in groups, or weights alone in any width that the packed layout holds."""
        scheme = scheme.without_cache
        return scheme.is_float or layout.takes(scheme) or packed.is_packed(scheme)

    def takes_experts(self, scheme: Scheme) -> bool:
        """Per-token activations, or weights alone."""
        return super().takes_experts(scheme) or packed.is_packed(scheme)

    def made_for(self, linears: Mapping[str, Scheme]) -> "CompressedTensorsFormat":
        """The variant is the layout of these layers, or `mixed-precision` for both layouts."""
        return CompressedTensorsFormat(format_of(linears.values()))

    def keeping(self, scale_dtype: str | None) -> "CompressedTensorsFormat":
        """Packed scales may be in any floating-point dtype."""
        return replace(self, scale_dtype_of_packed=scale_dtype)

    def check(self, linears: Mapping[str, Scheme], config: Mapping[str, Any]) -> Iterator[Finding]:
        """Check that vLLM can run the layers of a model in the given schemes together."""
        yield from super().check(linears, config)
        for module, scheme in linears.items():
            name = module.rpartition(".")[2]
            if scheme.is_static and name in folded_linears():
                yield Finding(
                    module,
                    f"is W8A8: vLLM recovers the weight of {name} by multiplying it with ones, which "
                    "static activations cut off; it accepts W8A8_DYNAMIC and FLOAT",
                )

    def part_specs(
        self, module: str, shape: tuple[int, ...], scheme: Scheme, dtype: str
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        """As `encode_parts` makes them."""
        if packed.is_packed(scheme) and scheme.weights is not None:
            return packed.part_specs(scheme.weights, shape, self.scale_dtype_of_packed or dtype)
        assert scheme.weights is not None
        parts = {
            "weight": ("I8", shape),
            "weight_scale": ("F32", layout.scale_shape(scheme.weights, shape)),
        }
        if scheme.is_static:
            parts |= {"input_scale": ("F32", (1,)), "input_zero_point": ("I8", (1,))}
        return parts

    def encode_parts(
        self, module: str, linear: QuantizedLinear, dtype: str, bias: NDArray[Any] | None
    ) -> dict[str, NDArray[Any]]:
        """The parts of a layer with static or per-token activations, or as `packed.encode_parts` makes them.

        Static activations are always stored with their zero point, be it 0: vLLM's kernel for a CPU with AMX
        takes symmetric static activations for dynamic ones.

        Returns:
            `weight` int8 [N, K], one integer in each, `weight_scale` float32 [N, 1], or [N, K / group_size],
            and, with static activations, `input_scale` float32 [1], rounded to `dtype` and to 16 bits, and
            `input_zero_point` int8 [1].

        Raises:
            CheckpointError: a scale is not positive and finite; the zero point is no int8.
        """
        if packed.is_packed(linear.scheme):
            return packed.encode_parts(module, linear, self.scale_dtype_of_packed or dtype)
        parts: dict[str, NDArray[Any]] = {
            "weight": linear.weight,
            "weight_scale": weight_scales(module, linear).reshape(len(linear.weight), -1),
        }
        if linear.is_static:
            scale, zero_points = input_parameters(module, linear, dtype)
            parts["input_scale"] = np.array([exact_scale(scale)], np.float32)
            parts["input_zero_point"] = zero_points
        return parts

    def config_entries(
        self, linears: Mapping[str, Scheme], names: Iterable[str], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The section."""
        return {"quantization_config": make_section(linears, names)}

    def stored(self, checkpoint: Checkpoint, name: str) -> StoredTensor | None:
        """What holds a tensor of the model, also where several integers of a weight are one number."""
        tensor = f"{name.removesuffix('.weight')}.weight_packed"
        if name in checkpoint or not name.endswith(".weight") or tensor not in checkpoint:
            return super().stored(checkpoint, name)
        return StoredTensor(tensor, packed.stored_shape(checkpoint, name.removesuffix(".weight")))

    def stored_schemes(self, checkpoint: Checkpoint, modules: Iterable[str]) -> dict[str, Scheme]:
        """The schemes of some modules; `config.json` knows the width of integers that tensors do not tell."""
        modules = list(modules)
        schemes = super().stored_schemes(checkpoint, modules)
        section = attempt([], lambda: read_section(read_json(checkpoint.folder / "config.json")))
        for module in modules:
            hidden = f"{module}.weight_packed" in checkpoint
            if section is None or not (hidden or schemes[module].is_dynamic):
                continue
            group = section.group(module)
            if group is not None and (packed.is_packed(group.scheme) if hidden else group.scheme.is_dynamic):
                schemes[module] = group.scheme
        return schemes

    def open(self, folder: Path) -> CompressedTensorsCheckpoint:
        """Raises CheckpointError as `CompressedTensorsCheckpoint.open`."""
        return CompressedTensorsCheckpoint.open(folder)

    def own_findings(
        self, folder: Path, config: Mapping[str, Any] | None, checkpoint: Checkpoint | None
    ) -> list[Finding]:
        """What `config.json` and the tensors break of vLLM's rules."""
        if config is None:
            return []
        findings: list[Finding] = []
        section = attempt(findings, lambda: read_section(config))
        if (dtype := model_dtype(config)) not in SERVED_DTYPES:
            expected = f"one of {', '.join(SERVED_DTYPES)} is expected"
            findings.append(Finding("config.json", f"dtype is {dtype}, {expected}"))
        if checkpoint is not None and section is not None:
            schemes = section_schemes(checkpoint, section)
            findings += self.check(schemes, config)
            findings += check_fused_targets(section, schemes)
            findings += check_tensors(checkpoint, section)
        return findings

    def notes(self, config: Mapping[str, Any]) -> list[str]:
        """That AMX computes symmetric static activations in another way."""
        try:
            section = read_section(config)
        except CheckpointError:
            # The rules report it.
            return []
        if any(group.scheme.is_static and group.symmetric for group in section.groups):
            return [
                "vLLM on a CPU with AMX computes symmetric static activations as per-token ones: msquant "
                "export writes them with a zero point, which it keeps"
            ]
        return []
