"""The golden-stick pass over one decoder layer: `PTQ.apply` on a network that holds nothing else."""

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from mindspore import Tensor, nn
from mindspore_gs.ptq.quant_cells.quant_cell import QuantCell
from numpy.typing import NDArray

from msquant.algorithms.base import Algorithm
from msquant.checkpoint.weights import FloatLinear, Linear, QuantizedLinear
from msquant.families.base import SmoothGroup
from msquant.interrupts import check_interrupt
from msquant.kernels import golden_stick
from msquant.kernels.fake_quant import in_int8
from msquant.kernels.layer_report import LayerReport
from msquant.models.config import ModelConfig
from msquant.models.layers import DecoderLayer, Positions
from msquant.models.reading import stored_norm
from msquant.schemes import W8A8, Scheme


@dataclass(frozen=True, eq=False)
class LayerResult:
    """A quantized decoder layer, or its attention, which is also the `WeightSource` to build it from again.

    Attributes:
        linears: by their full names.
        tensors: all others, float32, by their full names; of norms and gates, smoothed.
        report: what the search chose.
        smooth_scales: what the weights' columns were multiplied by, float32 `[K]` by the smooth group's name;
            groups that were not smoothed have none.
    """

    linears: dict[str, Linear]
    tensors: dict[str, NDArray[np.float32]]
    report: LayerReport
    smooth_scales: dict[str, NDArray[np.float32]]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Return a tensor that is no linear's."""
        return self.tensors[name]

    def rows(self, name: str, indices: NDArray[np.integer]) -> NDArray[np.float32]:
        """Return some elements of such a tensor."""
        return self.tensors[name][indices]

    def linear(self, module: str) -> Linear:
        """Return a linear layer."""
        return self.linears[module]


def quantize_layer(
    config: ModelConfig,
    index: int,
    layer: DecoderLayer,
    hidden: Sequence[Tensor],
    places: Positions,
    policy: Algorithm,
    put: Callable[[NDArray[np.float32]], None] = lambda output: None,
) -> LayerResult:
    """Smooth, clip and quantize one decoder layer with golden-stick.

    Args:
        config: the model's shape.
        index: of the layer.
        layer: in floating point, whole or its attention alone; consumed, its linears are replaced.
        hidden: its inputs, batches of samples `[B, T, H]`.
        places: the tokens' positions, the same for every sample.
        policy: what to do.
        put: takes the layer's floating-point outputs, batch by batch, in the shapes of `hidden`.

    Returns:
        The quantized layer; its `report.error` is yet to be measured, with `relative_error`.

    Raises:
        CalibrationError: no candidate gives a finite error.
    """
    golden_stick.load()
    from datasets import Dataset
    from mindspore_gs.ptq import PTQ

    name = config.family.layer_name(index)
    groups = [group for group in config.groups(index) if group.name in layer.step_of]
    linears = [linear for group in groups for linear in group.linears]
    report = LayerReport(name)
    passes = _Passes([len(batch) for batch in hidden], put)
    if not policy.takes_batches:
        hidden = [batch[i : i + 1] for batch in hidden for i in range(len(batch))]
    model = _OneLayerModel(config, groups, layer, hidden, places)
    schemes = {linear: policy.scheme(f"{name}.{linear}") for linear in linears}
    policies = OrderedDict(
        (f"{re.escape(f'network.layer.{linear}')}$", policy.ptq_config(scheme, dtype=config.dtype))
        for linear, scheme in schemes.items()
        if not scheme.is_float and scheme.inputs != W8A8.inputs
    )
    skip = [f"network.layer.{linear}" for linear, scheme in schemes.items() if scheme.is_float]
    modules = [partial(module, report=report) for module in policy.modules()]
    ranges = any(scheme.is_static for scheme in schemes.values()) or not policy.takes_batches
    reads = ranges or policy.rounds_by_inputs
    pipeline = [*map(passes.of, modules), passes.of(policy.quantizer(), needed=reads or not modules)]
    with golden_stick.pipeline(pipeline):
        items = Dataset.from_dict({"item": list(range(len(hidden)))})
        ptq = PTQ(policy.ptq_config(skip=skip), policies)
        with passes.over(layer):
            ptq.apply(model, datasets=items, framework="mindone")
    return LayerResult(
        linears={
            f"{name}.{linear}": _result(find_cell(layer, linear), scheme)
            for linear, scheme in schemes.items()
        },
        tensors={
            f"{name}.{tensor}": _stored(config, f"{name}.{tensor}", find_cell(layer, tensor).asnumpy())
            for tensor in _others(config, index, linears)
            if getattr(layer, tensor.partition(".")[0]) is not None
        },
        report=report,
        smooth_scales=model.smooth_scales(),
    )


