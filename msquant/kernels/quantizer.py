"""golden-stick's last module, which rounds the weights, with msquant's rounding in its cells."""

from collections.abc import Callable
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, dtype
from mindspore_gs.ptq.algo_modules import Quantizer
from mindspore_gs.ptq.quant_cells.mindone import AllQuantLinearCell, DynamicQuantLinearCell
from mindspore_gs.ptq.quant_cells.mindone.linear_weight_quant_wrappers import WeightQuantLinearCell
from numpy.typing import NDArray

from msquant.kernels.fake_quant import shifted_parameters
from msquant.kernels.weight_rounding import RoundedWeight, Rounder, quantize_weight
from msquant.schemes import Quant, parse_scheme


class FastWeightCell(WeightQuantLinearCell):
    """Rounds a weight as its parent does, without that one's five arrays of the weight's size."""

    def quant(self) -> None:
        """Replace the floating-point weight by `weight`, `weight_scale` and, if there are any, `bias` and
        `weight_offset`."""
        # golden-stick's own words know int8 and int4 alone.
        quant = parse_scheme(self.cfg.algo_args["scheme"]).weights
        assert quant is not None
        scale_dtype = self.cfg.algo_args["weight_scale_dtype"]
        weight, scale, offset = self.rounded(self.layer.weight.asnumpy(), scale_dtype, quant)
        self.layer.weight = None
        self.weight = Parameter(Tensor.from_numpy(weight))
        self.weight_scale = Parameter(Tensor(scale, dtype=self.compute_type))
        self.weight_offset = None if offset is None else Parameter(Tensor.from_numpy(offset))
        self.has_bias = self.layer.has_bias
        if self.has_bias:
            self.bias = self.layer.bias
            self.layer.bias = None

    def rounded(self, weight: NDArray[np.float32], scale_dtype: str, quant: Quant) -> RoundedWeight:
        """What `quant` stores, as `quantize_weight` has it."""
        return quantize_weight(weight, scale_dtype, quant)


class FastStaticCell(AllQuantLinearCell, FastWeightCell):
    """golden-stick's static linear, by whose `super().quant()` the weight comes to `FastWeightCell`."""

    def quant(self) -> None:
        """Find zero points of columns, too, where the scheme has them: golden-stick knows one a tensor."""
        super().quant()
        if parse_scheme(self.cfg.algo_args["scheme"]).is_shifted:
            x = self.cat_samples.asnumpy()
            scale, offset = shifted_parameters(x.min(axis=0), x.max(axis=0))
            self.input_scale = Parameter(Tensor(scale, self.compute_type))
            self.input_offset = Parameter(Tensor(offset, dtype=dtype.int32))


class _WithoutInputs:
    """For cells that round a weight alone; golden-stick's own raise an error where nothing was read."""

    samples: list[Any]
    quant: Callable[[], None]

    def process(self) -> None:
        """Round the weight."""
        self.quant()
        self.samples.clear()


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


class _ByInputs(FastWeightCell):
    """Rounds a weight by what its linear reads, with the `rounder` of the quantizer's algorithm."""

    def rounded(self, weight: NDArray[np.float32], scale_dtype: str, quant: Quant) -> RoundedWeight:
        """What `quant` stores, as `quantize_weight` has it."""
        read = self.samples if self.cat_samples is None else [self.cat_samples]
        inputs = [batch.asnumpy().reshape(-1, weight.shape[1]) for batch in read]
        joined = inputs[0] if len(inputs) == 1 else np.concatenate(inputs)
        return ByInputsQuantizer.rounder(self.cfg.algo_args["algorithm"].rounder, joined)(
            weight, scale_dtype, quant
        )


class ByInputsStaticCell(FastStaticCell, _ByInputs):
    """A static linear by its inputs."""


class ByInputsDynamicCell(FastDynamicCell, _ByInputs):
    """A linear with a scale per token by its inputs."""


class ByInputsWeightOnlyCell(FastWeightOnlyCell, _ByInputs):
    """A linear with integer weights alone by its inputs."""


class ByInputsQuantizer(FastQuantizer):
    """golden-stick's quantizer with cells that round by what their linears read."""

    cells = {  # noqa: RUF012
        AllQuantLinearCell: ByInputsStaticCell,
        DynamicQuantLinearCell: ByInputsDynamicCell,
        WeightQuantLinearCell: ByInputsWeightOnlyCell,
    }
    _last: tuple[NDArray[np.float32], Rounder] | None = None

    def process(self, *args: Any, **kwargs: Any) -> None:
        """Round every weight of a decoder layer."""
        try:
            super().process(*args, **kwargs)
        finally:
            ByInputsQuantizer._last = None

    @classmethod
    def rounder(cls, make: Callable[[Any], Rounder], inputs: NDArray[np.float32]) -> Rounder:
        """What rounds by these inputs; the one before where it had the same, as keys and values do."""
        last = ByInputsQuantizer._last
        if last is not None and np.array_equal(last[0], inputs):
            return last[1]
        # Let go of the one before first: its matrices are as large as the inputs.
        last = ByInputsQuantizer._last = None
        rounder = make(inputs)
        ByInputsQuantizer._last = inputs, rounder
        return rounder
