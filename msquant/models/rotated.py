"""A model's weights in a rotated basis, where it computes the same from activations without outliers.

R1 rotates the residual stream (QuaRot, arXiv 2404.00456), R2 the values within each attention head
(SpinQuant, arXiv 2405.16406). Both are folded into the weights, so that an engine has nothing to do for them:
what writes to the stream rotates it, what reads from it undoes that. A norm's weight would not commute with
the rotation, so it goes into the linears behind the norm, and ones stay.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.weights import FloatLinear
from msquant.models.config import ModelConfig
from msquant.models.reading import read_norm, stored_norm
from msquant.models.rotation import Hadamard

Floats = NDArray[np.float32]

# Of the values in float64 that are rotated at once.
_PIECE_BYTES = 8 << 20


def untied(config: ModelConfig) -> ModelConfig:
    """The shape of a rotated model: a norm is folded into its output head, and none into its embedding."""
    if not config.tie_word_embeddings:
        return config
    raw = {**config.raw, "tie_word_embeddings": False}
    return replace(config, tie_word_embeddings=False, raw=raw, shapes=config.family.shapes(raw))


class RotatedWeights:
    """A checkpoint's tensors in a rotated basis, without its multi-token-prediction layers; a `WeightSource`.

    One tensor is in memory at a time, and is rotated in place.

    Args:
        config: the model's shape, with or without an output head of its own.
        checkpoint: its weights.
        rotation: makes the rotation of a size.
    """

    def __init__(
        self, config: ModelConfig, checkpoint: Checkpoint, rotation: Callable[[int], Hadamard]
    ) -> None:
        self._config, self._checkpoint = config, checkpoint
        self._residual, self._values = rotation(config.hidden_size), rotation(config.v_head_dim)
        names = config.family.names
        self._embedding, self._final_norm, self._head = (
            f"{name}.weight" for name in (names.embedding, names.final_norm, names.head)
        )

    def __contains__(self, name: str) -> bool:
        return name == self._head or name in self._checkpoint

    def tensor(self, name: str) -> Floats:
        """See `WeightSource`."""
        return self._rotated(name, self._checkpoint.tensor(self._stored(name)))

    def rows(self, name: str, indices: NDArray[np.integer]) -> Floats:
        """See `WeightSource`; of the embedding and the head, no other rows are read."""
        if name not in (self._embedding, self._head):
            return self.tensor(name)[indices]
        return self._rotated(name, self._checkpoint.rows(self._stored(name), indices))

    def row_blocks(self, name: str, max_bytes: int) -> Iterator[tuple[int, Floats]]:
        """Read a tensor outside of the decoder layers by blocks of rows; see `Checkpoint`."""
        for start, block in self._checkpoint.row_blocks(self._stored(name), max_bytes):
            yield start, self._rotated(name, block)

    def linear(self, module: str) -> FloatLinear:
        """See `WeightSource`."""
        found = self._checkpoint.linear(module)
        bias = None if found.bias is None else self._rotated(f"{module}.bias", found.bias)
        return FloatLinear(self._rotated(f"{module}.weight", found.weight), bias)

    def _stored(self, name: str) -> str:
        """Where the checkpoint has what a tensor is made of."""
        tied = name == self._head and name not in self._checkpoint
        return self._embedding if tied else name

    def _rotated(self, name: str, values: Floats) -> Floats:
        """A tensor that was read, or some rows of the embedding or the head, rotated in place."""
        if name == self._embedding:
            _rotate_rows(values, self._residual)
        elif name == self._head:
            values *= self._norm(self._final_norm)
            _rotate_rows(values, self._residual)
        elif name == self._final_norm:
            values[:] = self._ones(name)
        elif name.startswith(f"{self._config.family.names.layers}."):
            self._rotate_in_layer(name, values)
        return values

    def _norm(self, tensor: str) -> Floats:
        """What a norm multiplies by; by the name of its tensor."""
        return read_norm(self._config, self._checkpoint, tensor.removesuffix(".weight"))

    def _ones(self, tensor: str) -> Floats:
        """The weight of a norm that multiplies by 1; by the name of its tensor."""
        return stored_norm(self._config, tensor.removesuffix(".weight"), np.ones(1, np.float32))

    def _rotate_in_layer(self, name: str, values: Floats) -> None:
        family, names = self._config.family, self._config.family.names
        index, _, within = name.removeprefix(f"{names.layers}.").partition(".")
        part, _, kind = within.rpartition(".")
        norm = family.norm_before(self._config.raw, int(index), part)
        if part in (names.input_norm, names.feed_forward_norm):
            values[:] = self._ones(name)
        elif norm is not None and kind == "weight":
            values *= self._norm(f"{names.layers}.{index}.{norm}.weight")
            _rotate_rows(values, self._residual)
        if part == family.value_rows:
            keys = self._config.qk_nope_head_dim
            for head in values.reshape(-1, keys + self._values.size, *values.shape[1:]):
                _rotate_outputs(head[keys:], self._values)
        if family.value_rows and part == family.value_columns and kind == "weight":
            _rotate_rows(values, self._values)
        if family.writes_residual(part):
            _rotate_outputs(values, self._residual)


def _rotate_rows(rows: Floats, rotation: Hadamard) -> None:
    """Rotate the rows of a matrix in place, some at a time; a vector is one row."""
    rows = rows.reshape(-1, rotation.size)
    step = max(1, _PIECE_BYTES // (8 * rotation.size))
    for start in range(0, len(rows), step):
        rows[start : start + step] = rotation.rotate(rows[start : start + step])


def _rotate_outputs(values: Floats, rotation: Hadamard) -> None:
    """Rotate what a linear returns, by its weight `[size, K]` or its bias `[size]`, in place."""
    if values.ndim == 1:
        values[:] = rotation.rotate(values)
        return
    step = max(1, _PIECE_BYTES // (8 * rotation.size))
    for start in range(0, values.shape[1], step):
        values[:, start : start + step] = rotation.rotate_columns(values[:, start : start + step])
