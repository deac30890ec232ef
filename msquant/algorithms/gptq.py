"""GPTQ on top of `osl`: weights rounded by what their linears read, without fitting the calibration text."""

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from msquant.algorithms import register
from msquant.algorithms.osl import Osl

if TYPE_CHECKING:
    from msquant.algorithms.base import Rounder


@register
class Gptq(Osl):
    """The rounding of `kernels/gptq.py`; linears with quantized inputs are smoothed as `osl` does it."""

    summary: ClassVar[str] = "GPTQ with a shrunk Hessian and searched scales, after osl's smoothing"
    rounds_by_inputs: ClassVar[bool] = True

    algorithm: Literal["gptq"] = Field("gptq", description=summary)  # type: ignore[assignment]
    shrinkage: float = Field(
        0.3,
        ge=0,
        le=1,
        description="What is taken off the Hessian's off-diagonal part, so that calibration text is not "
        "fitted: 0 is plain GPTQ, 1 rounds every column for itself.",
    )
    damping: float = Field(
        0.01,
        gt=0,
        description="Added to the Hessian's diagonal, in units of its mean; golden-stick's damp_percent.",
    )
    search_scales: bool = Field(
        True,
        description="Choose each scale by the least error weighted with the Hessian's diagonal; false: "
        "from the greatest weight.",
    )

    @property
    def search_options(self) -> dict[str, Any]:
        """See `Algorithm`."""
        return {**super().search_options, "gptq": (self.shrinkage, self.damping, self._ratios)}

    @property
    def _ratios(self) -> tuple[float, ...]:
        from msquant.kernels.gptq import SCALE_RATIOS

        return SCALE_RATIOS if self.search_scales else (1.0,)

    def quantizer(self) -> Any:
        """See `Algorithm`."""
        from msquant.kernels.quantizer import GptqQuantizer

        return GptqQuantizer

    def rounder(self, inputs: Any) -> "Rounder":
        """See `Algorithm`; without inputs, from the weights alone."""
        from msquant.kernels.gptq import InputMoments

        if not len(inputs):
            return super().rounder(inputs)
        return partial(InputMoments([inputs], self.shrinkage, self.damping).rounded, ratios=self._ratios)
