"""The cells of `Shrink`; apart from it, because they import golden-stick."""

from typing import Any, ClassVar

from mindspore import Tensor
from mindspore_gs.ptq.quant_cells.mindone.linear_weight_quant_wrappers import WeightQuantLinearCell

from msquant.kernels.quantizer import FastQuantizer, FastWeightOnlyCell


class ShrinkCell(FastWeightOnlyCell):
    """Multiplies a weight by the ratio, then rounds it."""

    def quant(self) -> None:
        """As its parent, with the smaller weight."""
        weight = self.layer.weight
        weight.set_data(Tensor.from_numpy(weight.asnumpy() * self.cfg.algo_args["ratio"]))
        super().quant()


class ShrinkQuantizer(FastQuantizer):
    """golden-stick's quantizer with that cell."""

    cells: ClassVar[dict[Any, Any]] = {**FastQuantizer.cells, WeightQuantLinearCell: ShrinkCell}
