"""What the readers of all formats have in common."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.reader import Checkpoint
from msquant.errors import CheckpointError
from msquant.formats.format import Finding


class FolderSource:
    """A folder's floating-point tensors, and the stored parts of its quantized layers.

    Attributes:
        checkpoint: its tensors.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def __contains__(self, name: str) -> bool:
        return name in self.checkpoint

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Return a floating-point tensor as float32. Raises CheckpointError as `Checkpoint.tensor`."""
        return self.checkpoint.tensor(name)

    def rows(self, name: str, indices: NDArray[np.integer]) -> NDArray[np.float32]:
        """Return some rows of a floating-point tensor. Raises CheckpointError as `Checkpoint.tensor`."""
        return self.checkpoint.rows(name, indices)

    def parts(
        self, module: str, names: Iterable[str], findings: Sequence[Finding]
    ) -> dict[str, NDArray[Any]]:
        """The stored parts of a quantized layer by full name, with its bias if there is one.

        Args:
            module: the layer.
            names: of the parts.
            findings: what is wrong with them.

        Raises:
            CheckpointError: for the first of the findings, or a part's shard is damaged.
        """
        if findings:
            raise CheckpointError(
                findings[0].problem,
                where=f"{self.checkpoint.folder}, {findings[0].where}",
                remedy=f"see everything that is wrong with it: msquant inspect {self.checkpoint.folder}",
            )
        stored = [f"{module}.{name}" for name in names]
        if (bias := f"{module}.bias") in self.checkpoint:
            stored.append(bias)
        return {name: self.checkpoint.raw(name) for name in stored}
