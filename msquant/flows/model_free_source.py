"""A model whose linear layers are found by the names of its tensors: no modelling code says what they are."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.config_limits import check_numbers
from msquant.checkpoint.float_rows import FLOAT_DTYPES
from msquant.checkpoint.fp8 import SCALE_SUFFIX
from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.mxfp4 import BLOCK_BYTES, BLOCKS_SUFFIX, METHOD, SCALES_SUFFIX, scales_of
from msquant.checkpoint.shard_plan import MAX_SHARD_BYTES
from msquant.checkpoint.stored_matrix import StoredMatrix
from msquant.checkpoint.tensor_spec import TensorSpec
from msquant.errors import ModelError, RecipeError
from msquant.families import expected_shapes, extra_shapes, find_family
from msquant.families.fused_experts import (
    ExpertLayout,
    bias_of,
    experts_of,
    fused_shape,
    is_fused,
    is_packed,
    is_transposed,
    known_layout,
    language_config,
    split_experts,
)
from msquant.flows.source import open_source, require_target
from msquant.formats.dtypes import DTYPE_CODES, MODEL_DTYPES, model_dtype
from msquant.formats.folder_plan import FALLBACK_DTYPE, FolderPlan, plan_folder
from msquant.formats.registry import folder_format, model_format
from msquant.hub.models import resolve_model
from msquant.hub.published import is_published_in_fp8, published_config
from msquant.models.config_json import fp8_block_size
from msquant.recipe.model_free import ModelFreeSettings
from msquant.recipe.recipe import Recipe
from msquant.schemes import FLOAT, Scheme

# transformers' Conv1D keeps the weight of a linear layer as [K, N].
_TRANSPOSED_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_LAYER = re.compile(r"^(?:model\.|language_model\.)*layers\.(\d+)\.")
_PREDICTION = re.compile(r"(^|\.)mtp\.")
# How the source was quantized.
_SECTIONS = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class FoundLinear:
    """A linear layer of the source.

    Attributes:
        matrix: its weight.
        scheme: that the recipe wants it in, not floating point.
        bias: the tensor that holds its bias; None without.
    """

    matrix: StoredMatrix
    scheme: Scheme
    bias: str | None = None


@dataclass(frozen=True)
class Piece:
    """What is written together: a linear layer or another tensor.

    Attributes:
        name: of the layer or the tensor.
        tensors: of the source that it is made of.
    """

    name: str
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class ModelFreeSource:
    """The tensors of a model, sorted by what is done to them.

    Attributes:
        name: of the model, for people.
        config: the content of `config.json`.
        specs: of all tensors, by name, but scales of FP8 blocks and what is left out.
        linears: the linear layers that are quantized, by name.
        kept: why each other tensor stays as it is, by its name.
        places: the shard of each tensor, by name; one for all where the weights are not here.
        folder: where the model lies; None if the published config alone is known.
        checkpoint: its tensors; likewise.
        notes: what the user should know.
    """

    name: str
    config: Mapping[str, Any]
    specs: Mapping[str, TensorSpec]
    linears: Mapping[str, FoundLinear]
    kept: Mapping[str, str]
    places: Mapping[str, str]
    folder: Path | None = None
    checkpoint: Checkpoint | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def dtype(self) -> str:
        """The model's, one of `MODEL_DTYPES`: as `config.json` says, or else that of most of its bytes."""
        for section in (self.config, language_config(self.config)):
            if (found := model_dtype(section)) in MODEL_DTYPES:
                return str(found)
        sizes = {
            name: sum(spec.nbytes for spec in self.specs.values() if spec.dtype == code)
            for name, code in DTYPE_CODES.items()
        }
        return max(sizes, key=lambda name: sizes[name]) if any(sizes.values()) else FALLBACK_DTYPE

    @cached_property
    def groups(self) -> list[list[Piece]]:
        """What is written together, in the order in which it lies in the shards of the source.

        A group is a shard, or as much of a larger one as one usually holds.
        """
        groups: list[list[Piece]] = []
        biases = {linear.bias for linear in self.linears.values()}
        by_tensor: dict[str, list[Piece]] = {}
        for module, linear in self.linears.items():
            tensors = (*linear.matrix.tensors, *([linear.bias] if linear.bias else []))
            by_tensor.setdefault(linear.matrix.tensor, []).append(Piece(module, tensors))
        shard, size = None, 0
        for name, place in self.places.items():
            if name in biases or name not in self.specs:
                continue
            whole = self.specs[name].nbytes
            pieces = by_tensor.get(name, [Piece(name, (name,))])
            for piece in pieces:
                nbytes = whole // len(pieces)
                if shard != place or size + nbytes > MAX_SHARD_BYTES:
                    groups.append([])
                    shard, size = place, 0
                groups[-1].append(piece)
                size += nbytes
        return groups

    def shapes(self, group: Sequence[Piece]) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors that a group is made of, a fused tensor of experts taken apart."""
        shapes: dict[str, tuple[int, ...]] = {}
        for piece in group:
            linear = self.linears.get(piece.name)
            if linear is None:
                shapes[piece.name] = self.specs[piece.name].shape
                continue
            shapes[f"{piece.name}.weight"] = linear.matrix.shape
            if linear.bias:
                shapes[f"{piece.name}.bias"] = linear.matrix.shape[:1]
        return shapes

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        if self.checkpoint is None:
            return sum(spec.nbytes for spec in self.specs.values())
        return sum(self.checkpoint.nbytes(name) for name in self.checkpoint.names())


def open_model_free(
    recipe: Recipe,
    model: str,
    fetch: Callable[[str], Path] | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> ModelFreeSource:
    """Find a model, sort its tensors, and check from the headers that it is whole, as far as they tell.

    A model of a known family is compared with its `config.json`, as for a quantization with calibration.

    Args:
        recipe: what is done to it.
        model: as `resolve_model` takes it.
        fetch: downloads the weights of a hub id that are not here; without it that is an error.
        note: called with what takes a while.

    Raises:
        MsquantError: there is no such model; it is quantized already; a file, a tensor or a dtype is wrong.
    """
    folder = resolve_model(model, fetch, note)
    if folder_format(folder) is not None:
        raise ModelError("is quantized already", where=folder, remedy="start from the model that it was")
    path = folder / "config.json"
    config, checkpoint = read_json(path), None
    if find_family(config.get("model_type")) is not None:
        # An option that msquant does not compute keeps nobody from rounding the weights.
        with suppress(ModelError):
            checkpoint = open_source(str(folder)).checkpoint
    checkpoint = checkpoint or Checkpoint.open(folder)
    specs = {
        name: TensorSpec(name, entry.dtype, entry.shape)
        for file_name, shard in sorted(checkpoint.shards.items())
        for name, entry in sorted(shard.entries.items(), key=lambda item: item[1].offset)
        if checkpoint.weight_map.get(name) == file_name
    }
    found = sort_tensors(recipe, model, config, specs, checkpoint.weight_map, path)
    matrices = {linear.matrix.tensor for linear in found.linears.values()}
    for name, spec in found.specs.items():
        if spec.dtype in FLOAT_DTYPES or (name in matrices and not is_packed(name)):
            checkpoint.expect_weight(name, spec.shape)
    return replace(found, folder=folder, checkpoint=checkpoint)


def sort_tensors(
    recipe: Recipe,
    name: str,
    config: Mapping[str, Any],
    specs: Mapping[str, TensorSpec],
    places: Mapping[str, str],
    where: Path | str = "config.json",
) -> ModelFreeSource:
    """Sort the tensors of a model by their headers alone.

    Args:
        recipe: what is done to it.
        name: of the model, for people.
        config: the content of its `config.json`.
        specs: of all tensors, by name, in the order in which they lie in their shards.
        places: the shard of each tensor.
        where: what errors about `config.json` name.

    Raises:
        ModelError: it is quantized in a way that cannot be started from; its linear layers cannot be told
            from their shapes.
        CheckpointError: a number of `config.json` is too large.
    """
    check_numbers(config, where)
    for section in (config, language_config(config)):
        if not _is_mxfp4(section):
            fp8_block_size(section, where)
    if config.get("model_type") in _TRANSPOSED_MODELS:
        raise ModelError(
            f"model_type {config['model_type']!r} stores linear layers as [inputs, outputs] (Conv1D), which "
            "names do not tell",
            where=where,
            remedy="use a model whose linear layers are [outputs, inputs], as all newer ones are",
        )
    packed = _packed(config, specs, where)
    scales = set(packed.values())
    own = {
        tensor: spec
        for tensor, spec in specs.items()
        if not (tensor.endswith(SCALE_SUFFIX) and tensor.removesuffix(SCALE_SUFFIX) in specs)
        and tensor not in scales
        and (recipe.keeps_predictions or not is_prediction(tensor, config))
    }
    layouts = _expert_layouts(own, config, recipe.model_free, where)
    linears: dict[str, FoundLinear] = {}
    kept: dict[str, str] = {}
    for tensor, spec in own.items():
        reason = _why_float(spec, config, recipe)
        if reason is None:
            reason = _add_linears(linears, spec, own, recipe, layouts)
        if reason is not None and tensor in packed:
            raise ModelError(
                f"{tensor} is in MXFP4, and would stay so ({reason}), which no format here holds",
                where=where,
                remedy="leave the experts out of keep_float, and give them another scheme than FLOAT",
            )
        if reason is not None:
            kept[tensor] = reason
    for linear in linears.values():
        if linear.bias:
            kept.pop(linear.bias, None)
    if not linears:
        raise ModelError(
            "holds no linear layer to quantize, by the names of its tensors",
            where=where,
            remedy="see msquant plan, and name what stays in keep_float",
        )
    order = {tensor: places[tensor] for tensor in own}
    notes = tuple(_notes(config, layouts))
    return ModelFreeSource(name, config, own, linears, kept, order, notes=notes)


def _is_mxfp4(section: Mapping[str, Any]) -> bool:
    """Whether a `config.json`, or a section of it, says that experts are in MXFP4."""
    found = section.get("quantization_config")
    return isinstance(found, Mapping) and found.get("quant_method") == METHOD


def _packed(config: Mapping[str, Any], specs: Mapping[str, TensorSpec], where: Path | str) -> dict[str, str]:
    """The scales of each tensor that holds experts' codes in MXFP4, by name.

    Raises:
        ModelError: codes have no scales, or are in no shape of experts; or none are there, though
            `config.json` says so.
    """
    packed = {name: scales_of(name) for name in specs if is_packed(name)}
    for name, scales in packed.items():
        shape, spec = specs[name].shape, specs.get(scales)
        found = "missing" if spec is None else f"{spec.dtype} {list(spec.shape)}"
        fits = spec is not None and (spec.dtype, spec.shape) == ("U8", shape[:-1])
        if specs[name].dtype != "U8" or not is_fused(name, shape) or shape[-1] != BLOCK_BYTES or not fits:
            raise ModelError(
                f"{name} is {specs[name].dtype} {list(shape)} and {scales} is {found}: in MXFP4 they are U8 "
                f"[experts, outputs, blocks, {BLOCK_BYTES}] and U8 [experts, outputs, blocks]",
                where=where,
                remedy="copy or download the model again; or start from it in bfloat16",
            )
    if _is_mxfp4(config) and not packed:
        raise ModelError(
            f"quantization_config says {METHOD}, and no tensor *{BLOCKS_SUFFIX} with its *{SCALES_SUFFIX} is "
            "here",
            where=where,
            remedy="take quantization_config out of config.json if the weights are bfloat16",
        )
    return packed


def published_model_free(recipe: Recipe) -> ModelFreeSource | None:
    """A model without its weights: the tensors that its published config implies; None if it is not known.

    Raises:
        MsquantError: as `sort_tensors`.
    """
    config = published_config(recipe.model)
    shapes = None if config is None else expected_shapes(config)
    if config is None or shapes is None:
        return None
    block = fp8_block_size(config, "the published config.json")
    specs = {
        name: TensorSpec(name, "F8_E4M3" if block and is_published_in_fp8(name) else "BF16", shape)
        for name, shape in (shapes | extra_shapes(config)).items()
    }
    # A shard a layer, as all that is known of where tensors lie is their names.
    places = {name: found[1] if (found := _LAYER.match(name)) else "" for name in specs}
    return sort_tensors(recipe, recipe.model, config, specs, places)


def is_prediction(tensor: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor is of a multi-token-prediction layer, by its name or its number."""
    count = language_config(config).get("num_hidden_layers")
    found = _LAYER.match(tensor)
    beyond = found is not None and isinstance(count, int) and int(found[1]) >= count
    return beyond or _PREDICTION.search(tensor) is not None


