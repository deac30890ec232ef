"""Where tokens stand: rotary tables and the causal mask, in the shapes that decoder layers ask for."""

from functools import lru_cache
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from numpy.typing import NDArray

from msquant.models.config import ModelConfig
from msquant.models.rope import rotary_tables


class Positions:
    """What a decoder layer knows of its tokens' places; without cached tokens also for fewer tokens.

    Tables are kept in full shape for the next layer: on a CPU an operator that broadcasts takes 20 times
    longer.

    Args:
        cos: float32 `[T, R]`, R channels of a head being rotated; its second half repeats the first.
        sin: float32 `[T, R]`, likewise.
        mask: float32 `[T, past + T]`, 0 where a token may look and a large negative number where not.
        dtype: compute dtype.
        interleave: whether the two channels of a rotated pair lie side by side, and not R / 2 apart.
        leading: whether the rotated channels are the first of a head, and not the last.
    """

    def __init__(
        self,
        cos: NDArray[np.float32],
        sin: NDArray[np.float32],
        mask: NDArray[np.float32],
        dtype: Any,
        interleave: bool = False,
        leading: bool = False,
    ) -> None:
        half = cos.shape[1] // 2
        channels = np.arange(2 * half)
        pairs = channels.reshape(-1, 2).T.ravel() if interleave else channels
        cos, sin = cos.copy(), sin.copy()
        # Rotating is then `x * cos + partner * sin`: the minus sign is in the table.
        cos[:, pairs], sin[:, pairs] = cos.copy(), np.concatenate([-sin[:, :half], sin[:, half:]], axis=1)
        self._cos, self._sin, self._mask, self._dtype = cos, sin, mask, dtype
        self._partners = np.empty_like(pairs)
        self._partners[pairs] = np.roll(pairs, half)
        self._leading = leading
        self._kept: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._gather = ops.Gather()

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate R channels of each head of queries or keys, `[B, heads, T, R or more]`."""
        plain = x.shape[3] - self._cos.shape[1]
        around = (0, plain) if self._leading else (plain, 0)
        partners = self._keep("partners", x.shape[3:], lambda: self._partner_channels(*around), ms.int32)
        # Shorter samples stand at the first of the places.
        count = x.shape[2]
        cos = self._keep("cos", x.shape, lambda: _widen(self._cos[:count], around, 1.0), self._dtype)
        sin = self._keep("sin", x.shape, lambda: _widen(self._sin[:count], around, 0.0), self._dtype)
        return x * cos + self._gather(x, partners, 3) * sin

    def hide_future(self, scores: Tensor) -> Tensor:
        """Add the causal mask to attention scores, `[B, heads, T, past + T]`."""
        rows, columns = scores.shape[2:]
        return scores + self._keep("mask", scores.shape, lambda: self._mask[:rows, :columns], ms.float32)

    def _partner_channels(self, before: int, behind: int) -> NDArray[np.integer]:
        rotated = before + self._partners
        rest = before + len(rotated) + np.arange(behind)
        return np.concatenate([np.arange(before), rotated, rest])

    def _keep(self, name: str, shape: tuple[int, ...], table: Any, dtype: Any) -> Tensor:
        if (name, shape) not in self._kept:
            self._kept[name, shape] = Tensor(np.broadcast_to(table(), shape).copy(), dtype)
        return self._kept[name, shape]


def by_head(x: Tensor, batch: int, heads: int) -> Tensor:
    """`[B*T, heads * D]` to `[B, heads, T, D]`, one head's tokens behind one another in memory."""
    length = x.shape[0] // batch
    rows = _swapped(x.reshape(batch * length * heads, -1), batch, length, heads)
    return rows.reshape(batch, heads, length, -1)


def by_token(x: Tensor) -> Tensor:
    """`[B, heads, T, D]` to `[B*T, heads * D]`: what `by_head` does, undone."""
    batch, heads, length, channels = x.shape
    return _swapped(x.reshape(-1, channels), batch, heads, length).reshape(batch * length, -1)


def _swapped(rows: Tensor, batch: int, outer: int, inner: int) -> Tensor:
    """The rows `[B*outer*inner, D]`, the last two of their axes in each other's place."""
    if outer == 1 or inner == 1:
        return rows
    # On a CPU this takes a tenth of the time of a tensor that is transposed and then read.
    return ops.Gather()(rows, _order(batch, outer, inner), 0)


@lru_cache(maxsize=16)
def _order(batch: int, outer: int, inner: int) -> Tensor:
    """The rows `[B*outer*inner]`, in the order that they have when the last two axes change places."""
    places = np.arange(batch * outer * inner, dtype=np.int32).reshape(batch, outer, inner)
    return Tensor(places.transpose(0, 2, 1).reshape(-1).copy())


def positions(config: ModelConfig, length: int, dtype: Any, past: int = 0) -> Positions:
    """Rotary tables and causal mask for `length` tokens that follow `past` cached ones."""
    cos, sin = rotary_tables(config, past, length)
    visible = np.arange(past + length)[None, :] <= np.arange(past, past + length)[:, None]
    mask = np.where(visible, 0, np.finfo(np.float32).min).astype(np.float32)
    # What latent attention rotates stands behind the channels without a position.
    return Positions(cos, sin, mask, dtype, config.interleaved_pairs, leading=config.latent is None)


def _widen(table: NDArray[np.float32], around: tuple[int, int], value: float) -> NDArray[np.float32]:
    return np.pad(table, ((0, 0), around), constant_values=value)
