"""A float folder rounded to nearest W8A8 and written in the golden-stick format."""

import shutil
from pathlib import Path

import numpy as np

from msquant.checkpoint.weights import QuantizedLinear
from msquant.checkpoint.writer import write_index, write_json, write_shard
from msquant.formats.golden_stick import DESCRIPTION_NAME, describe, encode_linear
from msquant.schemes import W8A8
from tests.inference.reference import ReferenceLlama


def write_quantized(source: Path, folder: Path, calibration: list[int]) -> Path:
    """Quantize every linear of the decoder layers, with activation ranges from the calibration tokens."""
    reference = ReferenceLlama(source)
    reference.logits(calibration)
    tensors = {name: array for name, array in reference.tensors.items() if "_proj" not in name}
    for module, (low, high) in reference.ranges.items():
        weight = reference.tensors[f"{module}.weight"]
        weight_scale = (2 * np.abs(weight).max(axis=1) / 255).astype(np.float32)
        scale = (high - low) / 255
        linear = QuantizedLinear(
            weight=np.clip(np.rint(weight / weight_scale[:, None]), -128, 127).astype(np.int8),
            weight_scale=weight_scale,
            scheme=W8A8,
            input_scale=np.array([scale], np.float32),
            input_offset=np.array([np.rint(-128 - low / scale)], np.int32),
        )
        tensors.update(encode_linear(module, linear, "float32"))
    folder.mkdir(parents=True)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder)
    write_shard(folder / "model-00001-of-00001.safetensors", tensors)
    write_json(folder / DESCRIPTION_NAME, describe(tensors, reference.ranges))
    size = sum(array.nbytes for array in tensors.values())
    write_index(folder, dict.fromkeys(tensors, "model-00001-of-00001.safetensors"), size)
    return folder
