"""A model to quantize and what will become of it, from `config.json` and the shards' headers alone."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from msquant.algorithms.base import Algorithm
from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.errors import CheckpointError, ModelError, RecipeError
from msquant.flows.serving_checks import parallelism
from msquant.flows.workers import layers_ahead
from msquant.formats.base import Format
from msquant.formats.folder_plan import FALLBACK_DTYPE, FolderPlan, plan_folder
from msquant.formats.registry import model_format, read_only_name
from msquant.formats.verdicts import best_refusal, servers_of
from msquant.hub.models import resolve_model
from msquant.models.config import ModelConfig
from msquant.models.config_json import read_config
from msquant.models.rotated import RotatedWeights, untied
from msquant.models.rotation import ROTATIONS
from msquant.quantization.layer_schemes import model_schemes
from msquant.recipe.recipe import Recipe

# Samples are computed in batches of about this many tokens: enough for efficient matrix products, few enough
# for the search to give up a losing candidate early. Wide layers are efficient with fewer.
BATCH_TOKENS, WIDE_BATCH_TOKENS, WIDE = 512, 128, 2048

# Old checkpoints store what follows from the config.
_COMPUTED = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class Source:
    """A model to quantize, checked from its headers alone.

    Attributes:
        folder: where it lies.
        config: its shape.
        checkpoint: its tensors.
        extras: the tensors of each multi-token-prediction layer it holds.
        weights: the tensors as they are to be quantized.
    """

    folder: Path
    config: ModelConfig
    checkpoint: Checkpoint
    extras: list[dict[str, tuple[int, ...]]]
    weights: Checkpoint | RotatedWeights

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.checkpoint.nbytes(name) for name in self.checkpoint.names())


def open_source(
    model: str,
    fetch: Callable[[str], Path] | None = None,
    note: Callable[[str], None] = lambda text: None,
    *,
    predictions: bool = True,
) -> Source:
    """Find a model and check from the headers alone that it is whole and that its config describes it.

    Args:
        model: as `resolve_model` takes it.
        fetch: downloads the weights of a hub id that are not here; without it that is an error.
        note: called with what takes a while.
        predictions: whether to take its multi-token-prediction layers; without, it is as if it had none.

    Raises:
        MsquantError: there is no such model; or a file, tensor, dtype or shape is wrong, those of the scales
            of FP8 included.
    """
    folder = resolve_model(model, fetch, note)
    config = read_config(folder)
    _refuse_quantized(config, str(folder))
    checkpoint = with_prediction_ends(config, Checkpoint.open(folder))
    for name, shape in config.shapes.items():
        checkpoint.expect_weight(name, shape)
    extras = prediction_layers(config, checkpoint)
    for shapes in extras:
        for name, shape in shapes.items():
            checkpoint.expect_weight(name, shape)
    refuse_unknown_tensors(checkpoint, config.shapes.keys() | {name for shapes in extras for name in shapes})
    return Source(folder, config, checkpoint, extras if predictions else [], checkpoint)


def _refuse_quantized(config: ModelConfig, where: str) -> None:
    """Raise ModelError for a model that another tool has quantized, in a format that is read alone."""
    if (name := read_only_name(config.raw)) is not None:
        raise ModelError(
            f"is quantized already, as {name}",
            where=where,
            remedy="start from the unquantized checkpoint; msquant export converts it as it is",
        )


def open_model(
    recipe: Recipe,
    source: str | None,
    fetch: Callable[[str], Path] | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> Source:
    """The model that a recipe, or in its place `source`, names; says so first. Arguments as `open_source`."""
    name = source or recipe.model
    note(f"reading {name}")
    return open_source(name, fetch, note, predictions=recipe.keeps_predictions)


def rotated(source: Source, policy: Algorithm) -> Source:
    """A model in the basis that a policy wants it in, with an output head of its own if it is rotated."""
    rotation = ROTATIONS[policy.rotation]
    if rotation is None:
        return source
    weights = RotatedWeights(source.config, source.checkpoint, rotation)
    return replace(source, config=untied(source.config), weights=weights)


def with_prediction_ends(config: ModelConfig, checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint whose multi-token-prediction layers have the ends that they share with the model.

    Servers look for them in the layer (vllm-ascend's description of a tensor that is not there is an error).
    """
    family, names = config.family, config.family.names
    if not family.shares_prediction_ends:
        return checkpoint
    head = names.embedding if config.tie_word_embeddings else names.head
    shared = {names.prediction_embedding: names.embedding, names.prediction_head: head}
    aliases = {}
    held = len(prediction_layers(config, checkpoint))
    for layer in map(family.layer_name, range(config.num_hidden_layers, config.num_hidden_layers + held)):
        for own, end in shared.items():
            if f"{layer}.{own}.weight" not in checkpoint:
                aliases[f"{layer}.{own}.weight"] = f"{end}.weight"
    return checkpoint.with_aliases(aliases) if aliases else checkpoint


