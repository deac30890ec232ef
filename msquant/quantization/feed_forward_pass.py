"""The feed-forward block of a decoder layer quantized per token, one expert in memory at a time.

The weights are read twice: once for the floating-point outputs, which the next layer needs, and for the
ranges that smoothing asks for; once to be quantized. A dense block is treated as a single expert that gets
all tokens, and so is a shared one.

Several passes may share the experts: each hands on what its own ones give and reach, and outputs are always
added up expert by expert, in their order.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from mindspore import Tensor
from numpy.typing import NDArray

from msquant.algorithms.base import Algorithm
from msquant.checkpoint.weights import (
    FloatLinear,
    LayerSink,
    Linear,
    QuantizedLinear,
    WeightSource,
    as_computed,
)
from msquant.interrupts import check_interrupt
from msquant.kernels.cpu_linear import linear_layer
from msquant.kernels.layer_report import GroupReport
from msquant.kernels.ranges import channel_ranges
from msquant.kernels.smoothing import power_of_two, smooth_scale
from msquant.kernels.weight_rounding import column_maxima
from msquant.models.cells import norm_cell
from msquant.models.config import ModelConfig
from msquant.models.feed_forward import MLP
from msquant.models.moe import Router, SharedGate
from msquant.models.reading import read_norm, stored_norm
from msquant.models.routing import tokens_of

if TYPE_CHECKING:
    from msquant.kernels.weight_rounding import Rounder

Floats = NDArray[np.float32]

Product = tuple[NDArray[np.integer], Floats]
"""The tokens that an expert gets, `[n]`, and what it adds to each, `[n, H]`."""


@dataclass
class _Expert:
    """One gated block.

    Attributes:
        name: its full name, for example `model.layers.3.mlp.experts.7`.
        number: of a routed expert; None for a block that gets all tokens.
        tokens: how many it got by the router.
        lent: how many further ones it was given to be calibrated, because it got too few.
        gated: greatest magnitude of each input channel of its `down_proj`, `[K]`; empty without a token.
        down: greatest magnitude of each column of its `down_proj`, `[K]`; likewise.
    """

    name: str
    number: int | None
    tokens: int = 0
    lent: int = 0
    gated: Floats = field(default_factory=lambda: np.zeros(0, np.float32))
    down: Floats = field(default_factory=lambda: np.zeros(0, np.float32))

    def observe(self, gated: Floats, down: Floats) -> None:
        """Widen the ranges by what its `down_proj` reads, `[n, K]`, and note that one's weight, `[H, K]`."""
        highest = column_maxima(gated)
        self.down = column_maxima(down)
        self.gated = np.maximum(self.gated, highest) if self.gated.size else highest


