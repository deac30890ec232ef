"""msModelSlim's format for vllm-ascend, as one of the formats.

Read in vllm-ascend (quantization/modelslim_config.py: `get_linear_quant_type`, `is_layer_skipped_ascend`;
methods/registry.py, w4a8.py; attention/mla_v1.py: `process_weights_after_loading`) and msModelSlim
(ascendv1.py).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.tensor_spec import TensorSpec
from msquant.checkpoint.weights import CacheScale, QuantizedLinear
from msquant.errors import CheckpointError
from msquant.families import expected_shapes, extra_shapes
from msquant.families.base import positive
from msquant.formats.ascend import fa_quant, four_bits, kv_cache, quarot
from msquant.formats.ascend.layout import (
    DESCRIPTION_NAME,
    FLOAT,
    PREFILL_PARTS,
    QUANT_METHOD,
    SERVED_DTYPES,
    WORDS,
    deq_scale_code,
    folded_bias,
    read_description,
)
from msquant.formats.ascend.reader import AscendCheckpoint
from msquant.formats.ascend.rules import (
    check_config,
    check_four_bits,
    check_head,
    check_tensors,
    check_words,
)
from msquant.formats.base import Format
from msquant.formats.description import Description
from msquant.formats.dtypes import model_dtype
from msquant.formats.folder_rules import Finding, StoredTensor, attempt
from msquant.formats.fused_layers import check_fused_schemes, experts_parent
from msquant.formats.int4_rows import check_one_size, unpacked
from msquant.formats.scales import (
    all_positive,
    deq_scales,
    input_parameters,
    rounded_reciprocal,
    weight_scales,
)
from msquant.formats.stored import stored_scheme
from msquant.schemes import C8, W4A8_DYNAMIC, W8A8_DYNAMIC, W8A8_MIX, Scheme


@dataclass(frozen=True)
class AscendFormat(Format):
    """The tensors of `layout`, and a description of each; vllm-ascend reorders rotary rows itself.

    A section in `config.json` would be read instead of the description.
    """

    name = QUANT_METHOD
    engine = "vllm-ascend"
    server = "vllm-ascend"
    marker = DESCRIPTION_NAME
    dtypes = SERVED_DTYPES
    words = WORDS
    # msModelSlim keeps the bias beside `quant_bias` so.
    bias_in_float32 = True
    folded = "{}, which it folds into the attention,"
    expert_schemes = "per-token activations (W8A8_DYNAMIC, W4A8_DYNAMIC)"
    in_groups = frozenset({W4A8_DYNAMIC})
    caches = frozenset({C8})
    holds_rotation = True

    variant: str = "ascendV1"
    rotation: Callable[[], NDArray[np.float32]] | None = None

    @classmethod
    def is_in(cls, folder: Path, config: Mapping[str, Any]) -> bool:
        """Whether the description is msModelSlim's, which says its `version` or `model_quant_type`.

        Any other file of that name is golden-stick's, which vLLM-MindSpore reads under it too.
        """
        try:
            described = read_json(folder / DESCRIPTION_NAME)
        except CheckpointError:
            return False
        return "version" in described or "model_quant_type" in described

    def rotated_by(self, rotation: Callable[[], NDArray[np.float32]] | None) -> "AscendFormat":
        """As msModelSlim's QuaRot says it."""
        return replace(self, rotation=rotation)

    def extra_shards(self) -> dict[str, dict[str, NDArray[Any]]]:
        """The matrix of a rotation."""
        return {} if self.rotation is None else quarot.shards(self.rotation())

    def fitting(self, module: str, scheme: Scheme) -> Scheme:
        """Int4 weights are for routed experts alone, and static inputs for everything else."""
        if scheme == W8A8_MIX and experts_parent(module):
            return W8A8_DYNAMIC
        return W8A8_DYNAMIC if scheme == W4A8_DYNAMIC and not experts_parent(module) else scheme

    def shape_problem(self, module: str, shape: tuple[int, ...], scheme: Scheme) -> str | None:
        """Experts with int4 weights are packed by rows."""
        return four_bits.shape_problem(module, shape, scheme) if scheme.is_int4 else None

    def check(self, linears: Mapping[str, Scheme], config: Mapping[str, Any]) -> Iterator[Finding]:
        """Check that vllm-ascend can run the layers of a model in the given schemes together."""
        yield from super().check(linears, config)
        yield from check_one_size(linears)
        yield from kv_cache.check_schemes(linears, config)
        yield from fa_quant.check_schemes(linears, config)
        small = {module: scheme for module, scheme in linears.items() if scheme.is_int4}
        shapes = (expected_shapes(dict(config)) or {}) | extra_shapes(config) if small else {}
        for module, scheme in small.items():
            shape = shapes.get(f"{module}.weight")
            if not self.takes(scheme):
                continue
            if not experts_parent(module):
                yield Finding(
                    module,
                    f"is {scheme}: no version of vllm-ascend computes that for other layers than routed "
                    "experts",
                )
            elif shape is not None and (problem := self.shape_problem(module, shape, scheme)):
                yield Finding(module, f"is {scheme}: {problem}")

    def cache_specs(self, module: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> list[TensorSpec]:
        """As `encode_cache` makes them."""
        if fa_quant.makes_latent(module):
            return fa_quant.specs(module, positive(dict(config), "num_attention_heads"))
        return kv_cache.specs(module, shape[0])

    def owner(self, name: str) -> str:
        """Also of scales that are named after the attention block."""
        return fa_quant.owner(name) if fa_quant.is_part(name) else super().owner(name)

    def encode_cache(self, module: str, cache: CacheScale, dtype: str) -> dict[str, NDArray[Any]]:
        """See `kv_cache.encode`, and `fa_quant.encode` of latent attention."""
        encode = kv_cache.encode if cache.queries is None else fa_quant.encode
        return encode(module, cache, dtype)

    def part_specs(
        self, module: str, shape: tuple[int, ...], scheme: Scheme, dtype: str
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        """As `encode_parts` makes them."""
        rows = shape[:1]
        if scheme.is_int4:
            return four_bits.part_specs(module, shape, scheme)
        if not scheme.is_static:
            scales = "F32", (*rows, 1)
            return {"weight": ("I8", shape), "weight_scale": scales, "weight_offset": scales}
        return {
            "weight": ("I8", shape),
            "quant_bias": ("I32", rows),
            "input_scale": ("F32", (1,)),
            "input_offset": ("F32", (1,)),
            "deq_scale": (deq_scale_code(dtype), rows),
            **({} if scheme.prefill is None else dict.fromkeys(PREFILL_PARTS, ("F32", (*rows, 1)))),
        }

    def encode_parts(
        self, module: str, linear: QuantizedLinear, dtype: str, bias: NDArray[Any] | None
    ) -> dict[str, NDArray[Any]]:
        """The parts of a layer in any scheme.

        The engine holds `input_scale` in the model's dtype, so it is rounded first and `deq_scale` is
        computed from the rounded value: it then divides and multiplies by the same number.

        Returns:
            W8A8, with s_x the rounded input scale and zp its zero point: `weight` int8 [N, K]; `deq_scale` =
            s_x s_w float32 [N], in a float16 model int64 with its bits; `quant_bias` = round(bias /
            deq_scale) - sum_k zp W int32 [N]; `input_scale` = s_x and `input_offset` = zp float32 [1].
            W8A8_DYNAMIC and W8A16: `weight` int8 [N, K]; `weight_scale` = s_w and `weight_offset` = 0,
            float32 [N, 1]. W8A8_MIX: the tensors of both. W4A8_DYNAMIC: what `four_bits.encode` returns.

        Raises:
            CheckpointError: a scale, or in the model's dtype its reciprocal, is not positive and finite; the
                zero point is no int8; a sum does not fit int32; or as `four_bits.encode`.
        """
        if linear.scheme.is_int4:
            return four_bits.encode(module, linear.weight, weight_scales(module, linear))
        if not linear.is_static:
            scale = weight_scales(module, linear).reshape(-1, 1)
            return {"weight": linear.weight, "weight_scale": scale, "weight_offset": np.zeros_like(scale)}
        input_scale, zero_points = input_parameters(module, linear, dtype)
        if not all_positive(rounded_reciprocal(np.array([input_scale]), dtype)):
            raise CheckpointError(
                f"the reciprocal of its input scale {input_scale:.4g} is infinite or 0 in {dtype}, in which "
                "the engine keeps it",
                where=module,
                remedy="quantize the model in bfloat16, or keep this layer in floating point",
            )
        deq_scale = deq_scales(module, linear, input_scale)
        bits = deq_scale.view(np.int32).astype(np.int64)
        scale = weight_scales(module, linear).reshape(-1, 1)
        mixed = () if linear.scheme.prefill is None else (scale, np.zeros_like(scale))
        return {
            "weight": linear.weight,
            "quant_bias": folded_bias(module, linear.weight, int(zero_points[0]), deq_scale, bias),
            "input_scale": np.array([input_scale], np.float32),
            "input_offset": zero_points.astype(np.float32),
            "deq_scale": bits if deq_scale_code(dtype) == "I64" else deq_scale,
            **dict(zip(PREFILL_PARTS, mixed, strict=False)),
        }

    def documents(
        self, linears: Mapping[str, Scheme], names: Iterable[str], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The description.

        A bias is `FLOAT` even of a quantized layer, as msModelSlim has it. The output head is described even
        where it shares the embedding's weight and is not stored: vllm-ascend asks for it before it ties the
        two.
        """
        described = {module: self.word(scheme) for module, scheme in linears.items()}
        description = {"lm_head.weight": FLOAT}
        for name in names:
            module, _, part = name.rpartition(".")
            description[name] = FLOAT if part == "bias" else described.get(module, FLOAT)
        words = set(description.values())
        cached, latent = kv_cache.described(description), fa_quant.described(description)
        description |= cached | latent
        # The order of msModelSlim's QUANT_TYPE_PRIORITY, which does not have W4A8_DYNAMIC.
        order = ("W8A8", "W8A8_MIX", "W8A8_DYNAMIC", "W8A16", "W4A8_DYNAMIC", FLOAT)
        model_type = next(word for word in order if word in words)
        small = next((scheme for scheme in linears.values() if scheme.is_int4), None)
        entries = {"model_quant_type": model_type, "metadata": {}, **four_bits.entries(small)}
        if cached:
            entries |= dict.fromkeys(kv_cache.ENTRIES, kv_cache.WORD)
        if self.rotation is not None:
            entries |= quarot.ENTRIES
        if latent:
            entries[fa_quant.ENTRY] = fa_quant.KIND
        return {DESCRIPTION_NAME: {**dict(sorted(description.items())), **entries}}

    def stored(self, checkpoint: Checkpoint, name: str) -> StoredTensor | None:
        """What holds a tensor of the model, also where one byte of a weight is two numbers."""
        found = super().stored(checkpoint, name)
        small = name.endswith(".weight") and f"{name.removesuffix('.weight')}.scale_bias" in checkpoint
        return unpacked(found) if small else found

    def stored_schemes(self, checkpoint: Checkpoint, modules: Iterable[str]) -> dict[str, Scheme]:
        """By the tensors, and by the description where those are alike.

        A description that cannot be read is left to the rules.
        """
        try:
            described = read_description(checkpoint.folder)
        except CheckpointError:
            described = Description({}, {}, WORDS)
        schemes = {module: stored_scheme(checkpoint, module) for module in modules}
        for module, scheme in schemes.items():
            said = described.scheme(module)
            alike = said is not None and said.is_static == scheme.is_static and not said.is_float
            if not scheme.is_float and said is not None and alike:
                schemes[module] = said
        return kv_cache.with_caches(checkpoint, schemes)

    def open(self, folder: Path) -> AscendCheckpoint:
        """Raises CheckpointError as `AscendCheckpoint.open`."""
        return AscendCheckpoint.open(folder)

    def open_prefill(self, folder: Path) -> AscendCheckpoint | None:
        """W8A8_MIX is computed per token by every engine that does not take another one's cache."""
        described = read_description(folder).tensors.values()
        return AscendCheckpoint.open(folder, prefill=True) if WORDS[W8A8_MIX] in described else None

    def residual_rotation(self, folder: Path, hidden_size: int) -> NDArray[np.float32] | None:
        """What msModelSlim's QuaRot has folded in. Raises CheckpointError as `quarot.global_rotation`."""
        return quarot.global_rotation(folder, read_description(folder).entries, hidden_size)

    def own_findings(
        self, folder: Path, config: Mapping[str, Any] | None, checkpoint: Checkpoint | None
    ) -> list[Finding]:
        """What the description, `config.json` and the tensors break of vllm-ascend's rules."""
        findings: list[Finding] = []
        description = attempt(findings, lambda: read_description(folder))
        if config is not None:
            findings += check_config(config)
        if checkpoint is not None and description is not None:
            modules = [
                name.removesuffix(".weight") for name in description.tensors if name.endswith(".weight")
            ]
            schemes = {module: description.scheme(module) for module in modules}
            findings += check_words(description, checkpoint.weight_map)
            findings += check_head(description)
            # A draft model would be turned with it.
            hidden = (config or {}).get("hidden_size")
            attempt(findings, lambda: quarot.global_rotation(folder, description.entries, hidden))
            findings += check_four_bits(description)
            # One that is unknown was reported with its tensor.
            known = {module: scheme for module, scheme in schemes.items() if scheme is not None}
            # Those in int4 were served by versions before: `serving_rules` says by which.
            older = {m for m, scheme in known.items() if scheme.is_int4 and not experts_parent(m)}
            findings += self.check({m: s for m, s in known.items() if m not in older}, config or {})
            findings += check_fused_schemes({module: str(scheme) for module, scheme in known.items()})
            findings += check_one_size(known)
            findings += check_tensors(checkpoint, description, model_dtype(config or {}))
            cached = kv_cache.with_caches(checkpoint, known)
            findings += kv_cache.check_schemes(cached, config or {})
            findings += fa_quant.check_schemes(cached, config or {})
            findings += kv_cache.check_folder(checkpoint, description, config or {})
            findings += fa_quant.check_folder(checkpoint, description)
        return findings
