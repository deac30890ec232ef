"""A quantized folder of any format, opened and checked as a whole model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from msquant.checkpoint.folder_files import require_own_files
from msquant.checkpoint.reader import Checkpoint
from msquant.checkpoint.weights import WeightSource
from msquant.errors import CheckpointError
from msquant.formats.base import Format
from msquant.formats.dtypes import DTYPE_CODES, cast, stored_dtype
from msquant.formats.folder_rules import check_manifest
from msquant.formats.registry import folder_format, refuse_other_formats
from msquant.models.config import ModelConfig
from msquant.models.config_json import read_config
from msquant.quantization.layer_schemes import layer_linears
from msquant.schemes import FLOAT, Scheme
from msquant.source import prediction_layers, refuse_unknown_tensors


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
    """

    folder: Path
    format: Format
    config: ModelConfig
    checkpoint: Checkpoint
    weights: WeightSource
    linears: Mapping[str, Scheme]
    extras: Sequence[Mapping[str, tuple[int, ...]]]


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
    modules = [m for index in range(config.num_hidden_layers) for m in layer_linears(config, index)]
    linears = form.stored_schemes(checkpoint, modules)
    extras = prediction_layers(config, checkpoint)
    for shapes in extras:
        for name, shape in shapes.items():
            checkpoint.expect(name, shape)
    known = {*config.shapes, *(name for shapes in extras for name in shapes)}
    known |= {name for name in checkpoint.names() if name.rpartition(".")[0] in linears}
    refuse_unknown_tensors(checkpoint, known)
    return QuantizedFolder(folder, form, config, checkpoint, form.open(folder), linears, extras)


def _expect(form: Format, checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    """As `Checkpoint.expect`, also where another tensor holds the one of that name."""
    found = form.stored(checkpoint, name)
    if found is None or found.name == name:
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
        if source.linears.get(module, FLOAT).is_float:
            wanted = DTYPE_CODES[stored_dtype(name, dtype)]
            exact = checkpoint.dtype(name) == wanted or wanted == "F32"
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