class _Passes:
    """golden-stick's passes over the layer, of which only those are computed that something comes of.

    The one before all modules is for the layer after it, which there is none of. In each module's own, cells
    collect what they read: the quantizer's do for static scales, and where it rounds by inputs. The first
    that is computed also gives the layer's outputs, by weights that nothing has changed yet.
    """

    def __init__(self, samples: list[int], put: Callable[[NDArray[np.float32]], None]) -> None:
        self._samples, self._put = samples, put
        self._held: list[NDArray[np.float32]] = []
        self._computed = False

    def of(self, module: Callable[..., Any], needed: bool = True) -> Callable[..., Any]:
        """An algorithm module, which golden-stick makes right before its pass."""

        def make(*args: Any) -> Any:
            self._computed = needed
            return module(*args)

        return make

    @contextmanager
    def over(self, layer: Any) -> Iterator[None]:
        """Within the block, every batch of outputs goes to `put` as soon as all its samples are computed."""
        compute = layer.construct

        def construct(hidden: Tensor, places: Positions) -> Tensor:
            if not self._computed:
                return hidden
            output = compute(hidden, places)
            self._take(output)
            return output

        layer.construct = construct
        try:
            yield
        finally:
            layer.construct = compute

    def _take(self, output: Tensor) -> None:
        if not self._samples:
            return
        check_interrupt()
        self._held.append(output.asnumpy().astype(np.float32, copy=False))
        if sum(map(len, self._held)) == self._samples[0]:
            self._put(np.concatenate(self._held) if len(self._held) > 1 else self._held[0])
            self._held.clear()
            del self._samples[0]


class _OneLayerModel:
    """What golden-stick's mindone path asks of a model, for a network of a single decoder layer."""

    def __init__(
        self,
        config: ModelConfig,
        groups: Sequence[SmoothGroup],
        layer: DecoderLayer,
        hidden: Sequence[Tensor],
        places: Positions,
    ) -> None:
        self.network = _Network(layer)
        self.num_attention_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        if shared := [group.heads for group in groups if group.heads is not None]:
            # All of them read what one norm scales.
            self.num_attention_heads, self.num_key_value_heads = shared[0], 1
        self._config = config
        self._groups = groups
        self._hidden = hidden
        self._places = places
        self._smoothed: list[Any] = []

    def smooth_scales(self) -> dict[str, NDArray[np.float32]]:
        """What golden-stick multiplied the columns of each group by."""
        smoothed = [cells for cells in self._smoothed if cells.smooth_scale is not None]
        return {cells.name: cells.smooth_scale.asnumpy() for cells in smoothed}

    def forward(self, item: dict[str, int]) -> Tensor:
        return self.network.layer(self._hidden[item["item"]], self._places)

    def _transformer_layers(self) -> list[type]:
        return [DecoderLayer]

    def get_layers_for_smooth(self, layer: DecoderLayer) -> list[Any]:
        from msquant.algorithms.smoothers import GroupCells

        self._smoothed = [
            GroupCells(
                group.name,
                layer.step_of[group.name],
                self._previous(layer, group),
                [find_cell(layer, name) for name in group.linears],
                # What is carried through has no cell, and takes the scale when it is written.
                [find_cell(layer, name) for name in group.followers if _is_computed(layer, name)],
                shared=group.heads is not None,
            )
            for group in self._groups
        ]
        return self._smoothed

    def _previous(self, layer: DecoderLayer, group: SmoothGroup) -> Any:
        cell = find_cell(layer, group.previous)
        sizes, names = self._config.latent, self._config.family.names
        if names.gate_up is not None and (group.previous,) == names.within_feed_forward(names.gate_up):
            return UpRows(cell)
        # Its rows are keys and values of every head in turn.
        if sizes is None or (group.previous,) != names.within_attention(names.latent_up):
            return cell
        return ValueRows(cell, self._config.num_attention_heads, sizes.qk_nope_head_dim, sizes.v_head_dim)


class _Network(nn.Cell):
    def __init__(self, layer: DecoderLayer) -> None:
        super().__init__()
        self.layer = layer