def prediction_layers(config: ModelConfig, checkpoint: Checkpoint) -> list[dict[str, tuple[int, ...]]]:
    """Shapes of the tensors of each multi-token-prediction layer that a checkpoint holds at least in part.

    Many conversions leave these layers out, but none leaves out a part of one, or one before another.
    """
    held = [any(name in checkpoint for name in shapes) for shapes in config.extra_layers]
    return list(
        config.extra_layers[: max((place for place, is_held in enumerate(held, 1) if is_held), default=0)]
    )


def quantized_predictions(recipe: Recipe, config: ModelConfig, extras: Sequence[object]) -> int:
    """How many multi-token-prediction layers are quantized as the decoder layers are: all, or none.

    Args:
        recipe: what is asked for; all of its formats hold the same numbers.
        config: the model's shape.
        extras: the multi-token-prediction layers that are written.
    """
    if recipe.prediction_layers != "quantized" or config.family.prediction_block:
        return 0
    if _float_predictions(recipe, config):
        return 0
    return len(extras)


def _float_predictions(recipe: Recipe, config: ModelConfig) -> list[Format]:
    """The formats of a recipe whose server builds multi-token-prediction layers in floating point only."""
    forms = (model_format(name, config.raw) for name in recipe.formats)
    return [form for form in forms if form.predictions_in_float]


def prediction_note(recipe: Recipe, config: ModelConfig, extras: Sequence[object]) -> str | None:
    """What is to be said of multi-token-prediction layers that a format keeps from being quantized.

    Args:
        recipe: what is asked for.
        config: the model's shape.
        extras: the multi-token-prediction layers that are written.
    """
    forms = _float_predictions(recipe, config)
    if not extras or recipe.prediction_layers != "quantized":
        return None
    if block := config.family.prediction_block:
        return (
            f"{block}, which predicts a further token, stays in floating point: msquant does not compute it "
            f"for {config.family.model_type}"
        )
    if not forms:
        return None
    others = [name for name in recipe.formats if name not in {form.name for form in forms}]
    alone = f" and so does {', '.join(others)}, which holds the same numbers" if others else ""
    return (
        f"{config.family.layer_name(config.num_hidden_layers)}, which predicts a further token, stays in "
        f"floating point: {forms[0].consumer} builds it so{alone}; other formats alone quantize it"
    )


def refuse_unknown_tensors(checkpoint: Checkpoint, known: Collection[str]) -> None:
    """Raise CheckpointError for a tensor that is not among the known ones and no scale of one."""
    unknown = [name for name in checkpoint.parameters() if name not in known and not name.endswith(_COMPUTED)]
    if unknown:
        others = f" and {len(unknown) - 1} other tensors are" if unknown[1:] else " is"
        raise CheckpointError(
            f"{unknown[0]}{others} here, which config.json does not ask for",
            where=checkpoint.shard_path(unknown[0]),
            remedy="use the config.json that belongs to these weights",
        )


def folder_plans(recipe: Recipe, source: Source) -> list[FolderPlan]:
    """Every tensor and shard that the recipe will make of a source, for each of its formats in order.

    Raises:
        RecipeError: the policy contradicts itself, or a format cannot express it.
    """
    return shapes_plans(recipe, source.config, source.extras)


def folder_plan(recipe: Recipe, source: Source) -> FolderPlan:
    """The plan of the recipe's first format. Raises as `folder_plans`."""
    return folder_plans(recipe, source)[0]


def shapes_plans(
    recipe: Recipe, config: ModelConfig, extras: Sequence[Mapping[str, tuple[int, ...]]]
) -> list[FolderPlan]:
    """As `folder_plans`, of a model that is known by its config alone.

    Args:
        recipe: what is done to it.
        config: its shape.
        extras: the tensors of each multi-token-prediction layer that comes with it.

    Raises:
        RecipeError: the policy contradicts itself, the model cannot be rotated, the format cannot express it,
            or no version of the format's server would serve it by the recipe's serving section.
    """
    _refuse_quantized(config, recipe.model)
    _require_all_seen(recipe, config)
    if ROTATIONS[recipe.quantization.rotation] is not None:
        config = _rotated_shape(recipe.quantization, config, extras)
    groups = model_groups(config, extras)
    schemes = model_schemes(config, recipe.quantization, quantized_predictions(recipe, config, extras))
    formats = [model_format(name, config.raw) for name in recipe.formats]
    # One form for all: a format that takes the model's dtype is not given another one than its neighbour.
    common = all(config.dtype in form.dtypes for form in formats)
    dtype = config.dtype if common else FALLBACK_DTYPE
    rotation = _written_rotation(recipe, formats, config.hidden_size)
    plans = [
        plan_folder(groups, schemes, config.raw, dtype, format_name=name, rotation=rotation)
        for name in recipe.formats
    ]
    require_target(recipe, plans)
    return plans


def _written_rotation(
    recipe: Recipe, formats: Sequence[Format], size: int
) -> Callable[[], NDArray[np.float32]] | None:
    """What makes the matrix that is written. Raises RecipeError where there is none, or no place for it."""
    policy = recipe.quantization
    if not policy.rotation_matrix:
        return None
    rotation = ROTATIONS[policy.rotation]
    if rotation is None or not any(form.holds_rotation for form in formats):
        without = "nothing is rotated" if rotation is None else f"{recipe.formats[0]} has no place for it"
        raise RecipeError(
            f"is true, and {without}",
            where="quantization.rotation_matrix",
            remedy="write rotation: hadamard and format: ascend, or leave it out",
        )
    return rotation(size).matrix


