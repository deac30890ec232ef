"""Which file of a folder holds which tensor."""

import reprlib
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

from msquant.checkpoint.file_names import INDEX_NAME, SINGLE_NAME, is_file_name
from msquant.checkpoint.folder_files import require_own_files
from msquant.checkpoint.json_file import read_json
from msquant.errors import CheckpointError

# msModelSlim has names of its own, over the years `quant_model_weight_w8a8` and `quant_model_weights`.
_PATTERNS = (
    INDEX_NAME,
    SINGLE_NAME,
    "quant_model_weight*.safetensors.index.json",
    "quant_model_weight*.safetensors",
)

MAX_SHARDS = 10_000
"""Of an index; each is opened. The largest published models have some 300."""

_PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def find_weights(folder: Path) -> Path:
    """The index of a folder's shards, which ends in `.json`, or the only shard where there is no index.

    Where the folder says which files it is made of, one of these is returned, there or not.

    Raises:
        CheckpointError: there is neither; says what is there instead. Or as `require_own_files`.
    """
    listed = require_own_files(folder)
    for pattern in _PATTERNS:
        if listed is None:
            found = [path for path in sorted(folder.glob(pattern)) if path.is_file()]
        else:
            found = [folder / name for name in sorted(listed) if fnmatchcase(name, pattern)]
        if len(found) == 1:
            return found[0]
    raise _no_checkpoint(folder)


def read_weight_map(path: Path) -> dict[str, str]:
    """The shard of each tensor by its name, from an index.

    Raises:
        CheckpointError: it is damaged, or names something else than a safetensors file of the folder.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("weight_map, from tensor names to shards, is missing or empty", where=path)
    for tensor, name in weight_map.items():
        # Shards themselves may be links out of the folder: the Hugging Face cache is made of them.
        if not isinstance(name, str) or not _is_file_name(name):
            raise CheckpointError(
                f"{tensor} is said to be in {reprlib.repr(name)}, "
                "which is not the name of a file in this folder",
                where=path,
                remedy="do not use this checkpoint: its index points outside of its folder",
            )
        if not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{tensor} is in {name}: only safetensors files are read", where=path, remedy=_CONVERT
            )
    if (count := len(set(weight_map.values()))) > MAX_SHARDS:
        raise CheckpointError(f"names {count} shards, at most {MAX_SHARDS} are read", where=path)
    return weight_map


# An index names a shard once for each of its tensors.
_is_file_name = lru_cache(MAX_SHARDS)(is_file_name)

_CONVERT = "convert the checkpoint with transformers: model.save_pretrained(folder, safe_serialization=True)"


def _no_checkpoint(folder: Path) -> CheckpointError:
    for pattern in _PICKLE_PATTERNS:
        if pickled := sorted(folder.glob(pattern)):
            return CheckpointError(
                f"only pickle files such as {pickled[0].name} are here: msquant reads safetensors only, "
                "because loading a pickle can run code",
                where=folder,
                remedy=_CONVERT,
            )
    if stray := sorted(folder.glob("*.safetensors")):
        return CheckpointError(
            f"{stray[0].name} is here, but {INDEX_NAME} that says which tensors are where is missing",
            where=folder,
            remedy=f"copy or download {INDEX_NAME} again",
        )
    return CheckpointError(
        f"neither {INDEX_NAME} nor {SINGLE_NAME} is here",
        where=folder,
        remedy="name the folder that holds config.json and the weights",
    )
