"""SmoothQuant (arXiv 2211.10438): one migration strength for every group of linears, nothing searched."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from msquant.algorithms import register
from msquant.algorithms.base import Algorithm, Alpha
from msquant.schemes import Scheme


@register
class SmoothQuant(Algorithm):
    """golden-stick's SmoothQuant, whose own strength is 0.5, with a strength of one's choice."""

    summary: ClassVar[str] = "SmoothQuant, one migration strength for all"

    algorithm: Literal["smoothquant"] = Field("smoothquant", description=summary)
    smoothquant_alpha: Alpha = Field(0.6, description="Migration strength of every group.")
    feed_forward_alpha: Alpha | None = Field(
        None,
        description="Migration strength in feed-forward blocks with a scale per token, experts too; null: "
        "that of every group.",
    )

    def suppression(self, scheme: Scheme) -> str:
        """See `Algorithm`: golden-stick smooths for quantized inputs only."""
        return "SMOOTH" if scheme.inputs is not None else "NONE"

    @property
    def feed_forward_smoothing(self) -> float | None:
        """See `Algorithm`."""
        return self.smoothquant_alpha if self.feed_forward_alpha is None else self.feed_forward_alpha

    @property
    def search_options(self) -> dict[str, Any]:
        """See `Algorithm`."""
        return {"smoothquant_alpha": self.smoothquant_alpha}

    def modules(self) -> Sequence[Any]:
        """See `Algorithm`."""
        from msquant.algorithms.smoothers import OneAlphaSmoother

        return (OneAlphaSmoother,)