def folder_plans(recipe: Recipe, source: ModelFreeSource) -> list[FolderPlan]:
    """Every tensor and shard that the recipe makes of a source, for each of its formats in order.

    Raises:
        RecipeError: a format cannot express it, or its server does not serve it.
    """
    formats = [model_format(name, source.config) for name in recipe.formats]
    dtype = source.dtype
    if not all(dtype in form.dtypes for form in formats):
        dtype = FALLBACK_DTYPE
    config = _unquantized(source.config)
    plans = []
    for form in formats:
        schemes = {
            tensor.removesuffix(".weight"): FLOAT
            for tensor in source.kept
            if tensor.endswith(".weight") and len(source.specs[tensor].shape) == 2
        }
        for module, linear in source.linears.items():
            schemes[module] = form.fitting(module, linear.scheme)
            if problem := form.shape_problem(module, linear.matrix.shape, schemes[module]):
                raise RecipeError(
                    f"is {schemes[module]}: {problem}",
                    where=module,
                    remedy="choose another scheme for it in the recipe's quantization section",
                )
        plans.append(
            plan_folder(
                [source.shapes(group) for group in source.groups],
                schemes,
                config,
                dtype,
                format_name=form.name,
                carried=_carried(source, dtype),
            )
        )
    require_target(recipe, plans)
    return plans


