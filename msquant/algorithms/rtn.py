"""Round to nearest: no outliers are suppressed."""

from typing import ClassVar, Literal

from pydantic import Field

from msquant.algorithms import register
from msquant.algorithms.base import Algorithm


@register
class Rtn(Algorithm):
    """golden-stick's quantizer alone."""

    summary: ClassVar[str] = "round to nearest; outliers stay where they are"
    looks_at_weights_alone: ClassVar[bool] = True

    algorithm: Literal["rtn"] = Field("rtn", description=summary)