class FeedForwardPass:
    """Both readings of one feed-forward block: `forward` for all tokens, then `quantized`.

    Args:
        config: the model's shape.
        source: its weights.
        index: of the decoder layer.
        policy: what to do.
        dtype: compute dtype.
        step: called with what goes on.
        observes: whether `forward` takes the ranges that `quantize` needs.
        mine: the experts that are computed and quantized here, by their places; all of them if None.

    Attributes:
        mine: the same.
    """

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        index: int,
        policy: Algorithm,
        dtype: Any,
        step: Callable[[str], None] = lambda text: None,
        *,
        observes: bool = True,
        mine: Collection[int] | None = None,
    ) -> None:
        self._observes = observes
        layer, self._parts = config.family.layer_name(index), config.family.names
        parts = self._parts
        self._config, self._source, self._policy, self._dtype = config, source, policy, dtype
        self._step = step
        self._norm_name = f"{layer}.{parts.feed_forward_norm}"
        self._name = f"{layer}.{parts.feed_forward}"
        self._norm = norm_cell(config, source, self._norm_name, dtype)
        norm = parts.feed_forward_output_norm
        self._output_norm_name = None if norm is None else f"{layer}.{norm}"
        self._output_norm = None
        if self._output_norm_name is not None:
            self._output_norm = norm_cell(config, source, self._output_norm_name, dtype)
        router, gate = config.family.router_name(index), f"{self._name}.{parts.shared_gate}"
        beside = (f"{router}.", f"{gate}.")
        self._beside = [name for name in config.layer_shapes(index) if name.startswith(beside)]
        self._router, self._shared_gate = None, None
        if config.has_experts(index):
            self._router = Router(config, source, router, dtype)
            if config.family.shared_gate:
                self._shared_gate = SharedGate(config, source, gate)
        routed = config.num_experts if config.has_experts(index) else 0
        self._experts = [
            _Expert(name, place if place < routed else None)
            for place, name in enumerate(config.expert_names(index))
        ]
        self.mine = list(range(len(self._experts))) if mine is None else sorted(mine)
        # The greatest magnitude of each channel that gate and up read, in the inputs and in the weights.
        self._inputs = np.zeros(config.hidden_size, np.float32)
        self._columns: Floats | None = None

    @property
    def expert_tokens(self) -> list[int]:
        """Calibration tokens of each routed expert; empty for a dense block."""
        return [expert.tokens for expert in self._experts if expert.number is not None]

    @property
    def lent_tokens(self) -> list[int]:
        """Tokens that `feed` gave each routed expert beside its own."""
        return [expert.lent for expert in self._experts if expert.number is not None]

    def feed(self, rounds: Callable[[], Iterable[Floats]]) -> None:
        """Give experts that got too few tokens those that came nearest to going to them.

        Their ranges are then those of real inputs, as the router's next best choice. Nothing else changes:
        the outputs of the layer are those of `forward`, which must have seen all tokens.

        Args:
            rounds: the attention block's outputs again, `[T, H]` each, as often as it is called.
        """
        least = self._policy.min_expert_tokens
        mine = [self._experts[place] for place in self.mine]
        hungry = [expert for expert in mine if expert.number is not None and expert.tokens < least]
        if self._router is None or self._policy.feed_forward_smoothing is None or not hungry:
            return
        nearest = self._nearest(hungry, rounds)
        wanted = np.unique(np.concatenate(nearest))
        held: list[Floats] = []
        start = 0
        for hidden in rounds():
            inside = wanted[(wanted >= start) & (wanted < start + len(hidden))] - start
            held.append(self._normalize(hidden[inside]) if len(inside) else hidden[:0])
            start += len(hidden)
        x = np.concatenate(held)
        for place, (expert, rows) in enumerate(zip(hungry, nearest, strict=True), start=1):
            check_interrupt()
            self._step(f"feeding expert {place}/{len(hungry)}")
            mlp = MLP(self._config, self._source, expert.name, self._dtype)
            given = Tensor(x[np.searchsorted(wanted, rows)], self._dtype)
            expert.observe(mlp.gated(given).asnumpy(), mlp.down.weight.asnumpy())
            expert.lent = len(rows)

    def _nearest(
        self, hungry: Sequence[_Expert], rounds: Callable[[], Iterable[Floats]]
    ) -> list[NDArray[np.int64]]:
        """For each of these experts the numbers of the tokens that it lacks, the nearest first."""
        assert self._router is not None
        found = [(np.zeros(0, np.float32), np.zeros(0, np.int64)) for _ in hungry]
        start = 0
        for hidden in rounds():
            near = self._router.margins(Tensor(self._normalize(hidden), self._dtype))
            for place, expert in enumerate(hungry):
                lacking = self._policy.min_expert_tokens - expert.tokens
                values = np.concatenate([found[place][0], near[:, expert.number]])
                rows = np.concatenate([found[place][1], np.arange(start, start + len(hidden))])
                best = np.argsort(-values, kind="stable")[:lacking]
                found[place] = values[best], rows[best]
            start += len(hidden)
        # Its own tokens are at minus infinity.
        return [rows[np.isfinite(values)] for values, rows in found]

    def forward(self, hidden: Floats) -> Floats:
        """The block's output with the residual, in floating point.

        May be called several times, with as many tokens at once as memory takes: each call reads the weights.

        Args:
            hidden: `[T, H]`, the attention block's output.

        Returns:
            float32 `[T, H]`.
        """
        return self.added(hidden, self.computed(hidden))

    def computed(self, hidden: Floats) -> Iterator[Product]:
        """What each expert adds in floating point, one of no tokens too; observes their ranges.

        Args:
            hidden: `[T, H]`, the attention block's output.
        """
        x = self._normalize(hidden)
        smooth = self._observes and self._policy.feed_forward_smoothing is not None
        first = smooth and self._columns is None
        columns = np.zeros(self._config.hidden_size, np.float32)
        for expert, rows, factors in self._dispatch(x, "computing"):
            expert.tokens += len(rows)
            if not len(rows) and not first:
                yield rows, x[rows]
                continue
            mlp = MLP(self._config, self._source, expert.name, self._dtype)
            down = mlp.down
            if first:
                for linear in mlp.inputs:
                    np.maximum(columns, column_maxima(linear.weight.asnumpy()), out=columns)
            if not len(rows):
                yield rows, x[rows]
                continue
            gated = mlp.gated(Tensor(x[rows], self._dtype))
            if smooth:
                expert.observe(gated.asnumpy(), down.weight.asnumpy())
            yield rows, down(gated).asnumpy() * factors
        if smooth:
            self._columns = columns if first else self._columns
            np.maximum(self._inputs, column_maxima(x), out=self._inputs)

    def added(self, hidden: Floats, products: Iterable[Product]) -> Floats:
        """The block's output with the residual: what all experts add, one after the other in their order.

        Args:
            hidden: `[T, H]`, the attention block's output.
            products: of all experts in the order of their places.

        Returns:
            float32 `[T, H]`.
        """
        output = np.zeros(hidden.shape, np.float32) if self._output_norm else hidden.copy()
        for rows, product in products:
            output[rows] += product
        if self._output_norm is None:
            return output
        normed: Floats = self._output_norm(Tensor(output, self._dtype)).asnumpy()
        return hidden + normed.astype(np.float32, copy=False)

    @property
    def ranges(self) -> list[Floats]:
        """What was seen of the experts that are computed here; `restore` takes it in another pass."""
        columns = np.zeros(0, np.float32) if self._columns is None else self._columns
        mine = [self._experts[place] for place in self.mine]
        counts = np.array([[expert.tokens, expert.lent] for expert in mine], np.int32)
        each = [values for expert in mine for values in (expert.gated, expert.down)]
        return [self._inputs, columns, counts.view(np.float32), *each]

    def restore(self, places: Sequence[int], ranges: Sequence[Floats]) -> None:
        """Take over what another pass has seen of experts.

        Args:
            places: of its experts, `mine`.
            ranges: that it gave.
        """
        inputs, columns, counts, *each = ranges
        np.maximum(self._inputs, inputs, out=self._inputs)
        if columns.size:
            self._columns = columns if self._columns is None else np.maximum(self._columns, columns)
        for place, (tokens, lent), gated, down in zip(
            places, counts.view(np.int32).tolist(), each[::2], each[1::2], strict=True
        ):
            expert = self._experts[place]
            expert.tokens, expert.lent, expert.gated, expert.down = tokens, lent, gated, down

    def quantize(self, sample: Floats, sink: LayerSink) -> Floats:
        """The second reading: quantize every linear and pass it on; `forward` must have seen all tokens.

        Args:
            sample: `[T, H]`, outputs of the quantized attention block to compute the quantized output for.
            sink: takes the linears, the norms, the router and the gate of a shared expert.

        Returns:
            The quantized block's output with the residual, `[T, H]`; its integer sums are rounded to float32.
        """
        return self.added(sample, self.quantized(sample, sink))

    def quantized(self, sample: Floats, sink: LayerSink) -> Iterator[Product]:
        """As `quantize`, of the experts that are computed here: what each adds, quantized.

        Args:
            sample: as for `quantize`.
            sink: likewise; gets what lies beside the experts first.
        """
        shared = self._shared_scale()
        factors = read_norm(self._config, self._source, self._norm_name) / shared
        sink.tensor(f"{self._norm_name}.weight", stored_norm(self._config, self._norm_name, factors))
        for name in self._beside:
            values = self._source.tensor(name)
            sink.tensor(name, values * shared if values.ndim == 2 else values)
        if self._output_norm_name is not None:
            name = f"{self._output_norm_name}.weight"
            sink.tensor(name, self._source.tensor(name))
        x = self._normalize(sample)
        for expert, rows, factors in self._dispatch(x, "quantizing"):
            inner = self._inner_scale(expert)
            given = x[rows] / shared
            product = self._gated(expert, given, shared, inner, sink)
            down = self._linear(expert, self._parts.down, sink, self._rounder(product), columns=inner)
            yield rows, _apply(down, product) * factors

    def _gated(
        self, expert: _Expert, given: Floats, shared: Floats, inner: Floats | None, sink: LayerSink
    ) -> Floats:
        """Quantize gate and up, and compute what down reads."""
        # Once for all that read it: what it says of them may take as long as rounding them.
        read = self._rounder(given)
        first, *others = self._parts.feed_forward_inputs
        if not others:
            rows = None if inner is None else np.concatenate([np.ones_like(inner), inner])
            both = self._linear(expert, first, sink, read, columns=shared, rows=rows)
            gate, up = np.split(_apply(both, given), 2, axis=1)
            return _silu(gate) * up
        product = _silu(_apply(self._linear(expert, first, sink, read, columns=shared), given))
        for name in others:
            product *= _apply(self._linear(expert, name, sink, read, columns=shared, rows=inner), given)
        return product

    def groups(self) -> list[GroupReport]:
        """The smooth groups, of all experts together, after `forward`; none if they are not smoothed."""
        alpha = self._policy.feed_forward_smoothing
        if alpha is None:
            return []
        seen = [expert for expert in self._experts if expert.gated.size]
        scales = [self._inner_scale(expert) for expert in seen]
        smoothed = [
            expert.gated if scale is None else expert.gated / scale
            for expert, scale in zip(seen, scales, strict=True)
        ]
        ranges = [
            ("gate_up", [self._inputs], [self._inputs / self._shared_scale()]),
            ("down", [expert.gated for expert in seen], smoothed),
        ]
        return [
            GroupReport(
                name,
                alpha,
                before=channel_ranges(np.concatenate(before)),
                after=channel_ranges(np.concatenate(after)),
            )
            for name, before, after in ranges
        ]

    def _linear(
        self,
        expert: _Expert,
        name: str,
        sink: LayerSink,
        rounder: "Rounder",
        columns: Floats | None = None,
        rows: Floats | None = None,
    ) -> Linear:
        """Read, smooth (columns times one scale, rows by another), quantize and pass on one linear."""
        module = f"{expert.name}.{name}"
        source = self._source.linear(module)
        assert isinstance(source, FloatLinear)
        weight, bias = source.weight, source.bias
        if columns is not None:
            weight *= columns
        if rows is not None:
            weight /= rows[:, None]
            bias = None if bias is None else bias / rows
        linear: Linear = FloatLinear(weight, bias)
        scheme = self._policy.scheme(module)
        if scheme.weights is not None:
            rounded, scale, offset = rounder(weight, scheme.scale_dtype(self._config.dtype), scheme.weights)
            linear = QuantizedLinear(rounded, scale, scheme, bias, weight_offset=offset)
        sink.linear(module, linear)
        return linear

    def _rounder(self, inputs: Floats) -> "Rounder":
        """For linears that read these; with too few tokens, from the weights alone."""
        return self._policy.rounder(inputs if len(inputs) >= self._policy.min_expert_tokens else inputs[:0])

    def _shared_scale(self) -> Floats:
        """Of the norm's output, which gate, up and the router share; powers of two change no router."""
        alpha = self._policy.feed_forward_smoothing
        if alpha is None or self._columns is None:
            return np.ones(self._config.hidden_size, np.float32)
        return power_of_two(smooth_scale(self._inputs, self._columns, alpha))

    def _inner_scale(self, expert: _Expert) -> Floats | None:
        """Of an expert's gated product; None, from the weights alone, where too few tokens were seen."""
        alpha = self._policy.feed_forward_smoothing
        if alpha is None or expert.tokens + expert.lent < self._policy.min_expert_tokens:
            return None
        return smooth_scale(expert.gated, expert.down, alpha)

    def _dispatch(self, x: Floats, doing: str) -> Iterator[tuple[_Expert, Any, Any]]:
        """Each expert of this pass with the rows of x that it gets and its outputs' factors, `[n, 1]`."""
        if self._router is not None:
            ids, weights = self._router.route(Tensor(x, self._dtype))
        for done, place in enumerate(self.mine, start=1):
            expert = self._experts[place]
            check_interrupt()
            self._step(f"{doing} expert {done}/{len(self.mine)}")
            if expert.number is None:
                gate = self._shared_gate
                yield (
                    expert,
                    np.arange(len(x)),
                    np.float32(1) if gate is None else gate(Tensor(x, self._dtype)),
                )
            else:
                rows, factors = tokens_of(ids, weights, expert.number)
                yield expert, rows, factors[:, None]

    def _normalize(self, hidden: Floats) -> Floats:
        return self._norm(Tensor(hidden, self._dtype)).asnumpy().astype(np.float32, copy=False)


def _apply(linear: Linear, x: Floats) -> Floats:
    """`[T, K]` to `[T, N]`."""
    linear = as_computed(linear)
    if not isinstance(linear, FloatLinear):
        return linear_layer(linear)(x)
    # NumPy's product, however few the rows are: digits are the same wherever NumPy is.
    y = x @ linear.weight.T
    return y if linear.bias is None else y + linear.bias


def _silu(x: Floats) -> Floats:
    return x / (1 + np.exp(-x))