def _require_all_seen(recipe: Recipe, config: ModelConfig) -> None:
    """Raise RecipeError for calibration samples in which attention would not see all earlier tokens."""
    seen, length = config.family.most_tokens(config.raw), recipe.calibration.sequence_length
    if seen is not None and length > seen[1]:
        entry, most = seen
        raise RecipeError(
            f"is {length}: in so long a sequence {config.family.model_type} attends to {most} tokens "
            f"({entry}) that an indexer picks, which is not computed here; up to {most} it attends to all",
            where="calibration.sequence_length",
            remedy=f"calibrate with sequences of {most} tokens or fewer: --sequence-length {most}",
        )


def _rotated_shape(
    policy: Algorithm, config: ModelConfig, extras: Sequence[Mapping[str, tuple[int, ...]]]
) -> ModelConfig:
    """The shape of a rotated model. Raises RecipeError if it cannot be rotated."""
    if norms := config.family.names.output_norms:
        raise RecipeError(
            f"rotation: {policy.rotation} is not possible with norms behind the blocks of a layer "
            f"({', '.join(norms)}): no linear is behind them that their weights could be folded into",
            where="quantization.rotation",
            remedy="write rotation: none",
        )
    if extras:
        raise RecipeError(
            f"rotation: {policy.rotation} is not possible with multi-token-prediction layers "
            f"({config.family.prediction_name(config.num_hidden_layers)}): they normalize what the last norm "
            "has scaled, and rotation folds that norm's weight into the output head",
            where="quantization.rotation",
            remedy="write rotation: none, or leave these layers out with prediction_layers: none",
        )
    return untied(config)


def untying_note(config: ModelConfig, plan: FolderPlan) -> str | None:
    """What is to be said of an output head that the source has none of; None if there is no such.

    Args:
        config: the source's shape, or one whose `tie_word_embeddings` is the source's.
        plan: of the folder.
    """
    name = f"{config.family.names.head}.weight"
    heads = (spec for shard in plan.shards for spec in shard.specs if spec.name == name)
    head = next(heads, None)
    if head is None or name in config.shapes:
        return None
    return (
        f"the rotation unties the output head from the embeddings: {name} takes {head.nbytes / 1e6:,.1f} MB "
        "that the source does not have"
    )


def require_target(recipe: Recipe, plans: Sequence[FolderPlan]) -> None:
    """Check that for every format a version of the server that it is for would serve the folder.

    Args:
        recipe: its serving section says how the model is split.
        plans: of its formats.

    Raises:
        RecipeError: none would; names the server and the key or layer that stands against it.
    """
    split = parallelism(recipe.serving)
    for plan in plans:
        model = plan.served_model
        found = best_refusal(servers_of(model, plan.format.server), model, split)
        if found is not None:
            server, refusal = found
            raise RecipeError(
                f"{server} with tensor_parallel_size {split.tensor} cannot serve this as {model.format}: "
                f"{refusal.problem}",
                where=refusal.where,
                remedy=refusal.remedy,
            )


def model_groups(
    config: ModelConfig, extras: Sequence[Mapping[str, tuple[int, ...]]]
) -> list[Mapping[str, tuple[int, ...]]]:
    """Shapes of a model's tensors as they are written together: each layer's, then those of the ends."""
    layers = [config.layer_shapes(index) for index in range(config.num_hidden_layers)]
    return [*layers, *extras, {name: config.shapes[name] for name in config.end_names}]


def hidden_bytes(
    config: ModelConfig, tokens: int, predicted: int = 0, workers: int = 1, first: int = 0
) -> int:
    """What hidden states take on disk: a layer's inputs and outputs, and what goes between tasks on it.

    Args:
        config: the model's shape.
        tokens: calibration tokens.
        predicted: quantized multi-token-prediction layers, whose inputs are made of those that are kept.
        workers: processes, each with states within a layer; between layers there are more then.
        first: tokens of the first batch.
    """
    within, ahead = 2 if predicted else 1, layers_ahead(workers)
    tokens_between = tokens * (2 + within if workers == 1 else ahead + 1 + workers * within)
    if workers > 1 and config.experts is not None:
        # What the experts of one layer add to every token, and of each layer that is begun the states between
        # its blocks and what its quantized experts add to the first batch.
        each = config.experts.per_token + bool(config.experts.shared)
        tokens_between += each * tokens + ahead * (tokens + (each + 2) * first)
    return tokens_between * config.hidden_size * 4


def batch_tokens(config: ModelConfig) -> int:
    """How many tokens are computed together."""
    return WIDE_BATCH_TOKENS if config.hidden_size >= WIDE else BATCH_TOKENS


def batch_samples(config: ModelConfig, length: int) -> int:
    """How many samples of so many tokens are computed together."""
    return max(1, batch_tokens(config) // length)