def _unquantized(config: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` without what it says, in whatever section, of how the source was quantized."""
    return {
        key: _unquantized(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _SECTIONS
    }


def _carried(source: ModelFreeSource, dtype: str) -> dict[str, str]:
    """The tensors that keep their dtype: all but FP8, and but the model's own dtype where it changes."""
    replaced = {DTYPE_CODES[source.dtype]} - {DTYPE_CODES[dtype]} | {"F64", "F8_E4M3", "F8_E8M0"}
    return {
        name: source.specs[name].dtype for name in source.kept if source.specs[name].dtype not in replaced
    }


def _why_float(spec: TensorSpec, config: Mapping[str, Any], recipe: Recipe) -> str | None:
    """Why a tensor is no linear layer, or is one that stays in floating point; None for another."""
    if not all(spec.shape):
        return "empty"
    fused = is_fused(spec.name, spec.shape)
    packed = fused and is_packed(spec.name)
    if spec.dtype not in FLOAT_DTYPES and not spec.name.endswith(".weight") and not packed:
        return f"stored as {spec.dtype}"
    if len(spec.shape) != 2 and not fused:
        return "no matrix"
    if not fused and not spec.name.endswith(".weight"):
        return "not called weight"
    if pattern := recipe.model_free.kept_by(spec.name.removesuffix(".weight")):
        return f"keep_float: {pattern}"
    if recipe.prediction_layers == "float" and is_prediction(spec.name, config):
        return "prediction_layers: float"
    if spec.shape[0] == language_config(config).get("vocab_size") and not fused:
        return "a row for each of vocab_size tokens"
    return None


def _add_linears(
    linears: dict[str, FoundLinear],
    spec: TensorSpec,
    specs: Mapping[str, TensorSpec],
    recipe: Recipe,
    layouts: Mapping[str, ExpertLayout],
) -> str | None:
    """Add the linear layers in a tensor, or say why it stays as it is."""
    fused = is_fused(spec.name, spec.shape)
    if fused:
        shape = fused_shape(spec.name, spec.shape)
        found = split_experts(spec.name, shape, layouts[experts_of(spec.name)])
        bias = bias_of(spec.name)
    else:
        module = spec.name.removesuffix(".weight")
        found = {module: StoredMatrix(spec.name, (spec.shape[0], spec.shape[1]))}
        bias = f"{module}.bias"
    outputs: tuple[int, ...] = spec.shape[:1]
    if fused:
        outputs = (shape[0], shape[2 if layouts[experts_of(spec.name)].transposed else 1])
    if bias in specs and specs[bias].shape != outputs:
        raise ModelError(
            f"{bias} is {list(specs[bias].shape)}, and {spec.name} has {list(outputs)} outputs",
            remedy="put the layer into keep_float",
        )
    if twice := next((module for module in found if module in linears), None):
        raise ModelError(
            f"{twice} is in {spec.name} and in {linears[twice].matrix.tensor}",
            remedy="use a checkpoint that holds each layer once",
        )
    schemes = {module: recipe.quantization.scheme(module) for module in found}
    if all(scheme.is_float for scheme in schemes.values()):
        return "schemes: FLOAT"
    for module, scheme in schemes.items():
        if scheme.is_float:
            raise RecipeError(
                f"is FLOAT, and other experts in {spec.name} are not: all of a layer run as one",
                where=module,
                remedy="name all experts of a layer in the recipe's schemes, as in mlp.experts.",
            )
        linears[module] = FoundLinear(found[module], scheme, bias if bias in specs else None)
    return None


def _expert_layouts(
    specs: Mapping[str, TensorSpec],
    config: Mapping[str, Any],
    settings: ModelFreeSettings,
    where: Path | str,
) -> dict[str, ExpertLayout]:
    """How the experts lie that are in one tensor, by what their names begin with."""
    fused = [spec for spec in specs.values() if is_fused(spec.name, spec.shape)]
    if not fused:
        return {}
    known, hidden = known_layout(config), language_config(config).get("hidden_size")
    alternating = known.alternating if settings.gate_up == "auto" else settings.gate_up == "alternating"
    if settings.expert_layout != "auto":
        told: set[bool | None] = {settings.expert_layout == "inputs-first"}
    else:
        # One that is square in every tensor of the model is told by its type alone.
        shaped = ((spec.name, fused_shape(spec.name, spec.shape)) for spec in fused)
        told = {is_transposed(name, shape, hidden) for name, shape in shaped} - {None}
        told = told or {known.transposed} - {None}
    if len(told) != 1:
        shapes = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in fused[:2])
        raise ModelError(
            f"{shapes}: these shapes and hidden_size {hidden} do not tell outputs of an expert from inputs",
            where=where,
            remedy="say it in the recipe: model_free: {expert_layout: outputs-first}, or inputs-first; or "
            "put experts into keep_float",
        )
    layout = ExpertLayout(told.pop(), alternating)
    return {experts_of(spec.name): layout for spec in fused}


def _notes(config: Mapping[str, Any], layouts: Mapping[str, ExpertLayout]) -> Iterator[str]:
    kind = config.get("model_type")
    if find_family(kind) is None:
        yield (
            f"msquant does not know model_type {kind!r}: linear layers are found by the names of tensors, "
            "and nothing checks what the model computes, whether a tensor is missing, or what server has it"
        )
    for layout in list(layouts.values())[:1]:
        order = "[inputs, outputs]" if layout.transposed else "[outputs, inputs]"
        rows = "row by row" if layout.alternating else "gate in the first half"
        yield f"experts that lie in one tensor are taken as {order} each, gate and up {rows}"
