"""GPTQ behind AWQ's smoothing: weights rounded by what their linears read, without fitting that text."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import Field

from msquant.algorithms import register
from msquant.algorithms.awq import Awq


@register
class Gptq(Awq):
    """The rounding of `kernels/gptq.py`, of weights that `awq`, or `osl` where static, has smoothed."""

    summary: ClassVar[str] = "GPTQ with a shrunk Hessian, after awq's smoothing and with its searched scales"

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

    def _by(self, inputs: Any) -> Callable[..., Any]:
        from msquant.kernels.gptq import InputMoments

        return InputMoments([inputs], self.shrinkage, self.damping).rounded
