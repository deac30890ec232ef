"""A golden-stick folder rewritten for vLLM."""

import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
from numpy.typing import NDArray

from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.weights import Scheme
from msquant.checkpoint.writer import write_index, write_json, write_shard
from msquant.formats.compressed_tensors_format import CompressedTensorsFormat
from msquant.formats.golden_stick import GoldenStickCheckpoint

SHARD = "model-00001-of-00001.safetensors"


def write_compressed(source: Path, folder: Path) -> Path:
    """Write what a static golden-stick folder of the Llama family holds as compressed-tensors."""
    config = read_json(source / "config.json")
    stored = {name: value for path in source.glob("*.safetensors") for name, value in _load(path).items()}
    opened = GoldenStickCheckpoint.open(source)
    form = CompressedTensorsFormat()
    modules = [name.removesuffix(".deq_scale") for name in stored if name.endswith(".deq_scale")]
    dtype = config.get("torch_dtype") or config["dtype"]
    tensors = {name: value for name, value in stored.items() if name.rpartition(".")[0] not in modules}
    for module in modules:
        tensors |= form.encode_linear(module, opened.linear(module), dtype)
    folder.mkdir(parents=True)
    for path in source.glob("*token*"):
        shutil.copy(path, folder)
    write_shard(folder / SHARD, tensors)
    write_index(folder, dict.fromkeys(tensors, SHARD), sum(value.nbytes for value in tensors.values()))
    schemes: dict[str, Scheme] = dict.fromkeys(modules, "static")
    write_json(folder / "config.json", {**config, **form.config_entries(schemes, tensors, config)})
    return folder


def _load(shard: Path) -> dict[str, NDArray[Any]]:
    import torch
    from safetensors.torch import load_file

    return {
        name: tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        if tensor.dtype == torch.bfloat16
        else tensor.numpy()
        for name, tensor in load_file(shard).items()
    }
