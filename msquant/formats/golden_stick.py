"""The golden-stick checkpoint of vLLM-MindSpore's native backend: written, read back, validated."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.reader import Checkpoint
from msquant.checkpoint.weights import Linear
from msquant.errors import CheckpointError
from msquant.formats.golden_stick_layout import (
    DESCRIPTION_NAME,
    FLOAT,
    MODEL_DTYPES,
    QUANT_METHOD,
    QUANTIZED_PARTS,
    SERVED_DTYPES,
    W8A8,
    cast,
    decode_linear,
    describe,
    encode_linear,
    model_dtype,
)
from msquant.formats.golden_stick_rules import read_description, validate
from msquant.formats.golden_stick_tensors import Finding, check_layout

__all__ = [
    "DESCRIPTION_NAME",
    "FLOAT",
    "MODEL_DTYPES",
    "QUANTIZED_PARTS",
    "QUANT_METHOD",
    "SERVED_DTYPES",
    "W8A8",
    "Finding",
    "GoldenStickCheckpoint",
    "cast",
    "decode_linear",
    "describe",
    "encode_linear",
    "model_dtype",
    "read_description",
    "validate",
]


class GoldenStickCheckpoint:
    """A written folder as a `WeightSource`: quantized layers as they will be computed, the rest as float32.

    Attributes:
        checkpoint: its tensors.
        description: `W8A8` or `FLOAT` by tensor name.
    """

    def __init__(self, checkpoint: Checkpoint, description: dict[str, str]) -> None:
        self.checkpoint = checkpoint
        self.description = description

    @classmethod
    def open(cls, folder: Path | str) -> "GoldenStickCheckpoint":
        """Open a folder without validating it; `validate` does that.

        Raises:
            CheckpointError: as `Checkpoint.open` and `read_description`.
        """
        return cls(Checkpoint.open(folder), read_description(Path(folder)))

    def __contains__(self, name: str) -> bool:
        return name in self.checkpoint

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Return a floating-point tensor as float32. Raises CheckpointError as `Checkpoint.tensor`."""
        return self.checkpoint.tensor(name)

    def rows(self, name: str, indices: NDArray[np.integer]) -> NDArray[np.float32]:
        """Return some rows of a floating-point tensor. Raises CheckpointError as `Checkpoint.tensor`."""
        return self.checkpoint.rows(name, indices)

    def linear(self, module: str) -> Linear:
        """Return the layer `module`; a layer that is not described is in floating point, as for the engine.

        Raises:
            CheckpointError: a part is missing, or of a dtype or shape that does not fit.
        """
        if self.description.get(f"{module}.weight", FLOAT) != W8A8:
            return self.checkpoint.linear(module)
        if findings := check_layout(self.checkpoint, module):
            raise CheckpointError(
                findings[0].problem,
                where=f"{self.checkpoint.folder}, {findings[0].where}",
                remedy=f"see everything that is wrong with it: msquant inspect {self.checkpoint.folder}",
            )
        parts = [*QUANTIZED_PARTS, *(["bias"] if f"{module}.bias" in self.checkpoint else [])]
        names = [f"{module}.{part}" for part in parts]
        return decode_linear(module, {name: self.checkpoint.raw(name) for name in names})
