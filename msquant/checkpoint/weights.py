"""The canonical in-memory form of a model's weights, whatever they are stored as."""

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from msquant.schemes import C8, FLOAT, Scheme

INT8_MIN, INT8_MAX = -128, 127


@dataclass(frozen=True, eq=False)
class CacheScale:
    """How the keys or values that a linear layer makes are kept in int8, keys behind the rotary embedding.

    `x_q = clamp(round(x * reciprocal + offset))` and `x = x_q * scale`, channel by channel. The offset is not
    taken off again: it moves all keys by one vector, and each query's scores by one number, which no softmax
    sees. Of latent attention the compressed keys and values are kept, behind their norm, with one scale for
    all channels.

    Attributes:
        scale: float32 `[N]`, one a channel of each key-value head; of latent attention `[1]`.
        reciprocal: as `scale`: that of the scale, as the engine has rounded it.
        queries: of latent attention, float32 `[heads]`: scales that hold what each head's queries reached in
            calibration, once they are turned into the latent's channels. They are carried along: engines
            here, as vllm-ascend, scale every query by itself. None for other attention.
        offset: of keys, as `scale`, integers; None for zeros, which values need.
    """

    scale: NDArray[np.float32]
    reciprocal: NDArray[np.float32]
    queries: NDArray[np.float32] | None = None
    offset: NDArray[np.float32] | None = None

    @classmethod
    def of(
        cls,
        scale: NDArray[np.float32],
        queries: NDArray[np.float32] | None = None,
        offset: NDArray[np.float32] | None = None,
    ) -> "CacheScale":
        """With exact reciprocals."""
        return cls(scale, 1 / scale, queries, offset)

    def rounded(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """What is read back of the cache, in the shape of the keys or values `[..., N]`."""
        kept = values * self.reciprocal
        if self.offset is not None:
            kept += self.offset
        np.rint(kept, out=kept)
        np.clip(kept, INT8_MIN, INT8_MAX, out=kept)
        kept *= self.scale
        return kept

    def take(self, rows: NDArray[np.integer]) -> "CacheScale":
        """The same of channels in another order; one scale for all of them has none."""
        if self.queries is not None:
            return self
        offset = None if self.offset is None else self.offset[rows]
        return CacheScale(self.scale[rows], self.reciprocal[rows], offset=offset)


@dataclass(frozen=True, eq=False)
class FloatLinear:
    """A linear layer in floating point.

    Attributes:
        weight: float32 `[N, K]`, N output and K input channels.
        bias: float32 `[N]`, or None.
        cache: how the keys or values that it makes are kept; None in floating point.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None = None
    cache: CacheScale | None = None

    @property
    def scheme(self) -> Scheme:
        """How it is computed."""
        return FLOAT if self.cache is None else replace(FLOAT, cache=C8)

    def take_rows(self, rows: NDArray[np.integer]) -> "FloatLinear":
        """The layer with its outputs in another order, row `rows[i]` at place i."""
        return FloatLinear(
            self.weight[rows],
            None if self.bias is None else self.bias[rows],
            None if self.cache is None else self.cache.take(rows),
        )


@dataclass(frozen=True, eq=False)
class QuantizedLinear:
    """A linear layer with integer weights.

    With quantized inputs `y = weight_scale * input_scale * (weight @ (x_q - input_offset)) + bias` with
    `x_q = clamp(round(x / input_scale) + input_offset)`, in groups `y = input_scale * ((weight_scale *
    weight) @ (x_q - input_offset)) + bias`; with inputs in floating point `y = (weight_scale * (weight -
    weight_offset)) @ x + bias`.

    Attributes:
        weight: int8 `[N, K]`, one integer of the scheme's bits in each.
        weight_scale: float32 `[N]`, or `[N, K / group_size]`.
        scheme: how it is computed.
        bias: float32 `[N]`, or None.
        input_scale: float32 `[1]` where the scheme's inputs are static; else None.
        input_offset: int32, zero points in [-128, 127]: `[1]`, or `[K]` where the scheme's inputs are
            shifted; None exactly when `input_scale` is.
        weight_offset: int32 in the shape of `weight_scale`, the zero points; None for symmetric weights.
        input_reciprocal: float32 `[1]`, where the engine multiplies by a reciprocal that it has rounded
            instead of dividing: `x_q = clamp(round(x * input_reciprocal + input_offset))`; None where it
            divides.
        column_groups: int32 `[K]`, the group of each column, where groups are no runs of neighbours: GPTQ
            with `desc_act` stores columns in their own order, and groups in that of its pass. None for runs.
        cache: how the keys or values that it makes are kept; None exactly where the scheme's cache is.
    """

    weight: NDArray[np.int8]
    weight_scale: NDArray[np.float32]
    scheme: Scheme
    bias: NDArray[np.float32] | None = None
    input_scale: NDArray[np.float32] | None = None
    input_offset: NDArray[np.int32] | None = None
    weight_offset: NDArray[np.int32] | None = None
    input_reciprocal: NDArray[np.float32] | None = None
    column_groups: NDArray[np.int32] | None = None
    cache: CacheScale | None = None

    def __post_init__(self) -> None:
        assert self.scheme.is_static == (self.input_scale is not None), self.scheme
        assert (self.scheme.cache is None) == (self.cache is None), self.scheme

    @property
    def is_static(self) -> bool:
        """Whether activations are quantized with a scale fixed at calibration."""
        return self.scheme.is_static

    @property
    def float_weight(self) -> NDArray[np.float32]:
        """What the integers stand for, float32 `[N, K]`."""
        if self.column_groups is not None:
            shifted = self.weight.astype(np.float32)
            if self.weight_offset is not None:
                shifted -= self.weight_offset[:, self.column_groups]
            return shifted * self.weight_scale[:, self.column_groups]
        groups = self.weight_scale.reshape(len(self.weight), -1, 1)
        values = self.weight.astype(np.float32).reshape(len(self.weight), groups.shape[1], -1)
        if self.weight_offset is not None:
            values -= self.weight_offset.reshape(groups.shape)
        return (values * groups).reshape(self.weight.shape)

    @property
    def factors(self) -> tuple[NDArray[np.int8] | NDArray[np.float32], NDArray[np.float32]]:
        """What rounded inputs are multiplied by, `[N, K]`, and then each output, `[N]`.

        The integers and their scales; with scales of groups, which are different within a sum, what the
        integers stand for, and 1.
        """
        if self.weight_scale.ndim == 1:
            return self.weight, self.weight_scale
        return self.float_weight, np.ones(len(self.weight), np.float32)

    def take_rows(self, rows: NDArray[np.integer]) -> "QuantizedLinear":
        """The layer with its outputs in another order, row `rows[i]` at place i."""
        return replace(
            self,
            weight=self.weight[rows],
            weight_scale=self.weight_scale[rows],
            bias=None if self.bias is None else self.bias[rows],
            weight_offset=None if self.weight_offset is None else self.weight_offset[rows],
            cache=None if self.cache is None else self.cache.take(rows),
        )


Linear = FloatLinear | QuantizedLinear


def with_cache(linear: Linear, cache: CacheScale | None) -> Linear:
    """A layer whose keys or values are kept so; None for floating point."""
    if isinstance(linear, FloatLinear):
        return replace(linear, cache=cache)
    scheme = replace(linear.scheme, cache=None if cache is None else C8)
    return replace(linear, scheme=scheme, cache=cache)


def float_weight(linear: Linear) -> NDArray[np.float32]:
    """What a layer's weights stand for, float32 `[N, K]`."""
    return linear.weight if isinstance(linear, FloatLinear) else linear.float_weight


def as_computed(linear: Linear) -> Linear:
    """A layer whose weights alone are quantized, with what its integers stand for; any other as it is.

    No engine of msquant's own has a kernel for integer weights alone.
    """
    if isinstance(linear, FloatLinear) or not linear.scheme.is_weight_only:
        return linear
    return FloatLinear(linear.float_weight, linear.bias, linear.cache)


def token_scales(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The scales of activations that are quantized per token, `[T, K]` to `[T, 1]`: `max|x| / 127`.

    The rule of the servers' operators (aclnnDynamicQuant, and vLLM's kernels); golden-stick's own
    DynamicQuant divides `2 max|x|` by 255. A token of zeros has no scale; it gets 1.
    """
    scales = np.maximum(x.max(axis=1, keepdims=True), -x.min(axis=1, keepdims=True)) / np.float32(INT8_MAX)
    scales[scales == 0] = 1
    return scales


class WeightSource(Protocol):
    """Where a decoder layer's weights are read from, one at a time, by their Hugging Face names."""

    def __contains__(self, name: str) -> bool:
        """Whether a tensor of that name is stored, for example `model.norm.weight`."""
        ...

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Return one floating-point tensor as float32.

        Raises:
            CheckpointError: it is missing, its shard is damaged, or it holds NaN or infinity.
        """
        ...

    def rows(self, name: str, indices: NDArray[np.integer]) -> NDArray[np.float32]:
        """Return some rows of a floating-point tensor as float32 `[len(indices), ...]`.

        Raises:
            CheckpointError: as for `tensor`.
        """
        ...

    def linear(self, module: str) -> Linear:
        """Return the linear layer called `module`, for example `model.layers.0.self_attn.q_proj`.

        Raises:
            CheckpointError: as for `tensor`, or its parts do not fit together.
        """
        ...


class LayerSink(Protocol):
    """Where a quantized decoder layer's weights go, one at a time, by their Hugging Face names."""

    def tensor(self, name: str, values: NDArray[np.float32]) -> None:
        """Take a floating-point tensor.

        Raises:
            OutputError: the disk is full or cannot be written.
            CheckpointError: a value does not fit the dtype it is stored in.
        """
        ...

    def linear(self, module: str, linear: Linear) -> None:
        """Take the linear layer called `module`. Raises as `tensor`."""
        ...
