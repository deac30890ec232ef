"""golden-stick for vLLM-MindSpore, as one of the formats."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from msquant.checkpoint.rope_rows import RopeRows, model_rope_rows
from msquant.checkpoint.tensor_spec import TensorSpec
from msquant.checkpoint.weights import Linear, WeightSource
from msquant.formats.format import Finding, FormatName, PlainFormat
from msquant.formats.golden_stick import GoldenStickCheckpoint
from msquant.formats.golden_stick_layout import (
    DESCRIPTION_NAME,
    QUANT_METHOD,
    SECTION,
    SERVED_DTYPES,
    describe,
    encode_linear,
    linear_specs,
)
from msquant.formats.golden_stick_rules import validate
from msquant.formats.golden_stick_schemes import (
    ACCEPTED,
    DESCRIBED,
    Variant,
    check_schemes,
)
from msquant.formats.mindformers_config import published_form
from msquant.schemes import Scheme


@dataclass(frozen=True)
class GoldenStickFormat(PlainFormat):
    """See `Format`; vLLM-MindSpore would read a section of `config.json` instead of the description.

    Attributes:
        variant: the backend of vLLM-MindSpore that a folder is for.
    """

    variant: Variant

    @property
    def name(self) -> FormatName:
        """See `Format`."""
        return QUANT_METHOD

    @property
    def consumer(self) -> str:
        """See `Format`."""
        return f"the {self.variant} backend of vLLM-MindSpore"

    @property
    def schemes(self) -> Mapping[Scheme, str]:
        """See `Format`."""
        accepted = ACCEPTED[self.variant]
        by_word = {word: scheme for scheme, word in DESCRIBED.items()}
        return {by_word[word]: word for word in accepted}

    @property
    def dtypes(self) -> tuple[str, ...]:
        """See `Format`."""
        return SERVED_DTYPES

    def check(self, linears: Mapping[str, Scheme], config: Mapping[str, Any]) -> Iterator[Finding]:
        """See `Format`."""
        described = {module: DESCRIBED[scheme] for module, scheme in linears.items()}
        return check_schemes(described, self.variant, config)

    def row_orders(self, config: Mapping[str, Any]) -> RopeRows:
        """See `Format`."""
        return model_rope_rows(config) if self.variant == "mindformers" else super().row_orders(config)

    def linear_specs(
        self, module: str, shape: tuple[int, ...], scheme: Scheme, dtype: str, bias: bool
    ) -> list[TensorSpec]:
        """See `Format`."""
        return linear_specs(module, shape, scheme, dtype, bias)

    def encode_linear(self, module: str, linear: Linear, dtype: str) -> dict[str, NDArray[Any]]:
        """See `Format`."""
        return encode_linear(module, linear, dtype, self.variant)

    def documents(
        self, linears: Mapping[str, Scheme], names: Iterable[str], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See `Format`."""
        static = [module for module, scheme in linears.items() if scheme.is_static]
        dynamic = [module for module, scheme in linears.items() if scheme.is_dynamic]
        return {DESCRIPTION_NAME: describe(names, static, dynamic)}

    def config_entries(
        self, linears: Mapping[str, Scheme], names: Iterable[str], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See `Format`: MindFormers alone needs a section."""
        return {"quantization_config": dict(SECTION)} if self.variant == "mindformers" else {}

    def adapted(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Format`: MindFormers refuses what it does not know."""
        if self.variant == "mindformers" and config.get("model_type") == "deepseek_v3":
            return published_form(config)
        return dict(config)

    def open(self, folder: Path) -> WeightSource:
        """See `Format`."""
        return GoldenStickCheckpoint.open(folder)

    def validate(self, folder: Path, *, verify_hashes: bool = False) -> list[Finding]:
        """See `Format`."""
        return validate(folder, verify_hashes=verify_hashes)