def find_cell(layer: DecoderLayer, name: str) -> Any:
    """The cell, or the parameter, of that name within a decoder layer, for example `mlp.up_proj`."""
    cell: Any = layer
    for part in name.split("."):
        cell = getattr(cell, part)
    return cell


def _is_computed(layer: DecoderLayer, name: str) -> bool:
    """Whether a decoder layer has a cell of that name within it."""
    cell: Any = layer
    for part in name.split("."):
        cell = getattr(cell, part, None)
    return cell is not None


def _others(config: ModelConfig, index: int, linears: Sequence[str]) -> list[str]:
    """The tensors of a decoder layer that are no linear's, without a mixture of experts, within the layer.

    What is carried through has no cell.
    """
    prefix, block = f"{config.family.layer_name(index)}.", f"{config.family.names.feed_forward}."
    carried = config.carried_in_attention(index)
    names = [name.removeprefix(prefix) for name in config.decoder_shapes(index) if name not in carried]
    return [n for n in names if n.rpartition(".")[0] not in linears and not n.startswith(block)]


def _stored(config: ModelConfig, name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """A tensor as it is stored; a norm's is perhaps not what the norm multiplies by."""
    module, _, kind = name.rpartition(".")
    return stored_norm(config, module, values) if kind == "weight" and values.ndim == 1 else values


def _result(cell: Any, scheme: Scheme) -> Linear:
    """The weights of a linear after the pass, whether golden-stick quantized it or was told to skip it."""
    bias = cell.bias.asnumpy() if cell.has_bias else None
    if scheme.is_float:
        return FloatLinear(cell.weight.asnumpy(), bias)
    weight, weight_scale = cell.weight.asnumpy(), cell.weight_scale.asnumpy()
    assert scheme.weights is not None
    if scheme.weights.group_size is None:
        weight_scale = weight_scale.reshape(-1)
    if not scheme.is_static:
        offset = None if scheme.weights.symmetric else cell.weight_offset.asnumpy()
        return QuantizedLinear(weight, weight_scale, scheme, bias, weight_offset=offset)
    input_scale, input_offset = cell.input_scale.asnumpy(), cell.input_offset.asnumpy()
    if not scheme.is_shifted:
        input_scale, input_offset = in_int8(input_scale, input_offset)
    return QuantizedLinear(weight, weight_scale, scheme, bias, input_scale, input_offset)


class SomeRows:
    """Those rows of a linear that a smooth group reads the outputs of.

    To golden-stick this is a linear with these rows alone; it is its own `weight`, because `weight` is read
    and replaced as a whole.

    Args:
        cell: the linear, as it is or wrapped for quantization.
        rows: their numbers, `[n]`.
    """

    bias = None

    def __init__(self, cell: Any, rows: NDArray[np.integer]) -> None:
        self._linear = cell.layer if isinstance(cell, QuantCell) else cell
        self._rows = rows

    @property
    def weight(self) -> "SomeRows":
        return self

    def clone(self) -> Tensor:
        """The rows, `[n, K]`."""
        return Tensor(self._linear.weight.asnumpy()[self._rows])

    def set_data(self, rows: Tensor) -> None:
        """Replace the rows."""
        weight = self._linear.weight.asnumpy().copy()
        weight[self._rows] = rows.asnumpy()
        self._linear.weight.set_data(Tensor(weight, self._linear.weight.dtype))


class ValueRows(SomeRows):
    """Those rows of `kv_b_proj` that make the values which `o_proj` reads.

    The weight is `[heads * (key_rows + value_rows), rank]`, keys before values in every head (transformers
    4.57.1, `models/deepseek_v3/modeling_deepseek_v3.py`).

    Args:
        cell: `kv_b_proj`, as it is or wrapped for quantization.
        heads: attention heads.
        key_rows: rows of keys in a head.
        value_rows: rows of values in a head.
    """

    def __init__(self, cell: Any, heads: int, key_rows: int, value_rows: int) -> None:
        per_head = np.arange(heads)[:, None] * (key_rows + value_rows)
        super().__init__(cell, (per_head + key_rows + np.arange(value_rows)).reshape(-1))


class UpRows(SomeRows):
    """Those rows of `gate_up_proj` that make up, the second half.

    Args:
        cell: `gate_up_proj`, as it is or wrapped for quantization.
    """

    def __init__(self, cell: Any) -> None:
        linear = cell.layer if isinstance(cell, QuantCell) else cell
        rows = linear.weight.shape[0]
        super().__init__(cell, np.arange(rows // 2, rows))
