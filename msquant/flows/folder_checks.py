"""What is checked of a model folder before it is loaded: that nobody changed it, and that it fits."""

from math import prod
from pathlib import Path

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.memory import available_memory
from msquant.errors import CheckpointError, EngineError
from msquant.formats.folder_rules import check_manifest
from msquant.formats.registry import folder_format
from msquant.models.config import ModelConfig

HASHED_BYTES = 1_000_000_000
"""Shards up to this size together are hashed unasked: that takes about a second at most."""

BASE_BYTES = 400_000_000
"""Of a process that has loaded a tokenizer, and of what a model computes with beside its weights."""

_SHARD = ".safetensors"


def require_intact(folder: Path, verify: bool | None = None) -> None:
    """Compare the shards with what `msquant.json` says of them; a folder without one is taken as it is.

    Settings and the tokenizer are not compared: people change them, and see what they did.

    Args:
        folder: the model.
        verify: compare each shard's sha256, and not its size alone; None for shards up to `HASHED_BYTES`
            together.

    Raises:
        CheckpointError: a shard is missing or is not what was written; or the manifest is damaged.
    """
    if verify is None:
        verify = sum(path.stat().st_size for path in folder.glob(f"*{_SHARD}")) <= HASHED_BYTES
    for finding in check_manifest(folder, verify, _SHARD):
        raise CheckpointError(
            finding.problem,
            where=folder / finding.where,
            remedy="copy or download the folder again, or repeat its `msquant quantize` with --overwrite; "
            f"all that is wrong with it: msquant inspect {folder} --verify",
        )


def require_memory(folder: Path, config: ModelConfig) -> None:
    """Estimate what a CPU needs to run a folder, and compare it with the memory that is left.

    Raises:
        EngineError: it does not fit; names both numbers.
        CheckpointError: the checkpoint cannot be opened.
    """
    needed, available = BASE_BYTES + weight_bytes(Checkpoint.open(folder), config), available_memory()
    if available is not None and needed > available:
        raise EngineError(
            f"the model needs about {needed / 1e9:,.1f} GB of memory, {available / 1e9:,.1f} GB is free",
            where=folder,
            remedy="close other programs, use a machine with more memory, or run it on NPUs with "
            "--engine vllm-mindspore",
        )


def weight_bytes(checkpoint: Checkpoint, config: ModelConfig) -> int:
    """Bytes that the weights take on a CPU, by the headers alone: one for an int8 or int4 value, else 4.

    Weights that alone are quantized, and those in groups, are computed in floating point. An embedding of its
    own is read by rows, and multi-token-prediction layers are not computed.
    """
    from msquant.kernels import onednn

    table = f"{config.family.names.embedding}.weight"
    widened = 1 if onednn.load_int8() else 4
    skipped = tuple(f"{config.family.prediction_name(index)}." for index in config.prediction_indices)
    names = [
        name
        for name in checkpoint.names()
        if not name.startswith(skipped) and (name != table or config.tie_word_embeddings)
    ]
    form = folder_format(checkpoint.folder)
    schemes = form.stored_schemes(checkpoint, {name.rpartition(".")[0] for name in names}) if form else {}
    alone = {
        module
        for module, scheme in schemes.items()
        if scheme.is_weight_only or (scheme.weights is not None and scheme.weights.group_size is not None)
    }
    held = [form.stored(checkpoint, f"{module}.weight") for module in alone] if form else []

    def nbytes(name: str) -> int:
        if checkpoint.dtype(name) != "I8":
            return 4 * prod(checkpoint.shape(name))
        weight = form.stored(checkpoint, name) if form else None
        return widened * prod(checkpoint.shape(name) if weight is None else weight.shape)

    return sum(4 * prod(weight.shape) for weight in held if weight is not None) + sum(
        nbytes(name) for name in names if name.rpartition(".")[0] not in alone
    )
