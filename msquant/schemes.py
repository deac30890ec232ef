"""How a linear layer is computed, as one value: the integers of its weights, of its inputs and of its cache.

The terms are those of compressed-tensors (`quantization/quant_args.py`, `quant_scheme.py`), the words those
of msModelSlim and golden-stick: `W8A8`, `W8A8_DYNAMIC`, `W4A8_DYNAMIC`, `W8A16`, `FLOAT`.
"""

import re
from dataclasses import dataclass, replace
from typing import Literal

from msquant.errors import RecipeError, choices

Granularity = Literal["tensor", "channel", "group", "token"]
"""What shares one scale: the whole tensor, an output channel of a weight, some neighbouring columns of an
output channel, or one token of an input."""


@dataclass(frozen=True)
class Quant:
    """How one tensor is quantized to integers.

    Attributes:
        bits: of an integer, 2 to 8.
        granularity: what shares a scale.
        group_size: columns in a group; None for every other granularity.
        symmetric: whether the zero point is 0.
        dynamic: whether the scale is found while the model runs, and not at calibration.
        shifted: whether each column of an input has a zero point of its own beside the one scale.
    """

    bits: int
    granularity: Granularity
    group_size: int | None = None
    symmetric: bool = True
    dynamic: bool = False
    shifted: bool = False

    @property
    def low(self) -> int:
        """The least integer."""
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        """The greatest integer."""
        return (1 << (self.bits - 1)) - 1


@dataclass(frozen=True)
class Scheme:
    """How a linear layer is computed.

    Attributes:
        weights: None in floating point.
        inputs: None where the inputs stay in floating point.
        cache: of the keys or values that the layer makes; None where they stay in floating point.
        prefill: of the inputs while a prompt is read, where a server that reads prompts and one that writes
            answers quantize them each in its own way; None where `inputs` is of both.
    """

    weights: Quant | None = None
    inputs: Quant | None = None
    cache: Quant | None = None
    prefill: Quant | None = None

    @property
    def is_float(self) -> bool:
        """Whether the weights stay in floating point."""
        return self.weights is None

    @property
    def is_static(self) -> bool:
        """Whether the inputs are quantized with a scale fixed at calibration."""
        return self.inputs is not None and not self.inputs.dynamic

    @property
    def is_shifted(self) -> bool:
        """Whether each column of the inputs has a zero point of its own."""
        return self.inputs is not None and self.inputs.shifted

    @property
    def is_dynamic(self) -> bool:
        """Whether the inputs are quantized with a scale for every token."""
        return self.inputs is not None and self.inputs.dynamic

    @property
    def is_weight_only(self) -> bool:
        """Whether the weights alone are quantized."""
        return self.weights is not None and self.inputs is None

    @property
    def description(self) -> str:
        """What it is, for people."""
        cached = "" if self.cache is None else f", int{self.cache.bits} key-value cache"
        if self.weights is None:
            return f"floating point{cached}"
        word = str(self.without_cache)
        if self.inputs is None:
            return f"int{self.weights.bits} weights alone ({word}){cached}"
        inputs = "activations per token" if self.inputs.dynamic else "static activations"
        if self.is_shifted:
            inputs += " with a zero point a column"
        if self.prefill is not None:
            inputs += ", per token in prefill"
        return f"{word.replace('_DYNAMIC', '')}, {inputs}{cached}"

    @property
    def is_int4(self) -> bool:
        """Whether the weights are integers of four bits."""
        return self.weights is not None and self.weights.bits == 4

    @property
    def group_size(self) -> int | None:
        """Columns of a weight's group; None where it has none."""
        return None if self.weights is None else self.weights.group_size

    def scale_dtype(self, dtype: str) -> str:
        """What the scales of weights have to fit, for a model in a dtype; as for `quantize_weight`.

        Engines keep them in the model's dtype, but for static inputs: there they have the product with the
        input's scale, in float32. Those of int4 groups vllm-ascend keeps in float16, whatever the model's,
        and other formats hold the same numbers.
        """
        if self.is_static and self.prefill is None:
            return "float32"
        if dtype != "float16" and self.is_dynamic and self.group_size is not None:
            return "bfloat16 and float16"
        return dtype

    @property
    def without_cache(self) -> "Scheme":
        """The same with keys or values in floating point: how the linear layer itself is computed."""
        return self if self.cache is None else replace(self, cache=None)

    @property
    def per_token(self) -> "Scheme":
        """The same with a scale for every token where the inputs are static."""
        if self.inputs is None or self.inputs.dynamic:
            return self
        return replace(self, inputs=_per_token(self.inputs.bits), prefill=None)

    def in_groups(self, size: int) -> "Scheme":
        """The same with weights in groups of so many columns. Its weights are integers."""
        assert self.weights is not None
        return replace(self, weights=replace(self.weights, granularity="group", group_size=size))

    def in_rows(self) -> "Scheme":
        """The same with one scale an output channel of its weights, whatever their groups are."""
        if self.group_size is None:
            return self
        assert self.weights is not None
        return replace(self, weights=replace(self.weights, granularity="channel", group_size=None))

    def __str__(self) -> str:
        """The word that recipes have for it, which `parse_scheme` takes."""
        if self.cache is not None:
            return f"{self.without_cache}_C{self.cache.bits}"
        for word, scheme in PRESETS.items():
            if scheme == self:
                return word
        assert self.weights is not None
        suffix = "_DYNAMIC" if self.is_dynamic else ""
        word = f"W{self.weights.bits}A{16 if self.inputs is None else self.inputs.bits}{suffix}"
        size = self.weights.group_size
        preset = PRESETS.get(word)
        if size is not None:
            word += f"_G{size}"
        elif preset is not None and preset.weights is not None and preset.weights.group_size is not None:
            word += "_CHANNEL"
        return word if self.weights.symmetric else f"{word}_ASYM"


