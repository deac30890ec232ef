"""compressed-tensors for vLLM, as one of the formats."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from msquant.checkpoint.tensor_spec import TensorSpec
from msquant.checkpoint.weights import Linear, WeightSource
from msquant.formats.compressed_tensors import CompressedTensorsCheckpoint
from msquant.formats.compressed_tensors_layout import (
    QUANT_METHOD,
    SERVED_DTYPES,
    encode_linear,
    linear_specs,
)
from msquant.formats.compressed_tensors_rules import notes, validate
from msquant.formats.compressed_tensors_schemes import DESCRIBED, check_schemes
from msquant.formats.compressed_tensors_section import make_section
from msquant.formats.format import Finding, FormatName, PlainFormat
from msquant.schemes import Scheme


@dataclass(frozen=True)
class CompressedTensorsFormat(PlainFormat):
    """See `Format`; everything beside the shards is in `config.json`."""

    variant: str = "int-quantized"

    @property
    def name(self) -> FormatName:
        """See `Format`."""
        return QUANT_METHOD

    @property
    def consumer(self) -> str:
        """See `Format`."""
        return "vLLM"

    @property
    def schemes(self) -> Mapping[Scheme, str]:
        """See `Format`."""
        return DESCRIBED

    @property
    def dtypes(self) -> tuple[str, ...]:
        """See `Format`."""
        return SERVED_DTYPES

    def check(self, linears: Mapping[str, Scheme], config: Mapping[str, Any]) -> Iterator[Finding]:
        """See `Format`."""
        return check_schemes(linears)

    def linear_specs(
        self, module: str, shape: tuple[int, ...], scheme: Scheme, dtype: str, bias: bool
    ) -> list[TensorSpec]:
        """See `Format`."""
        return linear_specs(module, shape, scheme, dtype, bias)

    def encode_linear(self, module: str, linear: Linear, dtype: str) -> dict[str, NDArray[Any]]:
        """See `Format`."""
        return encode_linear(module, linear, dtype)

    def config_entries(
        self, linears: Mapping[str, Scheme], names: Iterable[str], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See `Format`."""
        return {"quantization_config": make_section(linears, names)}

    def open(self, folder: Path) -> WeightSource:
        """See `Format`."""
        return CompressedTensorsCheckpoint.open(folder)

    def validate(self, folder: Path, *, verify_hashes: bool = False) -> list[Finding]:
        """See `Format`."""
        return validate(folder, verify_hashes=verify_hashes)

    def notes(self, config: Mapping[str, Any]) -> list[str]:
        """See `Format`."""
        return notes(config)
