"""msModelSlim's format for vllm-ascend, as one of the formats."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from msquant.checkpoint.reader import Checkpoint
from msquant.checkpoint.tensor_spec import TensorSpec
from msquant.checkpoint.weights import Linear, WeightSource
from msquant.formats.ascend import AscendCheckpoint
from msquant.formats.ascend_description import stored_schemes
from msquant.formats.ascend_layout import SERVED_DTYPES, encode_linear, linear_specs
from msquant.formats.ascend_rules import validate
from msquant.formats.ascend_schemes import (
    DESCRIBED,
    DESCRIPTION_NAME,
    QUANT_METHOD,
    check_schemes,
    describe,
)
from msquant.formats.format import Finding, FormatName, PlainFormat
from msquant.schemes import Scheme


@dataclass(frozen=True)
class AscendFormat(PlainFormat):
    """See `Format`; vllm-ascend reorders rotary rows itself.

    A section in `config.json` would be read instead of the description.
    """

    variant: str = "ascendV1"

    @property
    def name(self) -> FormatName:
        """See `Format`."""
        return QUANT_METHOD

    @property
    def consumer(self) -> str:
        """See `Format`."""
        return "vllm-ascend"

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

    def documents(
        self, linears: Mapping[str, Scheme], names: Iterable[str], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See `Format`."""
        return {DESCRIPTION_NAME: describe(names, linears)}

    def stored_schemes(self, checkpoint: Checkpoint, modules: Iterable[str]) -> dict[str, Scheme]:
        """See `Format`."""
        return stored_schemes(checkpoint, modules)

    def open(self, folder: Path) -> WeightSource:
        """See `Format`."""
        return AscendCheckpoint.open(folder)

    def validate(self, folder: Path, *, verify_hashes: bool = False) -> list[Finding]:
        """See `Format`."""
        return validate(folder, verify_hashes=verify_hashes)
