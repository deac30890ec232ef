"""What the quantization pass does, as the `quantization` section of a recipe, and its golden-stick config."""

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    model_validator,
)

from msquant.errors import RecipeError
from msquant.schemes import FLOAT, PRESETS, W8A8, Scheme, parse_scheme


def _ascending(values: tuple[float, ...]) -> tuple[float, ...]:
    """Ties go to the smaller alpha, which golden-stick has from the order of its grid."""
    if list(values) != sorted(set(values)):
        raise ValueError("the grid must be in ascending order, without repetition")
    return values


def scheme_rules(value: Any) -> tuple[tuple[str, Scheme], ...]:
    """An ordered list of `pattern: scheme` as a recipe has it, `[{"lm_head": "FLOAT"}, {"*": "W8A8"}]`, read.

    Raises:
        ValueError: it is no such list, a word stands for no scheme, or the last pattern is not `*`.
    """
    if not isinstance(value, list | tuple):
        raise ValueError("a list of PATTERN: SCHEME is expected, such as [{lm_head: FLOAT}, {'*': W8A8}]")
    rules = []
    for entry in value:
        pairs = list(entry.items()) if isinstance(entry, Mapping) else [entry]
        if len(pairs) != 1 or not isinstance(pairs[0], tuple) or len(pairs[0]) != 2:
            raise ValueError(f"each entry is one PATTERN: SCHEME, not {entry!r}")
        ((pattern, word),) = pairs
        if not isinstance(pattern, str) or not pattern:
            raise ValueError(f"a pattern is a part of a linear's name, not {pattern!r}")
        if not isinstance(word, str | Scheme):
            raise ValueError(
                f"the scheme of {pattern!r} is {word!r}, one of {', '.join(PRESETS)} is expected"
            )
        try:
            rules.append((pattern, parse_scheme(word) if isinstance(word, str) else word))
        except RecipeError as error:
            raise ValueError(f"{error.what}: {error.remedy}") from error
    if not rules or rules[-1][0] != "*":
        raise ValueError("the last entry is for all other linears, such as {'*': W8A8}")
    return tuple(rules)


def _as_list(rules: tuple[tuple[str, Scheme], ...]) -> list[dict[str, str]]:
    return [{pattern: str(scheme)} for pattern, scheme in rules]


SchemeRules = Annotated[
    tuple[tuple[str, Scheme], ...], BeforeValidator(scheme_rules), PlainSerializer(_as_list)
]
"""Patterns of linears' names with the scheme of each, the first that matches before the others."""


def _matches(pattern: str, linear: str) -> bool:
    return fnmatchcase(linear, pattern) if set("*?[") & set(pattern) else pattern in linear


Alpha = Annotated[float, Field(ge=0, le=1)]
Quantile = Annotated[float, Field(ge=0, lt=1)]
Ratio = Annotated[float, Field(gt=0, le=1)]


Algorithm = Literal["osl-robust", "osl", "smoothquant", "rtn"]


# In the order in which they were looked through.
_OLD_LISTS = {"skip": "FLOAT", "weight_only": "W8A16", "dynamic": "W8A8_DYNAMIC"}


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
    schemes: SchemeRules = Field(
        (("lm_head", FLOAT), ("*", W8A8)),
        description="How each linear is computed, as an ordered list of PATTERN: SCHEME; the first pattern "
        "that matches decides. A pattern with *, ? or [ must match the full name, any other a part of it. "
        f"Schemes: {', '.join(PRESETS)}; the last pattern is '*'.",
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
        return next(scheme for pattern, scheme in self.schemes if _matches(pattern, linear))

    @model_validator(mode="before")
    @classmethod
    def _refuse_old_lists(cls, raw: Any) -> Any:
        """`skip`, `weight_only` and `dynamic`, each a list of patterns, came before `schemes`."""
        if isinstance(raw, Mapping) and (old := [key for key in _OLD_LISTS if key in raw]):
            rules = [
                {str(name): word} for key in old for name in (raw[key] or ()) for word in (_OLD_LISTS[key],)
            ]
            raise ValueError(
                f"{' and '.join(old)} became one ordered list; write schemes: "
                + json.dumps([*rules, {"*": "W8A8"}], ensure_ascii=False)
            )
        return raw

    @model_validator(mode="after")
    def _has_a_reference(self) -> "QuantizationPolicy":
        if self.search == "reference" and self.algorithm == "osl-robust":
            raise ValueError("golden-stick has no osl-robust; search: reference takes osl, smoothquant, rtn")
        if self.search == "reference" and self.algorithm == "smoothquant" and self.one_alpha != 0.5:
            raise ValueError(
                f"golden-stick's smoothquant knows only smoothquant_alpha: 0.5, not {self.one_alpha}"
            )
        return self


def ptq_config(policy: QuantizationPolicy, scheme: Scheme = W8A8, skip: Sequence[str] = ()) -> Any:
    """Translate the policy to golden-stick's `PTQConfig`.

    Args:
        policy: what was asked for.
        scheme: of the linears it is for, not in floating point. Those with a scale per token are smoothed
            too, except by osl: golden-stick's own configs for that one leave them as they are. Those with
            integer weights alone never are: golden-stick smooths for W8A8 only.
        skip: cells whose name contains one of these stay in floating point.
    """
    from mindspore import dtype
    from mindspore_gs.common import BackendTarget
    from mindspore_gs.ptq import PTQConfig, PTQMode
    from mindspore_gs.ptq.ptq_config import OutliersSuppressionType, QuantGranularity

    suppression = {
        "osl": OutliersSuppressionType.OUTLIER_SUPPRESSION_LITE,
        "osl-robust": OutliersSuppressionType.OUTLIER_SUPPRESSION_LITE,
        "smoothquant": OutliersSuppressionType.SMOOTH,
        "rtn": OutliersSuppressionType.NONE,
    }[policy.algorithm]
    if scheme.is_weight_only or (scheme.is_dynamic and policy.algorithm == "osl"):
        suppression = OutliersSuppressionType.NONE
    granularity = QuantGranularity.PER_TOKEN if scheme.is_dynamic else QuantGranularity.PER_TENSOR
    return PTQConfig(
        mode=PTQMode.QUANTIZE,
        backend=BackendTarget.ASCEND,
        opname_blacklist=list(skip),
        weight_quant_dtype=dtype.int8,
        act_quant_dtype=None if scheme.is_weight_only else dtype.int8,
        outliers_suppression=suppression,
        weight_quant_granularity=QuantGranularity.PER_CHANNEL,
        act_quant_granularity=granularity,
        algo_args={
            "smooth_alpha": list(policy.smooth_alpha),
            "weight_clip_ratio": list(policy.weight_clip_ratio),
            "range_floor": list(policy.range_floor),
            "smoothquant_alpha": policy.one_alpha,
        },
    )
