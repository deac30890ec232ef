"""The row order of rotary projections: interleaved, or even rows then odd."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_LAYERS = "model.layers."


@dataclass(frozen=True)
class RowOrder:
    """How the rows of one projection are reordered: those of each head alike.

    Attributes:
        heads: number of heads.
        head_rows: rows of a head.
        rope_rows: the last rows of a head, which are rotated; an even number.
    """

    heads: int
    head_rows: int
    rope_rows: int

    @property
    def rows(self) -> int:
        """Rows of the whole projection."""
        return self.heads * self.head_rows

    def deinterleaved(self) -> "NDArray[np.int64]":
        """`[rows]`: `tensor[order.deinterleaved()]` has the even rope rows of a head first, then the odd."""
        import numpy as np

        plain = self.head_rows - self.rope_rows
        rope = plain + np.concatenate([np.arange(0, self.rope_rows, 2), np.arange(1, self.rope_rows, 2)])
        head = np.concatenate([np.arange(plain), rope])
        starts = np.arange(self.heads) * self.head_rows
        rows: NDArray[np.int64] = (starts[:, None] + head).reshape(-1).astype(np.int64)
        return rows

    def interleaved(self) -> "NDArray[np.int64]":
        """`[rows]`: the inverse of `deinterleaved`, from the stored to the Hugging Face order."""
        import numpy as np

        return np.argsort(self.deinterleaved(), kind="stable").astype(np.int64)


@dataclass(frozen=True)
class RopeRows:
    """The projections of a model whose rows are reordered.

    Attributes:
        orders: by the projection's name below its decoder layer, for example `self_attn.q_b_proj`.
        layers: decoder layers it applies to; the multi-token-prediction layers follow after them.
    """

    orders: Mapping[str, RowOrder]
    layers: int

    def of(self, module: str) -> RowOrder | None:
        """The order of a layer's rows by its full name, or None if they stay as they are."""
        number, _, suffix = module.removeprefix(_LAYERS).partition(".")
        if not module.startswith(_LAYERS) or not number.isdecimal() or int(number) >= self.layers:
            return None
        return self.orders.get(suffix)
