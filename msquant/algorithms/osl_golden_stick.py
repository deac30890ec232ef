"""OutlierSuppressionLite with golden-stick's exact arithmetic, to compare with its own results."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from msquant.algorithms import register
from msquant.algorithms.base import Algorithm, Alpha, ascending
from msquant.schemes import Scheme

Ratio = Annotated[float, Field(gt=0, le=1)]


@register
class OslGoldenStick(Algorithm):
    """golden-stick's search and clipping on ranges of the very tokens that they were measured on."""

    summary: ClassVar[str] = "golden-stick's OutlierSuppressionLite to the digit, with its clipping"

    algorithm: Literal["osl-golden-stick"] = Field("osl-golden-stick", description=summary)
    smooth_alpha: Annotated[tuple[Alpha, ...], AfterValidator(ascending)] = Field(
        tuple(i / 20 for i in range(20)),
        min_length=1,
        description="Grid of migration strengths: 0 leaves outliers to the activations, 1 to the weights.",
    )
    weight_clip_ratio: tuple[Ratio, ...] = Field(
        tuple(1 - i / 20 for i in range(10)),
        min_length=1,
        description="Grid of ratios that a weight row's range is clipped to.",
    )
    feed_forward_alpha: Alpha | None = Field(
        None,
        description="Migration strength in feed-forward blocks with a scale per token, experts too; null: "
        "no smoothing, as golden-stick has it.",
    )

    def suppression(self, scheme: Scheme) -> str:
        """See `Algorithm`: golden-stick's own configs leave linears with a scale per token as they are."""
        return "OUTLIER_SUPPRESSION_LITE" if scheme.is_static else "NONE"

    @property
    def feed_forward_smoothing(self) -> float | None:
        """See `Algorithm`."""
        return self.feed_forward_alpha

    @property
    def search_options(self) -> dict[str, Any]:
        """See `Algorithm`."""
        return {
            "smooth_alpha": list(self.smooth_alpha),
            "weight_clip_ratio": list(self.weight_clip_ratio),
        }

    def modules(self) -> Sequence[Any]:
        """See `Algorithm`."""
        from msquant.algorithms.clip import FastClipper
        from msquant.algorithms.smoothers import FastOSLSmoother

        return FastOSLSmoother, FastClipper
