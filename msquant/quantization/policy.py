"""What the quantization pass does, as the `quantization` section of a recipe, and its golden-stick config."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from msquant.checkpoint.weights import Scheme


def _ascending(values: tuple[float, ...]) -> tuple[float, ...]:
    """Ties go to the smaller alpha, which golden-stick has from the order of its grid."""
    if list(values) != sorted(set(values)):
        raise ValueError("the grid must be in ascending order, without repetition")
    return values


Alpha = Annotated[float, Field(ge=0, le=1)]
Quantile = Annotated[float, Field(ge=0, lt=1)]
Ratio = Annotated[float, Field(gt=0, le=1)]


Algorithm = Literal["osl-robust", "osl", "smoothquant", "rtn"]


class QuantizationPolicy(BaseModel):
    """Int8 weights per channel; activations static per tensor, with a scale per token, or not quantized."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    algorithm: Algorithm = Field(
        "osl-robust",
        description="How outliers are suppressed before quantization. osl: golden-stick's "
        "OutlierSuppressionLite; osl-robust: its search on held-out tokens, with a floor under the channels' "
        "ranges; smoothquant: one alpha for all; rtn: not at all, round to nearest.",
    )
    search: Literal["fast", "reference"] = Field(
        "fast",
        description="fast: msquant's search, the same arithmetic at a fraction of the time; "
        "reference: golden-stick's own modules.",
    )
    smooth_alpha: Annotated[tuple[Alpha, ...], AfterValidator(_ascending)] = Field(
        tuple(i / 20 for i in range(20)),
        min_length=1,
        description="Grid of migration strengths: 0 leaves outliers to the activations, 1 to the weights; "
        "of osl and osl-robust.",
    )
    range_floor: Annotated[tuple[Quantile, ...], AfterValidator(_ascending)] = Field(
        (0.0, 0.5, 0.75, 0.9, 0.95),
        min_length=1,
        description="Grid of floors under a channel's range, as quantiles over all channels; 0 is no floor; "
        "of osl-robust.",
    )
    smoothquant_alpha: Alpha | None = Field(
        None,
        description="Migration strength of smoothquant; null: 0.6, or 0.5 with search: reference, "
        "which knows no other.",
    )
    weight_clip_ratio: tuple[Ratio, ...] = Field(
        tuple(1 - i / 20 for i in range(10)),
        min_length=1,
        description="Grid of ratios that a weight row's range is clipped to; of osl.",
    )
    skip: tuple[str, ...] = Field(
        ("lm_head",), description="Linears whose name contains one of these stay in floating point."
    )

    weight_only: tuple[str, ...] = Field(
        (),
        description="Linears whose name contains one of these get int8 weights and floating-point "
        "activations (W8A16), rounded to nearest by any algorithm; of the ascend format.",
    )
    dynamic: tuple[str, ...] = Field(
        (),
        description="Linears whose name contains one of these get a scale per token, not a static one.",
    )

    feed_forward_alpha: Alpha | None = Field(
        None,
        description="Migration strength of smoothing in feed-forward blocks with a scale per token, experts "
        "included; null: smoothquant takes its own, osl-robust searches dense blocks, the rest stays "
        "unsmoothed; of all but rtn.",
    )
    min_expert_tokens: int = Field(
        8,
        ge=1,
        description="An expert that got fewer calibration tokens is listed, and quantized from its weights "
        "alone.",
    )

    @property
    def one_alpha(self) -> float:
        """The migration strength that smoothquant gives every group."""
        if self.smoothquant_alpha is None:
            return 0.5 if self.search == "reference" else 0.6
        return self.smoothquant_alpha

    @property
    def feed_forward_smoothing(self) -> float | None:
        """The migration strength in feed-forward blocks that go one expert at a time; None: none."""
        if self.algorithm == "rtn":
            return None
        if self.feed_forward_alpha is None and self.algorithm == "smoothquant":
            return self.one_alpha
        return self.feed_forward_alpha

    def scheme(self, linear: str) -> Scheme:
        """How the linear of that full name, for example `model.layers.0.mlp.up_proj`, is computed."""
        if any(name in linear for name in self.skip):
            return "float"
        if any(name in linear for name in self.weight_only):
            return "weight_only"
        return "dynamic" if any(name in linear for name in self.dynamic) else "static"

    @model_validator(mode="after")
    def _has_a_reference(self) -> "QuantizationPolicy":
        if self.search == "reference" and self.algorithm == "osl-robust":
            raise ValueError("golden-stick has no osl-robust; search: reference takes osl, smoothquant, rtn")
        if self.search == "reference" and self.algorithm == "smoothquant" and self.one_alpha != 0.5:
            raise ValueError(
                f"golden-stick's smoothquant knows only smoothquant_alpha: 0.5, not {self.one_alpha}"
            )
        return self


def ptq_config(
    policy: QuantizationPolicy,
    scheme: Scheme = "static",
    skip: Sequence[str] = (),
    dtype: str = "float32",
) -> Any:
    """Translate the policy to golden-stick's `PTQConfig`.

    Args:
        policy: what was asked for.
        scheme: of the linears it is for, not `float`. Those with a scale per token (`dynamic`) are smoothed
            too, except by osl: golden-stick's own configs for that one leave them as they are. Those with
            int8 weights alone (`weight_only`) never are: golden-stick smooths for W8A8 only.
        skip: cells whose name contains one of these stay in floating point.
        dtype: the model's, in which engines keep the scales of weights, except where activations are static:
            there they have the product with the input's scale, in float32.
    """
    from mindspore import dtype as types
    from mindspore_gs.common import BackendTarget
    from mindspore_gs.ptq import PTQConfig, PTQMode
    from mindspore_gs.ptq.ptq_config import OutliersSuppressionType, QuantGranularity

    suppression = {
        "osl": OutliersSuppressionType.OUTLIER_SUPPRESSION_LITE,
        "osl-robust": OutliersSuppressionType.OUTLIER_SUPPRESSION_LITE,
        "smoothquant": OutliersSuppressionType.SMOOTH,
        "rtn": OutliersSuppressionType.NONE,
    }[policy.algorithm]
    if scheme == "weight_only" or (scheme == "dynamic" and policy.algorithm == "osl"):
        suppression = OutliersSuppressionType.NONE
    granularity = QuantGranularity.PER_TOKEN if scheme == "dynamic" else QuantGranularity.PER_TENSOR
    return PTQConfig(
        mode=PTQMode.QUANTIZE,
        backend=BackendTarget.ASCEND,
        opname_blacklist=list(skip),
        weight_quant_dtype=types.int8,
        act_quant_dtype=None if scheme == "weight_only" else types.int8,
        outliers_suppression=suppression,
        weight_quant_granularity=QuantGranularity.PER_CHANNEL,
        act_quant_granularity=granularity,
        algo_args={
            "smooth_alpha": list(policy.smooth_alpha),
            "weight_clip_ratio": list(policy.weight_clip_ratio),
            "range_floor": list(policy.range_floor),
            "smoothquant_alpha": policy.one_alpha,
            "weight_scale_dtype": "float32" if scheme == "static" else dtype,
        },
    )
