"""OutlierSuppressionLite whose ranges and strengths hold on text that calibration has not seen."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from msquant.algorithms import register
from msquant.algorithms.base import Algorithm, Alpha, ascending
from msquant.schemes import Scheme

Quantile = Annotated[float, Field(ge=0, lt=1)]


@register
class Osl(Algorithm):
    """The search of `quantization/held_out.py`, in golden-stick's pipeline."""

    summary: ClassVar[str] = (
        "OutlierSuppressionLite searched on held-out tokens, with a floor under the channels' ranges"
    )

    algorithm: Literal["osl"] = Field("osl", description=summary)
    smooth_alpha: Annotated[tuple[Alpha, ...], AfterValidator(ascending)] = Field(
        tuple(i / 20 for i in range(20)),
        min_length=1,
        description="Grid of migration strengths: 0 leaves outliers to the activations, 1 to the weights.",
    )
    range_floor: Annotated[tuple[Quantile, ...], AfterValidator(ascending)] = Field(
        (0.0, 0.5, 0.75, 0.9, 0.95),
        min_length=1,
        description="Grid of floors under a channel's range, as quantiles over all channels; 0 is no floor.",
    )
    feed_forward_alpha: Alpha | None = Field(
        None,
        description="Migration strength in feed-forward blocks with a scale per token, experts too; null: "
        "dense blocks are searched, experts stay unsmoothed.",
    )

    def suppression(self, scheme: Scheme) -> str:
        """See `Algorithm`: golden-stick smooths for quantized inputs only."""
        return "OUTLIER_SUPPRESSION_LITE" if scheme.inputs is not None else "NONE"

    @property
    def searches_feed_forward(self) -> bool:
        """See `Algorithm`."""
        return self.feed_forward_alpha is None

    @property
    def feed_forward_smoothing(self) -> float | None:
        """See `Algorithm`."""
        return self.feed_forward_alpha

    @property
    def search_options(self) -> dict[str, Any]:
        """See `Algorithm`."""
        return {"smooth_alpha": list(self.smooth_alpha), "range_floor": list(self.range_floor)}

    def modules(self) -> Sequence[Any]:
        """See `Algorithm`."""
        from msquant.algorithms.held_out import HeldOutSmoother

        return (HeldOutSmoother,)
