"""Small checkpoint folders for tests, whose tensors may be damaged on purpose."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from msquant.checkpoint.writer import write_shard


def write_folder(
    folder: Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any] | None = None
) -> Path:
    """Write one shard without an index, float8 as `ml_dtypes` among the tensors, and `config.json`."""
    folder.mkdir(exist_ok=True)
    write_tensors(folder / "model.safetensors", tensors)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """As `write_shard`, for which the library's NumPy side has no float8."""
    import torch
    from safetensors.torch import save_file

    if all(array.dtype.name != "float8_e4m3fn" for array in tensors.values()):
        write_shard(path, tensors)
        return
    converted = {}
    for name, array in tensors.items():
        if array.dtype.name == "float8_e4m3fn":
            converted[name] = torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)
        elif array.dtype.name == "bfloat16":
            converted[name] = torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        else:
            converted[name] = torch.from_numpy(array)
    save_file(converted, path)
