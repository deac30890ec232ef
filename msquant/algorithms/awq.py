"""AWQ: columns that loud channels meet are enlarged before their weight is rounded."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from msquant.algorithms import register
from msquant.algorithms.base import Alpha, ascending
from msquant.algorithms.osl import Osl
from msquant.schemes import Scheme

if TYPE_CHECKING:
    from msquant.kernels.weight_rounding import Rounder


@register
class Awq(Osl):
    """The idea of Lin et al., "AWQ" (arXiv 2306.00978), for weights alone and with a scale per token.

    What differs from golden-stick's: `algorithms/loudness.py`, and scales of the weights that are searched.
    Static ranges are `osl`'s.
    """

    summary: ClassVar[str] = "AWQ with searched exponents and scales; osl's smoothing where static"
    rounds_by_inputs: ClassVar[bool] = True

    algorithm: Literal["awq"] = Field("awq", description=summary)  # type: ignore[assignment]
    loudness_alpha: Annotated[tuple[Alpha, ...], AfterValidator(ascending)] = Field(
        (0.0, 0.2, 0.35, 0.5, 0.65),
        min_length=1,
        description="Grid of exponents of the channels' mean magnitudes, of which columns are enlarged by "
        "the best; only 0: they stay as they are.",
    )
    search_scales: bool = Field(
        True,
        description="Choose each scale of the weights by the least error weighted with the channels' "
        "squares; false: from the greatest weight.",
    )

    def suppression(self, scheme: Scheme) -> str:
        """See `Algorithm`; integers of 8 bits are so fine that no column has to be enlarged."""
        if scheme.is_weight_only:
            return "AWQ" if scheme.is_int4 else "NONE"
        return super().suppression(scheme)

    @property
    def search_options(self) -> dict[str, Any]:
        """See `Algorithm`."""
        return {
            **super().search_options,
            "loudness_alpha": list(self.loudness_alpha),
            "algorithm": self,
        }

    def modules(self) -> Sequence[Any]:
        """See `Algorithm`."""
        from msquant.algorithms.loudness import LoudnessSmoother

        return (LoudnessSmoother,)

    def quantizer(self) -> Any:
        """See `Algorithm`."""
        from msquant.kernels.quantizer import ByInputsQuantizer

        return ByInputsQuantizer

    def rounder(self, inputs: Any) -> "Rounder":
        """See `Algorithm`; without inputs, from the weights alone."""
        if not len(inputs):
            return super().rounder(inputs)
        return partial(self._by(inputs), ratios=self._ratios)

    def _by(self, inputs: Any) -> Callable[..., Any]:
        from msquant.kernels.gptq import InputMoments

        return InputMoments([inputs]).nearest

    @property
    def _ratios(self) -> tuple[float, ...]:
        from msquant.kernels.gptq import SCALE_RATIOS

        return SCALE_RATIOS if self.search_scales else (1.0,)