def _int(bits: int, group_size: int | None = None) -> Quant:
    """Symmetric weights with one scale for each output channel, or for each group of it."""
    return Quant(bits, "channel") if group_size is None else Quant(bits, "group", group_size)


def _static(bits: int) -> Quant:
    return Quant(bits, "tensor", symmetric=False)


def _per_token(bits: int) -> Quant:
    return Quant(bits, "token", dynamic=True)


FLOAT = Scheme()
"""Floating point."""

W8A8 = Scheme(_int(8), _static(8))
"""Int8 weights; int8 inputs with one scale and zero point, fixed at calibration."""

W8A8_SHIFTED = Scheme(_int(8), replace(_static(8), shifted=True))
"""Int8 weights; int8 inputs with one scale, and a zero point for every column (the shift of Outlier
Suppression+, arXiv 2304.09145), fixed at calibration."""

W8A8_DYNAMIC = Scheme(_int(8), _per_token(8))
"""Int8 weights; int8 inputs with a scale for every token."""

W8A8_MIX = Scheme(_int(8), _static(8), prefill=_per_token(8))
"""Int8 weights; int8 inputs, static where answers are written, with a scale for every token where prompts are
read: for servers that do the two apart."""

W8A16 = Scheme(_int(8))
"""Int8 weights; inputs in floating point."""

W4A8_DYNAMIC = Scheme(_int(4), _per_token(8))
"""Int4 weights; int8 inputs with a scale for every token."""

W4A16 = Scheme(_int(4, 128))
"""Int4 weights in groups of 128 columns; inputs in floating point."""

C8 = Quant(8, "channel")
"""Of a key-value cache: int8, with one scale for every channel of each head, fixed at calibration."""

PRESETS: dict[str, Scheme] = {
    "FLOAT": FLOAT,
    "W8A8": W8A8,
    "W8A8_SHIFTED": W8A8_SHIFTED,
    "W8A8_DYNAMIC": W8A8_DYNAMIC,
    "W8A8_MIX": W8A8_MIX,
    "W8A16": W8A16,
    "W4A8_DYNAMIC": W4A8_DYNAMIC,
    "W4A16": W4A16,
}
"""The schemes that have a word of their own."""

MOST_COLUMNS = 99_999
"""Of a group that has a word."""

_CACHED = "_C8"

_WORD = re.compile(r"W([2-8])A([2-8]|16)(_DYNAMIC)?(?:_(?:G([1-9]\d{0,4})|(CHANNEL)))?(_ASYM)?")


def parse_scheme(word: str) -> Scheme:
    """The scheme that a word stands for.

    Beside `PRESETS`: `W<bits>A<bits>`, `W<bits>A<bits>_DYNAMIC` and `W<bits>A16`, followed by `_G<columns>`
    for groups of so many columns or `_CHANNEL` for one scale an output channel, and by `_ASYM` for weights
    with zero points; for example `W4A16_G64_ASYM`. Of the linears that make keys or values, any of these is
    followed by `_C8` where their cache is int8.

    Raises:
        RecipeError: it stands for none.
    """
    scheme = _uncached(word.removesuffix(_CACHED))
    if scheme is None:
        raise RecipeError(
            f"{word!r} is not a scheme",
            remedy=f"{choices(word, tuple(PRESETS))}, or bits and groups as in W4A16_G64 or W4A8_DYNAMIC_G64",
        )
    return replace(scheme, cache=C8) if word.endswith(_CACHED) else scheme


def _uncached(word: str) -> Scheme | None:
    """The scheme that a word without a cache stands for; None if it stands for none."""
    if word in PRESETS:
        return PRESETS[word]
    if match := _WORD.fullmatch(word):
        weight_bits, input_bits, dynamic, size, channel, asymmetric = match.groups()
        base = word[: match.end(3) if dynamic else match.end(2)]
        if not (dynamic and input_bits == "16"):
            inputs = None if input_bits == "16" else (_per_token if dynamic else _static)(int(input_bits))
            scheme = PRESETS.get(base, Scheme(_int(int(weight_bits)), inputs))
            weights = scheme.weights
            if size or channel:
                weights = _int(int(weight_bits), int(size) if size else None)
            assert weights is not None
            return replace(scheme, weights=replace(weights, symmetric=not asymmetric))
    return None
