"""The golden-stick checkpoint of vLLM-MindSpore, read as a `WeightSource`."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.weights import Linear
from msquant.families import row_orders
from msquant.families.row_orders import RopeRows, RowOrder
from msquant.formats.description import Description
from msquant.formats.dtypes import model_dtype
from msquant.formats.golden_stick.layout import (
    Variant,
    decode_linear,
    parts_of,
    read_description,
    read_variant,
    stored_scheme,
)
from msquant.formats.golden_stick.rules import check_layout
from msquant.formats.stored import FolderSource

_NOTHING = RopeRows({}, 0)


class GoldenStickCheckpoint(FolderSource):
    """A written folder as a `WeightSource`: quantized layers as they will be computed, the rest as float32.

    Rows that MindFormers wants de-interleaved are given back in the Hugging Face order.

    Attributes:
        description: what is said of its tensors.
        variant: the backend the folder is for.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        description: Description,
        variant: Variant = "native",
        rope_rows: RopeRows = _NOTHING,
        dtype: str | None = None,
    ) -> None:
        super().__init__(checkpoint)
        self.description = description
        self.variant = variant
        self._rope_rows, self._dtype = rope_rows, dtype

    @classmethod
    def open(cls, folder: Path | str) -> "GoldenStickCheckpoint":
        """Open a folder without validating it; `GoldenStickFormat.validate` does that.

        Raises:
            CheckpointError: as `Checkpoint.open` and `read_description`; or `config.json` or the manifest
                cannot be understood.
        """
        folder = Path(folder)
        checkpoint, description = Checkpoint.open(folder), read_description(folder)
        config: dict[str, Any] = {}
        if (folder / "config.json").exists():
            config = read_json(folder / "config.json")
        variant = read_variant(folder, config)
        rows = row_orders(config) if variant == "mindformers" else _NOTHING
        return cls(checkpoint, description, variant, rows, model_dtype(config))

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Return a floating-point tensor as float32. Raises CheckpointError as `Checkpoint.tensor`."""
        order = self._order(name)
        values = self.checkpoint.tensor(name)
        return values if order is None else values[order.interleaved()]

    def rows(self, name: str, indices: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """Return some rows of a floating-point tensor. Raises CheckpointError as `Checkpoint.tensor`."""
        order = self._order(name)
        return self.checkpoint.rows(name, indices if order is None else order.interleaved()[indices])

    def linear(self, module: str) -> Linear:
        """Return the layer `module`; a layer that is not described is in floating point, as for the engine.

        Raises:
            CheckpointError: a part is missing, or of a dtype or shape that does not fit.
        """
        order = self._order(f"{module}.weight")
        scheme = stored_scheme(self.checkpoint, module, self.description)
        if scheme.is_float:
            linear = self.checkpoint.linear(module)
            return linear if order is None else linear.take_rows(order.interleaved())
        parts = self.parts(module, parts_of(scheme), check_layout(self.checkpoint, module, scheme=scheme))
        decoded = decode_linear(module, parts, self._dtype, scheme)
        return decoded if order is None else decoded.take_rows(order.interleaved())

    def _order(self, name: str) -> RowOrder | None:
        order = self._rope_rows.of(name.rpartition(".")[0])
        if order is not None and self.checkpoint.shape(name)[:1] != (order.rows,):
            self.checkpoint.expect(name, (order.rows, *self.checkpoint.shape(name)[1:]))
        return order
