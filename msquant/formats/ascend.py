"""The checkpoint of vllm-ascend, of msquant or of msModelSlim, read as a `WeightSource`."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.reader import Checkpoint
from msquant.checkpoint.weights import Linear
from msquant.errors import CheckpointError
from msquant.formats.ascend_description import Description, read_description
from msquant.formats.ascend_layout import DYNAMIC_PARTS, STATIC_PARTS, decode_linear
from msquant.formats.ascend_schemes import DESCRIBED
from msquant.formats.ascend_tensors import check_layout

# What msModelSlim's outlier suppression adds to a norm: a bias, or a second norm beside the first.
_NORM_ADDITIONS = ("norm.bias", "norm.module.weight", "norm.module.bias")


class AscendCheckpoint:
    """A written folder as a `WeightSource`: quantized layers as they will be computed, the rest as float32.

    Attributes:
        checkpoint: its tensors.
        description: what is said of them.
    """

    def __init__(self, checkpoint: Checkpoint, description: Description) -> None:
        self.checkpoint = checkpoint
        self.description = description

    @classmethod
    def open(cls, folder: Path | str) -> "AscendCheckpoint":
        """Open a folder without validating it; `ascend_rules.validate` does that.

        Raises:
            CheckpointError: as `Checkpoint.open` and `read_description`; or its norms were changed in a way
                that msquant does not compute.
        """
        folder = Path(folder)
        checkpoint, description = Checkpoint.open(folder), read_description(folder)
        for name in checkpoint.names():
            if name.endswith(_NORM_ADDITIONS) and checkpoint.raw(name).any():
                raise CheckpointError(
                    f"{name} is there: norms with a bias, which msModelSlim's outlier suppression makes, are "
                    "not computed",
                    where=checkpoint.shard_path(name),
                    remedy="quantize again with a method that leaves norms without a bias",
                )
        return cls(checkpoint, description)

    def __contains__(self, name: str) -> bool:
        return name in self.checkpoint

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Return a floating-point tensor as float32. Raises CheckpointError as `Checkpoint.tensor`."""
        return self.checkpoint.tensor(name)

    def rows(self, name: str, indices: NDArray[np.integer]) -> NDArray[np.float32]:
        """Return some rows of a floating-point tensor. Raises CheckpointError as `Checkpoint.tensor`."""
        return self.checkpoint.rows(name, indices)

    def linear(self, module: str) -> Linear:
        """Return the layer `module`.

        Raises:
            CheckpointError: its scheme is unknown; a part is missing, or its dtype or shape does not fit.
        """
        scheme = self.description.scheme(module)
        if scheme == "float":
            return self.checkpoint.linear(module)
        if scheme is None:
            raise CheckpointError(
                f"{self.description.tensors[f'{module}.weight']} is not computed by msquant",
                where=f"{self.checkpoint.folder}, {module}",
                remedy=f"msquant reads {', '.join(DESCRIBED.values())}",
            )
        if findings := check_layout(self.checkpoint, module, scheme):
            raise CheckpointError(
                findings[0].problem,
                where=f"{self.checkpoint.folder}, {findings[0].where}",
                remedy=f"see everything that is wrong with it: msquant inspect {self.checkpoint.folder}",
            )
        parts = [*(STATIC_PARTS if scheme == "static" else DYNAMIC_PARTS)]
        parts += ["bias"] if f"{module}.bias" in self.checkpoint else []
        tensors = {f"{module}.{part}": self.checkpoint.raw(f"{module}.{part}") for part in parts}
        return decode_linear(module, tensors, weight_only=scheme == "weight_only")
