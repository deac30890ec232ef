"""The flow of `msquant export`: a quantized folder of one format into another, without quantizing again.

One linear layer, or a block of rows of another tensor, is in memory at a time. What is written is what was
read, as the folder's server computes it: int8 weights and zero points are equal, scales to a rounding of
float32; where a format cannot express that, the export is refused before it begins.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.disk import require_free_space
from msquant.checkpoint.folder_files import require_own_files
from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.output_folder import OutputFolder
from msquant.checkpoint.results import MANIFEST_NAME, is_result, remember_folder
from msquant.checkpoint.weights import WeightSource, with_cache
from msquant.checkpoint.writer import file_sha256
from msquant.errors import CheckpointError, RecipeError
from msquant.flows.source import model_groups, prediction_layers, refuse_unknown_tensors
from msquant.formats.base import Format
from msquant.formats.dtypes import DTYPE_CODES, cast, stored_dtype
from msquant.formats.folder_plan import FolderPlan, plan_folder
from msquant.formats.folder_rules import StoredTensor, check_manifest
from msquant.formats.folder_stream import FolderStream
from msquant.formats.registry import FormatName, folder_format, model_format, refuse_other_formats
from msquant.interrupts import check_interrupt
from msquant.models.config import ModelConfig
from msquant.models.config_json import read_config
from msquant.quantization.layer_schemes import layer_linears
from msquant.schemes import FLOAT, Scheme


@dataclass(frozen=True)
class QuantizedFolder:
    """A quantized folder of any format, checked as far as headers tell.

    Attributes:
        folder: where it is.
        format: what it is in.
        config: the model's shape.
        checkpoint: its tensors as they are stored.
        weights: its tensors as they are computed.
        linears: the scheme of every linear layer in the decoder layers, by module.
        extras: the tensors of each multi-token-prediction layer it holds.
        without_cache: whether scales of a key-value cache that it holds are left out.
    """

    folder: Path
    format: Format
    config: ModelConfig
    checkpoint: Checkpoint
    weights: WeightSource
    linears: Mapping[str, Scheme]
    extras: Sequence[Mapping[str, tuple[int, ...]]]
    without_cache: bool = False


def open_quantized(folder: Path) -> QuantizedFolder:
    """Open a quantized folder and check from its headers that the model is whole.

    Raises:
        CheckpointError: there is no such folder, it is not quantized or in a format that is not read here, or
            a file or tensor is missing or of a wrong shape.
        ModelError: the architecture is not supported.
    """
    if not folder.is_dir():
        raise CheckpointError("there is no such folder", where=folder, remedy="check the path")
    require_own_files(folder)
    form = folder_format(folder)
    if form is None:
        refuse_other_formats(folder)
        raise CheckpointError(
            "is not quantized", where=folder, remedy="quantize it: msquant quantize FOLDER --format ..."
        )
    config, checkpoint = read_config(folder), Checkpoint.open(folder)
    for name, shape in config.shapes.items():
        _expect(form, checkpoint, name, shape)
    extras = prediction_layers(config, checkpoint)
    for shapes in extras:
        for name, shape in shapes.items():
            _expect(form, checkpoint, name, shape)
    layers = range(config.num_hidden_layers + len(extras))
    linears = form.stored_schemes(checkpoint, [m for index in layers for m in layer_linears(config, index)])
    known = {*config.shapes, *(name for shapes in extras for name in shapes)}
    known |= {name for name in checkpoint.names() if form.owner(name) in linears}
    refuse_unknown_tensors(checkpoint, known)
    return QuantizedFolder(folder, form, config, checkpoint, form.open(folder), linears, extras)


def _without_caches(source: QuantizedFolder, cache: str) -> QuantizedFolder:
    """A folder with keys and values in floating point.

    Raises:
        RecipeError: something else than `none` is asked for.
        CheckpointError: they are so already.
    """
    if cache != "none":
        raise RecipeError(
            f"is {cache!r}: an export makes no scales of a cache",
            where="--cache",
            remedy="write none, or quantize the model with --cache int8",
        )
    linears = {module: scheme.without_cache for module, scheme in source.linears.items()}
    if linears == source.linears:
        raise CheckpointError(
            "keeps keys and values in floating point already",
            where=source.folder,
            remedy="leave out --cache none",
        )
    return replace(source, linears=linears, without_cache=True)


def _expect(form: Format, checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    """As `Checkpoint.expect`, also where another tensor holds the one of that name."""
    found = form.stored(checkpoint, name)
    as_named = name in checkpoint and found == StoredTensor(name, checkpoint.shape(name))
    if found is None or as_named:
        checkpoint.expect(name, shape)
    elif found.shape != tuple(shape):
        raise CheckpointError(
            f"{found.name} holds a weight of shape {list(found.shape)}, config.json says {list(shape)}",
            where=checkpoint.shard_path(found.name),
            remedy="use the config.json that belongs to these weights",
        )


def require_unchanged(folder: Path) -> None:
    """Read every file that a manifest lists; raise CheckpointError for the first that differs."""
    for finding in check_manifest(folder, verify_hashes=True):
        raise CheckpointError(
            finding.problem, where=folder / finding.where, remedy="copy or download the folder again"
        )


def require_exact(source: QuantizedFolder) -> None:
    """Raise CheckpointError for a number that would be rounded in any format.

    msquant stores input scales, biases and all that is not quantized in the model's dtype; another tool's may
    be wider.
    """
    dtype, checkpoint = source.config.dtype, source.checkpoint
    for name in checkpoint.parameters():
        module, _, part = name.rpartition(".")
        if part.startswith("kv_cache_") or source.format.owner(name) != module:
            # Scales of caches. Only one format has them: they are never converted, but left out at most.
            continue
        if source.linears.get(module, FLOAT).is_float:
            wanted = DTYPE_CODES[stored_dtype(name, dtype)]
            exact = checkpoint.dtype(name) == wanted or wanted == "F32" or _fits(checkpoint, name, dtype)
        elif part in ("input_scale", "bias"):
            values = checkpoint.raw(name).astype(np.float32)
            exact = np.array_equal(cast(name, values, dtype).astype(np.float32), values)
        else:
            exact = True
        if not exact:
            raise CheckpointError(
                f"is stored as {checkpoint.dtype(name)} with more digits than {dtype} holds, the model's "
                "dtype: it would be rounded",
                where=f"{source.folder}, {name}",
                remedy="quantize the model again with msquant",
            )


# Of a tensor that is carried through in floating point.
BLOCK_BYTES = 64 << 20


def _fits(checkpoint: Checkpoint, name: str, dtype: str) -> bool:
    """Whether a dtype holds every number of a tensor that is stored in another one."""
    blocks = (values for _, values in checkpoint.row_blocks(name, BLOCK_BYTES))
    return all(np.array_equal(cast(name, values, dtype).astype(np.float32), values) for values in blocks)


# What a manifest says of its own folder; the rest is carried over.
_OWN = ("format", "variant", "files", "exported_from")

# What a result follows from.
_ORIGIN = ("versions", "recipe", "source", "calibration", "device")


@dataclass(frozen=True)
class ExportResult:
    """A written folder.

    Attributes:
        folder: where it is.
        format: what it is in.
        variant: what it is made for.
        output_bytes: of all its tensors.
        seconds: wall time that writing it took.
    """

    folder: Path
    format: FormatName
    variant: str
    output_bytes: int
    seconds: float


@dataclass(frozen=True)
class ExportProgress:
    """Callbacks of a running export; each may be left out.

    Attributes:
        stage: called with a line that says what begins.
        parts: called with the number of parts of a folder: its layers, and what is outside of them.
        part: called with the number of parts that are written.
    """

    stage: Callable[[str], None] = lambda text: None
    parts: Callable[[int], None] = lambda count: None
    part: Callable[[int], None] = lambda done: None


def export(
    folder: Path,
    formats: Sequence[FormatName],
    *,
    output: Path | None = None,
    cache: str | None = None,
    overwrite: bool = False,
    progress: ExportProgress | None = None,
) -> list[ExportResult]:
    """Write a quantized folder in other formats, each into a folder of its own.

    Args:
        folder: in one of our formats; one of another tool needs no manifest.
        formats: what to write.
        output: the folder to make, with several formats that of the first; see `output_folders`. Without it
            each is called `<folder>-<format>`.
        cache: none to leave out the scales of an int8 key-value cache; None to keep them where there are any,
            which a format that has none refuses.
        overwrite: replace earlier results of msquant.
        progress: callbacks.

    Raises:
        MsquantError: the folder is not quantized, incomplete, or was changed since it was written; a format
            cannot express it, or is what it is in; an output exists or has no room. Nothing is left then.
    """
    progress = progress or ExportProgress()
    progress.stage(f"reading {folder}")
    source = open_quantized(folder)
    if cache is not None:
        source = _without_caches(source, cache)
    plans = [plan_export(source, name) for name in formats]
    targets = output_folders(output, formats) if output else [_beside(folder, name) for name in formats]
    results = []
    with ExitStack() as stack:
        opened = [stack.enter_context(OutputFolder(target, overwrite=overwrite)) for target in targets]
        require_free_space(opened[0].path, sum(plan.file_bytes for plan in plans))
        progress.stage("checking the files against the manifest")
        require_unchanged(source.folder)
        require_exact(source)
        for plan, target in zip(plans, opened, strict=True):
            started = time.monotonic()
            progress.stage(f"writing {plan.format.name} for {plan.format.consumer}")
            write_export(source.weights, source.folder, plan, target.path, progress)
            written = target.finish()
            remember_folder(written, "export")
            seconds = time.monotonic() - started
            results.append(ExportResult(written, plan.format.name, plan.variant, plan.tensor_bytes, seconds))
    return results


@contextmanager
def other_folders(
    output: Path, plans: Sequence[FolderPlan], manifest: Mapping[str, Any], *, overwrite: bool
) -> Iterator[list[tuple[FolderPlan, OutputFolder]]]:
    """Open the folders of a result's other formats, to be written from it when it is complete.

    Args:
        output: the folder of the first format.
        plans: of all formats.
        manifest: the result's, as far as it is known. A folder that the same job finished before it was
            killed is left as it is, unless `overwrite`.
        overwrite: replace earlier results of msquant.

    Raises:
        OutputError: a folder is taken, in use, or cannot be written.
    """
    targets = output_folders(output, [plan.format.name for plan in plans])
    with ExitStack() as stack:
        yield [
            (plan, stack.enter_context(OutputFolder(target, overwrite=overwrite)))
            for plan, target in list(zip(plans, targets, strict=True))[1:]
            if overwrite or not _is_of(target, plan.format.name, manifest)
        ]


def _is_of(folder: Path, name: FormatName, manifest: Mapping[str, Any]) -> bool:
    if not is_result(folder):
        return False
    found = read_json(folder / MANIFEST_NAME)
    wanted = json.loads(json.dumps({key: manifest[key] for key in _ORIGIN}))
    return found.get("format") == name and all(found.get(key) == value for key, value in wanted.items())


def output_folders(output: Path, formats: Sequence[FormatName]) -> list[Path]:
    """The folder of each format: `output` itself is the first one's, the others' have their names added."""
    return [output, *(_beside(output, name) for name in formats[1:])]


def _beside(folder: Path, name: FormatName) -> Path:
    folder = folder.absolute()
    return folder.with_name(f"{folder.name}-{name}")


def plan_export(source: QuantizedFolder, name: FormatName) -> FolderPlan:
    """The plan of a folder in another format.

    Raises:
        CheckpointError: it is in that format already, or that cannot express it; says why.
    """
    form = model_format(name, source.config.raw)
    if name == source.format.name and not source.without_cache:
        raise CheckpointError(
            f"is in the {name} format already", where=source.folder, remedy="name another format"
        )
    if source.config.dtype not in form.dtypes:
        raise CheckpointError(
            f"is in {source.config.dtype}: {form.consumer} takes {' or '.join(form.dtypes)}, and rounding to "
            "that would change the model",
            where=source.folder,
            remedy=f"quantize the model again with --format {name}",
        )
    try:
        groups, config = model_groups(source.config, source.extras), source.config
        wider = source.format.scale_dtype(source.checkpoint)
        return plan_folder(
            groups, source.linears, config.raw, config.dtype, format_name=name, scale_dtype=wider
        )
    except RecipeError as error:
        raise CheckpointError(
            f"cannot be exported as {name}: {error.what}",
            where=f"{source.folder}, {error.where}",
            remedy=f"quantize the model again with a recipe for {name}, or choose another format",
        ) from error


def write_export(
    weights: WeightSource,
    origin: Path,
    plan: FolderPlan,
    target: Path,
    progress: ExportProgress | None = None,
) -> None:
    """Write a planned folder from a finished one.

    Args:
        weights: the tensors of the finished one.
        origin: the finished folder: its manifest, `config.json` and tokenizer are carried over.
        plan: what is written.
        target: an empty folder.
        progress: callbacks.

    Raises:
        MsquantError: a tensor cannot be read, or does not fit the format; or the disk is full.
    """
    progress = progress or ExportProgress()
    stream = FolderStream(target, plan)
    progress.parts(len(plan.groups))
    for index in range(len(plan.groups)):
        with stream.group(index) as shards:
            for name, shape in _pieces(plan, index):
                check_interrupt()
                if name in plan.linears:
                    linear = weights.linear(name)
                    if plan.linears[name].cache is None:
                        linear = with_cache(linear, None)
                    shards.linear(name, linear)
                    continue
                step = max(1, BLOCK_BYTES // (4 * prod(shape[1:])))
                for start in range(0, shape[0], step):
                    rows = np.arange(start, min(start + step, shape[0]))
                    shards.tensor_rows(name, start, weights.rows(name, rows))
        progress.part(index + 1)
    stream.finish(origin, export_manifest(origin))


def export_manifest(origin: Path) -> dict[str, Any]:
    """The manifest of what a folder is exported to, without what the format adds.

    Args:
        origin: the folder it is made of. Its manifest is carried over; without one, only this is said.
    """
    path = origin / MANIFEST_NAME
    manifest = read_json(path) if path.is_file() else {}
    form = folder_format(origin)
    exported_from = {
        "format": form.name if form else None,
        "variant": manifest.get("variant"),
        "manifest_sha256": file_sha256(path) if manifest else None,
        "msquant": version("msquant"),
    }
    carried = {key: value for key, value in manifest.items() if key not in _OWN}
    return {"msquant": version("msquant"), **carried, "exported_from": exported_from}


def _pieces(plan: FolderPlan, index: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """What a group of the plan is made of, in its order: linear layers by module, or tensors with a shape."""
    seen = set()
    for shard in plan.groups[index]:
        for spec in shard.specs:
            module = plan.format.owner(spec.name)
            if module not in plan.linears:
                yield spec.name, spec.shape
            elif module not in seen:
                seen.add(module)
                yield module, ()
