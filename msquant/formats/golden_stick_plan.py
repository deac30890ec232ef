"""What a golden-stick folder will hold, to the byte, from the shapes of the source model alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from msquant.checkpoint.rope_rows import RopeRows, model_rope_rows
from msquant.checkpoint.shard_plan import MAX_SHARD_BYTES, PlannedShard, plan_shards, weight_map
from msquant.checkpoint.shard_stream import shard_bytes
from msquant.checkpoint.tensor_spec import TensorSpec
from msquant.checkpoint.weights import Scheme
from msquant.errors import CheckpointError, RecipeError
from msquant.formats.golden_stick_layout import DTYPE_CODES, SERVED_DTYPES, describe, stored_dtype
from msquant.formats.golden_stick_schemes import DESCRIBED, Variant, check_schemes, variant_of

Shape = tuple[int, ...]


@dataclass(frozen=True)
class FolderPlan:
    """The tensors, shards and description of a folder that is to be written.

    Attributes:
        variant: the backend it is for.
        dtype: what floating-point tensors are stored in, `bfloat16` or `float16`.
        groups: the shards of each group of tensors, for example of one decoder layer.
        linears: the scheme of every linear layer, by module.
        rope_rows: whose rows are stored in another order.
    """

    variant: Variant
    dtype: str
    groups: tuple[tuple[PlannedShard, ...], ...]
    linears: Mapping[str, Scheme]
    rope_rows: RopeRows

    @property
    def shards(self) -> Iterator[PlannedShard]:
        """All shards, in order."""
        return (shard for group in self.groups for shard in group)

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """The file name of each tensor's shard, by tensor name."""
        return weight_map(self.shards)

    @cached_property
    def description(self) -> dict[str, str]:
        """The content of `quantization_description.json`."""
        static = [module for module, scheme in self.linears.items() if scheme == "static"]
        dynamic = [module for module, scheme in self.linears.items() if scheme == "dynamic"]
        return describe(self.weight_map, static, dynamic)

    @cached_property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors: `total_size` of the index."""
        return sum(shard.nbytes for shard in self.shards)

    @cached_property
    def file_bytes(self) -> int:
        """Bytes of all shards on disk, with their headers."""
        return sum(shard_bytes(shard.specs) for shard in self.shards)


def plan_folder(
    groups: Sequence[Mapping[str, Shape]],
    linears: Mapping[str, Scheme],
    config: Mapping[str, Any],
    dtype: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> FolderPlan:
    """Plan a folder.

    Args:
        groups: shapes of the source's tensors by name, one mapping for each decoder layer in order, then the
            multi-token-prediction layers, then the rest. Scales of FP8 blocks are left out of the result.
        linears: the scheme of each linear layer by module, also of those that stay in floating point.
        config: the source's `config.json`; decides the variant.
        dtype: the source's; a float32 model is written in bfloat16, which the engine takes.
        max_shard_bytes: of the tensors of a shard; a larger tensor has a shard of its own.

    Raises:
        CheckpointError: a linear layer has no matrix in the source, or its bias does not fit.
        RecipeError: the backend cannot run the layers in these schemes; names it and what it accepts.
        OutputError: a tensor is in two groups.
    """
    variant = variant_of(config)
    stored = dtype if dtype in SERVED_DTYPES else "bfloat16"
    _check_runs(linears, variant, config)
    missing = dict.fromkeys(linears)
    specs: list[list[TensorSpec]] = []
    for shapes in groups:
        specs.append([])
        for name, shape in shapes.items():
            if name.endswith("_scale_inv"):
                continue
            module, _, part = name.rpartition(".")
            scheme = linears.get(module, "float")
            if module in linears and part == "weight":
                missing.pop(module, None)
                _check_linear(name, shape, shapes.get(f"{module}.bias"))
            if scheme == "float" or part == "bias":
                specs[-1].append(TensorSpec(name, DTYPE_CODES[stored_dtype(name, stored)], tuple(shape)))
            elif part == "weight":
                specs[-1] += _quantized(module, tuple(shape), scheme, stored)
            else:
                raise CheckpointError(f"a linear layer has no part {part!r}", where=name)
    if missing:
        raise CheckpointError(
            f"{next(iter(missing))} is to be quantized, but the source has no such weight"
            + (f" (nor those of {len(missing) - 1} other layers)" if len(missing) > 1 else ""),
            remedy="check that config.json and the weights are of the same model",
        )
    rope_rows = model_rope_rows(config) if variant == "mindformers" else RopeRows({}, 0)
    planned = plan_shards(specs, max_shard_bytes)
    return FolderPlan(variant, stored, tuple(map(tuple, planned)), dict(linears), rope_rows)


def _quantized(module: str, shape: Shape, scheme: Scheme, dtype: str) -> list[TensorSpec]:
    rows, columns = shape[:1], shape[1:]
    parts: list[tuple[str, str, Shape]] = [("weight", "I8", shape)]
    if scheme == "dynamic":
        parts += [("weight_scale", "F32", rows), ("weight_offset", "F32", rows)]
    else:
        parts += [("deq_scale", "F32", rows), ("quant_bias", "I32", rows)]
        parts += [("input_scale", DTYPE_CODES[dtype], columns), ("input_offset", "I8", columns)]
    return [TensorSpec(f"{module}.{part}", code, part_shape) for part, code, part_shape in parts]


def _check_linear(name: str, shape: Shape, bias: Shape | None) -> None:
    if len(shape) != 2:
        raise CheckpointError(f"has shape {list(shape)}, a matrix [N, K] is expected", where=name)
    if bias is not None and tuple(bias) != tuple(shape[:1]):
        raise CheckpointError(f"has shape {list(shape)}, but its bias {list(bias)}", where=name)


def _check_runs(linears: Mapping[str, Scheme], variant: Variant, config: Mapping[str, Any]) -> None:
    described = {module: DESCRIBED[scheme] for module, scheme in linears.items()}
    for finding in check_schemes(described, variant, config):
        raise RecipeError(
            f"the {variant} backend of vLLM-MindSpore cannot serve this: {finding.problem}",
            where=finding.where,
            remedy="change skip, weight_only and dynamic in the recipe's quantization section",
        )
