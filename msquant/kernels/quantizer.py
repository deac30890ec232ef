"""golden-stick's last module, which rounds the weights, with msquant's rounding in its cells."""

from collections.abc import Callable
from typing import Any

from mindspore import Parameter, Tensor
from mindspore_gs.ptq.algo_modules import Quantizer
from mindspore_gs.ptq.quant_cells.mindone import AllQuantLinearCell, DynamicQuantLinearCell
from mindspore_gs.ptq.quant_cells.mindone.linear_weight_quant_wrappers import WeightQuantLinearCell

from msquant.kernels.weight_rounding import quantize_weight
from msquant.schemes import parse_scheme


class FastWeightCell(WeightQuantLinearCell):
    """Rounds a weight as its parent does, without that one's five arrays of the weight's size."""

    def quant(self) -> None:
        """Replace the floating-point weight by `weight`, `weight_scale` and, if there are any, `bias` and
        `weight_offset`."""
        # golden-stick's own words know int8 and int4 alone.
        quant = parse_scheme(self.cfg.algo_args["scheme"]).weights
        assert quant is not None
        dtype = self.cfg.algo_args["weight_scale_dtype"]
        weight, scale, offset = quantize_weight(self.layer.weight.asnumpy(), dtype, quant)
        self.layer.weight = None
        self.weight = Parameter(Tensor.from_numpy(weight))
        self.weight_scale = Parameter(Tensor(scale, dtype=self.compute_type))
        self.weight_offset = None if offset is None else Parameter(Tensor.from_numpy(offset))
        self.has_bias = self.layer.has_bias
        if self.has_bias:
            self.bias = self.layer.bias
            self.layer.bias = None


class FastStaticCell(AllQuantLinearCell, FastWeightCell):
    """golden-stick's static linear, by whose `super().quant()` the weight comes to `FastWeightCell`."""


class _WithoutInputs:
    """For cells that round a weight alone; golden-stick's own raise an error where nothing was read."""

    samples: list[Any]
    quant: Callable[[], None]

    def process(self) -> None:
        """Round the weight."""
        self.samples.clear()
        self.quant()


class FastDynamicCell(_WithoutInputs, DynamicQuantLinearCell, FastWeightCell):
    """golden-stick's linear with a scale per token, likewise."""


class FastWeightOnlyCell(_WithoutInputs, FastWeightCell):
    """golden-stick's linear with int8 weights alone."""


class FastQuantizer(Quantizer):
    """golden-stick's quantizer with these cells."""

    cells = {  # noqa: RUF012
        AllQuantLinearCell: FastStaticCell,
        DynamicQuantLinearCell: FastDynamicCell,
        WeightQuantLinearCell: FastWeightOnlyCell,
    }

    def get_wrapper_layer(self, layer_type: Any, config: Any) -> type | None:
        """Wrap what golden-stick would wrap, in our cell."""
        wrapper = super().get_wrapper_layer(layer_type, config)
        return self.cells.get(wrapper, wrapper)
