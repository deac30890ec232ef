"""What a folder will hold, to the byte, from the shapes of the source model alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.shard_plan import MAX_SHARD_BYTES, PlannedShard, plan_shards, weight_map
from msquant.checkpoint.shard_stream import shard_bytes
from msquant.checkpoint.tensor_spec import TensorSpec
from msquant.errors import CheckpointError, RecipeError
from msquant.families.row_orders import RopeRows
from msquant.formats.base import Format
from msquant.formats.dtypes import DTYPE_CODES, stored_dtype
from msquant.formats.registry import DEFAULT_FORMAT, FormatName, format_names, model_format
from msquant.formats.servers import ServedModel
from msquant.schemes import FLOAT, Scheme

Shape = tuple[int, ...]

# The first two say how the source was quantized; the last names Python files that are not copied.
_DROPPED = ("quantization_config", "compression_config", "auto_map")

# Those that servers have kernels for, the one that takes the fewest scales first.
_GROUP_SIZES = (256, 128, 64, 32)

FALLBACK_DTYPE = "bfloat16"
"""What a model is stored in whose own dtype a format does not take."""


@dataclass(frozen=True)
class FolderPlan:
    """The tensors, shards and description of a folder that is to be written.

    Attributes:
        format: the format it is in.
        dtype: what floating-point tensors are stored in.
        groups: the shards of each group of tensors, for example of one decoder layer.
        linears: the scheme of every linear layer, by module.
        config: the content of the source's `config.json`.
        row_orders: whose rows are stored in another order.
    """

    format: Format
    dtype: str
    groups: tuple[tuple[PlannedShard, ...], ...]
    linears: Mapping[str, Scheme]
    config: Mapping[str, Any]
    row_orders: RopeRows

    @property
    def variant(self) -> str:
        """What it is made for."""
        return self.format.variant

    @property
    def shards(self) -> Iterator[PlannedShard]:
        """All shards, in order."""
        return (shard for group in self.groups for shard in group)

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """The file name of each tensor's shard, by tensor name."""
        return weight_map(self.shards)

    @cached_property
    def documents(self) -> dict[str, Any]:
        """The JSON files beside the shards that only this format has, by file name."""
        return self.format.documents(self.linears, self.weight_map, self.config)

    @cached_property
    def config_entries(self) -> dict[str, Any]:
        """What the format puts into `config.json`."""
        return self.format.config_entries(self.linears, self.weight_map, self.config)

    @cached_property
    def written_config(self) -> dict[str, Any]:
        """The folder's `config.json`."""
        config = {key: value for key, value in self.config.items() if key not in _DROPPED}
        config["dtype" if "dtype" in config else "torch_dtype"] = self.dtype
        return {**self.format.adapted(config), **self.config_entries}

    @property
    def served_model(self) -> ServedModel:
        """What servers will decide by."""
        return ServedModel(self.format.name, self.variant, self.written_config, self.linears)

    @cached_property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors: `total_size` of the index."""
        return sum(shard.nbytes for shard in self.shards)

    @cached_property
    def file_bytes(self) -> int:
        """Bytes of all shards on disk, with their headers."""
        return sum(self.group_bytes)

    @cached_property
    def group_bytes(self) -> tuple[int, ...]:
        """The same of each group."""
        return tuple(sum(shard_bytes(shard.specs) for shard in group) for group in self.groups)


def plan_folder(
    groups: Sequence[Mapping[str, Shape]],
    linears: Mapping[str, Scheme],
    config: Mapping[str, Any],
    dtype: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    format_name: FormatName = DEFAULT_FORMAT,
    carried: Mapping[str, str] | None = None,
    scale_dtype: str | None = None,
    rotation: Callable[[], NDArray[np.float32]] | None = None,
) -> FolderPlan:
    """Plan a folder.

    Args:
        groups: shapes of the source's tensors by name, one mapping for each decoder layer in order, then the
            multi-token-prediction layers, then the rest. Scales of FP8 blocks are left out of the result.
        linears: the scheme of each linear layer by module, also of those that stay in floating point.
        config: the source's `config.json`; decides the format's variant.
        dtype: the source's; one that the format does not take is replaced by `FALLBACK_DTYPE`.
        max_shard_bytes: of the tensors of a shard; a larger tensor has a shard of its own.
        format_name: of the format to write.
        carried: tensors that are not quantized and keep the safetensors dtype that they have, by name.
        scale_dtype: as `Format.keeping` takes it.
        rotation: as `Format.rotated_by` takes it.

    Raises:
        CheckpointError: a linear layer has no matrix in the source, or its bias does not fit.
        RecipeError: the consumer cannot run the layers in these schemes, or groups do not divide a layer's
            inputs; names it and what it accepts.
        OutputError: a tensor is in two groups.
    """
    plain = {module: scheme.without_cache for module, scheme in linears.items()}
    form = model_format(format_name, config).made_for(plain).keeping(scale_dtype).rotated_by(rotation)
    stored = dtype if dtype in form.dtypes else FALLBACK_DTYPE
    _check_runs(form, linears, config)
    _check_groups(groups, linears)
    missing = dict.fromkeys(linears)
    kept = carried or {}
    specs: list[list[TensorSpec]] = []
    for shapes in groups:
        specs.append([])
        for name, shape in shapes.items():
            if name.endswith("_scale_inv"):
                continue
            module, _, part = name.rpartition(".")
            scheme = linears.get(module, FLOAT)
            has_bias = f"{module}.bias" in shapes
            if module in linears and part == "weight":
                missing.pop(module, None)
                _check_linear(name, shape, shapes.get(f"{module}.bias"))
            if scheme.is_float:
                code = kept.get(name) or DTYPE_CODES[stored_dtype(name, stored)]
                specs[-1].append(TensorSpec(name, code, tuple(shape)))
            elif part == "weight":
                specs[-1] += form.linear_specs(module, tuple(shape), scheme, stored, has_bias)
            elif part != "bias":
                raise CheckpointError(f"a linear layer has no part {part!r}", where=name)
            if part == "weight" and scheme.cache is not None:
                specs[-1] += form.cache_specs(module, tuple(shape), config)
    if missing:
        raise CheckpointError(
            f"{next(iter(missing))} is to be quantized, but the source has no such weight"
            + (f" (nor those of {len(missing) - 1} other layers)" if len(missing) > 1 else ""),
            remedy="check that config.json and the weights are of the same model",
        )
    planned = plan_shards(specs, max_shard_bytes)
    return FolderPlan(
        form, stored, tuple(map(tuple, planned)), dict(linears), config, form.row_orders(config)
    )


def _check_linear(name: str, shape: Shape, bias: Shape | None) -> None:
    if len(shape) != 2:
        raise CheckpointError(f"has shape {list(shape)}, a matrix [N, K] is expected", where=name)
    if bias is not None and tuple(bias) != tuple(shape[:1]):
        raise CheckpointError(f"has shape {list(shape)}, but its bias {list(bias)}", where=name)


def _check_groups(groups: Sequence[Mapping[str, Shape]], linears: Mapping[str, Scheme]) -> None:
    """Check that the groups of every layer divide its inputs; the sizes that it names divide all layers'."""
    sizes_of = {
        module: scheme.weights.group_size
        for module, scheme in linears.items()
        if scheme.weights is not None and scheme.weights.group_size is not None
    }
    if not sizes_of:
        return
    shapes = {name: shape for part in groups for name, shape in part.items()}
    inputs = {module: shapes[f"{module}.weight"][1] for module in sizes_of if _is_matrix(shapes, module)}
    for module, columns in inputs.items():
        scheme, size = linears[module], sizes_of[module]
        if columns % size:
            common = gcd(*inputs.values())
            fits = [each for each in _GROUP_SIZES if common % each == 0] or [gcd(columns, size)]
            sizes = " or ".join(filter(None, (", ".join(map(str, fits[:-1])), str(fits[-1]))))
            instead = f"groups of {sizes} fit: {scheme.in_groups(fits[0])}; or " if fits[0] > 1 else ""
            raise RecipeError(
                f"is {scheme}, but groups of {size} do not divide its {columns} inputs",
                where=module,
                remedy=f"{instead}keep it in floating point: put {{{module}: FLOAT}} at the head of the "
                "recipe's schemes",
            )


def _is_matrix(shapes: Mapping[str, Shape], module: str) -> bool:
    return len(shapes.get(f"{module}.weight", ())) == 2


def _check_runs(form: Format, linears: Mapping[str, Scheme], config: Mapping[str, Any]) -> None:
    for finding in form.check(linears, config):
        others = [
            name
            for name in format_names()
            if name != form.name and not any(model_format(name, config).check(linears, config))
        ]
        instead = f", or write another format: {', '.join(others)}" if others else ""
        raise RecipeError(
            f"{form.consumer} cannot serve this: {finding.problem}",
            where=finding.where,
            remedy=f"change the schemes in the recipe's quantization section{instead}",
        )
