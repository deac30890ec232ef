"""golden-stick for vLLM-MindSpore, as one of the formats.

Which linear layers its backends run in which scheme was read in vllm_mindspore 0.5.1 (`GoldenStickConfig`,
`_validate_quantization_consistency`) for the native one, and in mindformers 1.7.0
(parallel_core/inference/quantization/golden_stick/config.py, `get_quant_method`;
transformer/multi_latent_attention.py; transformer/moe/experts.py) for MindFormers.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msquant import schemes
from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.weights import QuantizedLinear
from msquant.errors import CheckpointError
from msquant.families import expected_shapes, row_orders
from msquant.families.row_orders import RopeRows
from msquant.formats.base import Format
from msquant.formats.description import Description
from msquant.formats.dtypes import DTYPE_CODES, MODEL_DTYPES, model_dtype
from msquant.formats.folder_rules import Finding, StoredTensor, attempt
from msquant.formats.fused_layers import check_fused_schemes, experts_parent
from msquant.formats.golden_stick import int4_experts
from msquant.formats.golden_stick.layout import (
    DESCRIPTION_NAME,
    FLOAT,
    QUANT_METHOD,
    SECTION,
    SERVED_DTYPES,
    W4A8_DYNAMIC,
    W8A8_DYNAMIC,
    WORDS,
    Variant,
    description_files,
    folder_variant,
    quantized_bias,
    read_description,
    read_variant,
    static_scheme,
    variant_of,
)
from msquant.formats.golden_stick.mindformers_config import MODEL_TYPES, published_form
from msquant.formats.golden_stick.reader import GoldenStickCheckpoint
from msquant.formats.golden_stick.rules import check_config, check_names, check_stray_files, check_tensors
from msquant.formats.int4_rows import check_one_size, unpacked
from msquant.formats.scales import deq_scales, input_parameters, weight_scales
from msquant.schemes import Scheme

# MindFormers takes its weight apart as well (`MLASelfAttention.process_weights_after_loading`).

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class GoldenStickFormat(Format):
    """The tensors of `layout`, and a description of each; vLLM would read a section of `config.json` instead.

    Attributes:
        variant: the backend of vLLM-MindSpore that a folder is for.
        row_groups: the columns of the groups that experts with one scale a row are stored in; 0 where no size
            fits the model.
    """

    name = QUANT_METHOD
    engine = "vLLM-MindSpore"
    server = "vllm-mindspore"
    program = "vllm-mindspore"
    # Whose rows are in another order, and which backend a folder is for, the family says.
    takes_any_model = False
    marker = DESCRIPTION_NAME
    dtypes = SERVED_DTYPES
    folded = "{}, which it folds into the attention"
    # The native backend has no such linears, and MindFormers none of attention below TP16.
    per_token = False
    predictions_in_float = True

    in_groups = frozenset({schemes.W4A8_DYNAMIC})
    no_cache = (
        "no loader of it selects an int8 cache of keys and values, and the arithmetic of its int8 latent "
        "cache (FAQuant) is not published; vllm-ascend takes one, in the ascend format"
    )

    variant: Variant = "native"
    row_groups: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any], manifest: Mapping[str, Any]) -> "GoldenStickFormat":
        """The variant that the manifest records, or that of the architecture."""
        try:
            variant = folder_variant(config, manifest)
        except CheckpointError:
            # The rules report it.
            variant = variant_of(config)
        return cls(variant, int4_experts.row_groups(config))

    @classmethod
    def is_in(cls, folder: Path, config: Mapping[str, Any]) -> bool:
        """Whether the engine finds a description, whose name it compares by its end alone."""
        return bool(description_files(folder))

    @property
    def consumer(self) -> str:
        """The backend of the engine."""
        return f"the {self.variant} backend of {self.engine}"

    @property
    def words(self) -> Mapping[Scheme, str]:
        """Those of the backend."""
        return WORDS[self.variant]

    def check(self, linears: Mapping[str, Scheme], config: Mapping[str, Any]) -> Iterator[Finding]:
        """Check that the backend can run the layers of a model in the given schemes together."""
        yield from self.check_words(
            {
                module: self.word(scheme) if self.takes(scheme) else str(scheme.without_cache)
                for module, scheme in linears.items()
            },
            config,
        )
        yield from self.check_caches(linears)
        yield from check_one_size(linears)
        small = {module: scheme for module, scheme in linears.items() if scheme.is_int4}
        shapes = (expected_shapes(dict(config)) or {}) if small else {}
        for module, scheme in small.items():
            size, shape = scheme.group_size or self.row_groups, shapes.get(f"{module}.weight")
            if not self.takes(scheme) or not experts_parent(module) or shape is None:
                continue
            sizes = ", ".join(map(str, int4_experts.ROW_GROUPS))
            problem = f"of groups of {sizes} columns, in which its scales are stored, none fits its inputs"
            if found := int4_experts.shape_problem(module, shape, size) if size else problem:
                yield Finding(module, f"is {scheme}: {found}")

    def check_words(self, described: Mapping[str, str], config: Mapping[str, Any]) -> Iterator[Finding]:
        """Check the same of layers as a description has them.

        Args:
            described: a word such as `W8A8` or `FLOAT` by module; only what has a weight counts.
            config: the content of `config.json`.
        """
        for module, word in described.items():
            if word not in self.words.values():
                *most, last = self.vocabulary
                known = f"{', '.join(most)} and {last}"
                yield Finding(module, f"described as {word!r}: the {self.variant} backend knows only {known}")
            elif word == W4A8_DYNAMIC and not experts_parent(module):
                yield Finding(
                    module, f"described as {word}: the engine runs int4 weights in routed experts alone"
                )
            elif word != FLOAT and (what := self.stays_float(module)):
                yield Finding(module, f"described as {word}: the engine never quantizes {what}")
        if self.variant == "mindformers":
            yield from _check_experts(described, config)
        yield from check_fused_schemes(described, "described as")

    def row_orders(self, config: Mapping[str, Any]) -> RopeRows:
        """Rotary rows are de-interleaved for MindFormers, which does not do it itself."""
        return row_orders(config) if self.variant == "mindformers" else super().row_orders(config)

    def part_specs(
        self, module: str, shape: tuple[int, ...], scheme: Scheme, dtype: str
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        """As `encode_parts` makes them."""
        rows, columns = shape[:1], shape[1:]
        if scheme.is_int4:
            return int4_experts.part_specs(shape, scheme.group_size or self.row_groups)
        if scheme.is_dynamic:
            return {"weight": ("I8", shape), "weight_scale": ("F32", rows), "weight_offset": ("F32", rows)}
        return {
            "weight": ("I8", shape),
            "deq_scale": ("F32", rows),
            "quant_bias": ("I32", rows),
            "input_scale": (DTYPE_CODES[dtype], columns),
            "input_offset": ("I8", columns),
        }

    def encode_parts(
        self, module: str, linear: QuantizedLinear, dtype: str, bias: NDArray[Any] | None
    ) -> dict[str, NDArray[Any]]:
        """The parts of a W8A8 or W8A8_DYNAMIC layer.

        `input_scale` is stored in the model's dtype, so it is rounded first and `deq_scale` is computed from
        the rounded value: the engine then divides and multiplies by the same number. Computed from the
        unrounded scale, `deq_scale` would scale the layer's output by up to 1 + 2**-8 in bfloat16.

        Returns:
            W8A8, with s_x the rounded input scale, s_w the weight scales and zp the input's zero point:
            `weight` int8 [N, K]; `deq_scale` = s_x s_w float32 [N]; `quant_bias` = -sum_k zp W int32 [N];
            `input_scale` = s_x in `dtype` [K]; `input_offset` = zp int8 [K]; W8A8_SHIFTED: the same, with
            different zp. W8A8_DYNAMIC: `weight` int8 [N,
            K]; `weight_scale` = s_w and `weight_offset` = 0, float32 [N]. W4A8_DYNAMIC: what
            `int4_experts.encode` returns.

        Raises:
            CheckpointError: activations are quantized per token, but the variant is native; a scale is not
                positive and finite; the zero point is no int8; a sum does not fit int32.
        """
        if not linear.is_static:
            if W8A8_DYNAMIC not in self.words.values():
                raise CheckpointError(
                    f"its activations are quantized per token, which {self.consumer} cannot run: it accepts "
                    + " and ".join(self.vocabulary),
                    where=module,
                    remedy="quantize it with static activations, or keep it in floating point",
                )
            # float32 loads as it is or, in a bfloat16 model, is rounded by the engine, which changes no scale
            # that the pass has made for such a model.
            scale = weight_scales(module, linear)
            if linear.scheme.is_int4:
                return int4_experts.encode(linear.weight, scale, linear.scheme.group_size or self.row_groups)
            return {"weight": linear.weight, "weight_scale": scale, "weight_offset": np.zeros_like(scale)}
        columns = linear.weight.shape[1]
        input_scale, zero_points = input_parameters(module, linear, dtype)
        offsets = np.ascontiguousarray(np.broadcast_to(zero_points, columns))
        return {
            "weight": linear.weight,
            "deq_scale": deq_scales(module, linear, input_scale),
            "quant_bias": quantized_bias(module, linear.weight, offsets),
            "input_scale": np.full(columns, input_scale, MODEL_DTYPES[dtype]),
            "input_offset": offsets,
        }

    def documents(
        self, linears: Mapping[str, Scheme], names: Iterable[str], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The description: a word by tensor name, sorted; a bias has its layer's. Then the groups of int4.

        An output head that shares the embedding's weight is not stored, and not described.
        """
        described = {module: self.word(scheme) for module, scheme in linears.items()}
        words: dict[str, Any] = {
            name: described.get(name.rpartition(".")[0], FLOAT) for name in sorted(names)
        }
        small = next((scheme for scheme in linears.values() if scheme.is_int4), None)
        entries = {} if small is None else int4_experts.entries(small, self.row_groups)
        return {DESCRIPTION_NAME: words | entries}

    def stored(self, checkpoint: Checkpoint, name: str) -> StoredTensor | None:
        """What holds a tensor of the model, also where one byte of a weight is two numbers."""
        found, scales = super().stored(checkpoint, name), f"{name.removesuffix('.weight')}.weight_scale"
        small = name.endswith(".weight") and scales in checkpoint and checkpoint.dtype(scales) == "U64"
        return unpacked(found) if small else found

    def stored_schemes(self, checkpoint: Checkpoint, modules: Iterable[str]) -> dict[str, Scheme]:
        """By the tensors; the description knows whether groups of int4 weights hold one scale of a row."""
        try:
            described = read_description(checkpoint.folder)
        except CheckpointError:
            # The rules report it.
            described = Description({}, {}, self.words)
        schemes_of = super().stored_schemes(checkpoint, modules)
        for module, scheme in schemes_of.items():
            scales = f"{module}.weight_scale"
            if scheme.is_static:
                schemes_of[module] = static_scheme(checkpoint, module)
            if scales in checkpoint and checkpoint.dtype(scales) == "U64":
                schemes_of[module] = int4_experts.stored_scheme(checkpoint, module, described)
        return schemes_of

    def config_entries(
        self, linears: Mapping[str, Scheme], names: Iterable[str], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The section, which MindFormers alone needs."""
        return {"quantization_config": dict(SECTION)} if self.variant == "mindformers" else {}

    def adapted(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The keys that are published, as MindFormers refuses what it does not know."""
        if self.variant == "mindformers" and config.get("model_type") in MODEL_TYPES:
            return published_form(config)
        return super().adapted(config)

    def open(self, folder: Path) -> GoldenStickCheckpoint:
        """Raises CheckpointError as `GoldenStickCheckpoint.open`."""
        return GoldenStickCheckpoint.open(folder)

    def own_findings(
        self, folder: Path, config: Mapping[str, Any] | None, checkpoint: Checkpoint | None
    ) -> list[Finding]:
        """What the description, `config.json` and the tensors break of the rules of the folder's variant."""
        findings: list[Finding] = []
        description = attempt(findings, lambda: read_description(folder))
        variant = attempt(findings, lambda: read_variant(folder, config or {})) or variant_of(config or {})
        if config is not None:
            findings += check_config(config, variant)
        if checkpoint is not None and description is not None:
            findings += check_names(checkpoint, description, variant)
            findings += GoldenStickFormat(variant)._check_layers(description.tensors, config or {})
            findings += check_tensors(checkpoint, description, model_dtype(config or {}))
        if checkpoint is not None and variant == "mindformers":
            findings += check_stray_files(folder, checkpoint)
        return findings

    def _check_layers(self, description: Mapping[str, str], config: Mapping[str, Any]) -> Iterator[Finding]:
        words: dict[str, str] = {}
        for name, word in description.items():
            module = name.rpartition(".")[0]
            if words.setdefault(module, word) != word:
                yield Finding(
                    name, f"described as {word}, but another tensor of the layer as {words[module]}"
                )
        # An unknown word was reported with its tensor.
        known = {module: word for module, word in words.items() if word in self.words.values()}
        yield from self.check_words(known, config)


def _check_experts(described: Mapping[str, str], config: Mapping[str, Any]) -> Iterator[Finding]:
    """Experts are one grouped product of integers; multi-token-prediction layers are never quantized."""
    layers = config.get("num_hidden_layers")
    experts: dict[str, str] = {}
    for module, word in described.items():
        layer = _LAYER.match(module)
        if layer and type(layers) is int and int(layer[1]) >= layers:
            if word != FLOAT:
                yield Finding(
                    module,
                    f"described as {word}: the engine builds multi-token-prediction layers unquantized",
                )
        elif parent := experts_parent(module):
            experts.setdefault(parent, word)
    if any(word != FLOAT for word in described.values()):
        for parent, word in experts.items():
            if word not in (W8A8_DYNAMIC, W4A8_DYNAMIC):
                yield Finding(
                    parent,
                    f"described as {word}: the engine runs the experts of a quantized model as "
                    f"{W8A8_DYNAMIC} or {W4A8_DYNAMIC} only",
                )
