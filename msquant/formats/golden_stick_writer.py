"""Writes a golden-stick folder shard by shard, with bounded memory, and closes it with its manifest."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.disk import writing
from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.reader import INDEX_NAME
from msquant.checkpoint.results import MANIFEST_NAME
from msquant.checkpoint.weights import Linear, QuantizedLinear
from msquant.checkpoint.writer import file_sha256, shard_name, write_index, write_json, write_shard
from msquant.errors import OutputError
from msquant.formats.golden_stick_layout import (
    DESCRIPTION_NAME,
    QUANT_METHOD,
    SERVED_DTYPES,
    cast,
    describe,
    encode_linear,
)
from msquant.formats.golden_stick_stream import COMPANIONS


class GoldenStickWriter:
    """Writes one folder.

    Args:
        folder: exists and is empty.
        dtype: the source's; a float32 model is written in bfloat16, which the engine takes.
        shards: how many times `write_shard` will be called; part of the shards' names.

    Attributes:
        total_size: bytes of all tensors written so far.
    """

    def __init__(self, folder: Path, dtype: str, shards: int) -> None:
        self.folder = folder
        self.total_size = 0
        self._dtype = dtype if dtype in SERVED_DTYPES else "bfloat16"
        self._shards = shards
        self._files: dict[str, str] = {}
        self._weight_map: dict[str, str] = {}
        self._quantized: list[str] = []

    def write_shard(self, tensors: Mapping[str, NDArray[np.floating]], linears: Mapping[str, Linear]) -> None:
        """Write the next shard.

        Args:
            tensors: floating-point tensors by full name, stored in the folder's dtype.
            linears: linear layers by full name.

        Raises:
            OutputError: the disk is full or cannot be written.
            CheckpointError: a value does not fit its dtype.
        """
        encoded = {name: cast(name, tensor, self._dtype) for name, tensor in tensors.items()}
        for module, linear in linears.items():
            encoded.update(encode_linear(module, linear, self._dtype))
            if isinstance(linear, QuantizedLinear):
                self._quantized.append(module)
        name = shard_name(len(self._files) + 1, self._shards)
        self._files[name] = write_shard(self.folder / name, encoded)
        self._weight_map.update(dict.fromkeys(encoded, name))
        self.total_size += sum(array.nbytes for array in encoded.values())

    def finish(self, source: Path, manifest: Mapping[str, Any]) -> None:
        """Write all that is not a shard; the manifest comes last.

        Args:
            source: the folder that the tokenizer and `config.json` are taken from.
            manifest: what `msquant.json` holds besides the format and the files.

        Raises:
            OutputError: fewer or more shards were written than announced, or the disk cannot be written.
        """
        if len(self._files) != self._shards:
            raise OutputError(f"{len(self._files)} shards were written, {self._shards} announced")
        files = self._files
        for companion in COMPANIONS:
            if (source / companion).is_file():
                with writing(self.folder / companion):
                    shutil.copyfile(source / companion, self.folder / companion)
                files[companion] = file_sha256(self.folder / companion)
        description = describe(self._weight_map, self._quantized)
        files[DESCRIPTION_NAME] = write_json(self.folder / DESCRIPTION_NAME, description)
        files[INDEX_NAME] = write_index(self.folder, self._weight_map, self.total_size)
        files["config.json"] = write_json(self.folder / "config.json", self._config(source))
        entries = {
            name: {"size": (self.folder / name).stat().st_size, "sha256": digest}
            for name, digest in sorted(files.items())
        }
        write_json(self.folder / MANIFEST_NAME, {**manifest, "format": QUANT_METHOD, "files": entries})

    def _config(self, source: Path) -> dict[str, Any]:
        config = read_json(source / "config.json")
        # vLLM-MindSpore prefers either of these over the description.
        for section in ("quantization_config", "compression_config"):
            config.pop(section, None)
        config["dtype" if "dtype" in config else "torch_dtype"] = self._dtype
        return config
