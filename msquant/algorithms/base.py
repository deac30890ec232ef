"""What an algorithm is: the options that a recipe gives it, and what it asks of the quantization pass."""

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from msquant.errors import RecipeError
from msquant.schemes import C8, FLOAT, PRESETS, W8A8, Quant, Scheme, parse_scheme

if TYPE_CHECKING:
    from msquant.kernels.weight_rounding import Rounder

Alpha = Annotated[float, Field(ge=0, le=1)]
"""A migration strength: 0 leaves outliers to the activations, 1 to the weights."""


def ascending(values: tuple[float, ...]) -> tuple[float, ...]:
    """Check a grid of candidates: ties go to the smaller one, which golden-stick has from the grid's order.

    Raises:
        ValueError: they are not in ascending order, or one stands twice.
    """
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
            raise ValueError(f"the scheme of {pattern!r} is {word!r}, not one of {', '.join(PRESETS)}")
        try:
            scheme = parse_scheme(word) if isinstance(word, str) else word
        except RecipeError as error:
            raise ValueError(f"{error.what}: {error.remedy}") from error
        if scheme.cache is not None:
            raise ValueError(
                f"the scheme of {pattern!r} is {scheme}: a cache is of all layers; write {pattern}: "
                f"{scheme.without_cache}, and beside schemes cache: int8"
            )
        rules.append((pattern, scheme))
    if not rules or rules[-1][0] != "*":
        raise ValueError("the last entry is for all other linears, such as {'*': W8A8}")
    return tuple(rules)


def _as_list(rules: tuple[tuple[str, Scheme], ...]) -> list[dict[str, str]]:
    return [{pattern: str(scheme)} for pattern, scheme in rules]


SchemeRules = Annotated[
    tuple[tuple[str, Scheme], ...], BeforeValidator(scheme_rules), PlainSerializer(_as_list)
]
"""Patterns of linears' names with the scheme of each, the first that matches before the others."""

# In the order in which they were looked through.
_OLD_LISTS = {"skip": "FLOAT", "weight_only": "W8A16", "dynamic": "W8A8_DYNAMIC"}


class Algorithm(BaseModel):
    """What the quantization pass does to a model: golden-stick's steps, and the scheme of each linear.

    A subclass is one algorithm, and its fields are its options, the keys of a recipe's `quantization`
    section. It gives the field `algorithm` its name, and overrides what it does beside rounding to nearest.

    Attributes:
        summary: one line for `--help` and the docs.
        takes_batches: whether its golden-stick modules take batches of samples as items; golden-stick's own
            take every item for one sample.
        rounds_by_inputs: whether its quantizer looks at what the linears read, and not at weights alone.
        looks_at_weights_alone: whether it needs no calibration text at all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    summary: ClassVar[str]
    takes_batches: ClassVar[bool] = True
    rounds_by_inputs: ClassVar[bool] = False
    looks_at_weights_alone: ClassVar[bool] = False

    algorithm: str = Field(description="How outliers are suppressed before quantization; see algorithms.md.")
    schemes: SchemeRules = Field(
        (("lm_head", FLOAT), ("*", W8A8)),
        description="How each linear is computed, as an ordered list of PATTERN: SCHEME; the first pattern "
        "that matches decides. A pattern with *, ? or [ must match the full name, any other a part of it. "
        f"Schemes: {', '.join(PRESETS)}; the last pattern is '*'. Left out of a file, all is W8A8_DYNAMIC "
        "but the head where the servers of all its formats run that.",
    )
    rotation: Literal["none", "hadamard"] = Field(
        "none",
        description="hadamard: the residual stream and the values within a head are rotated before anything "
        "else, folded into the weights; unties the output head from the embeddings.",
    )
    rotation_matrix: bool = Field(
        False,
        description="Write the matrix by which the residual stream is rotated beside the weights, for the "
        "ascend format: vllm-ascend turns an EAGLE-3 draft of the plain model with it.",
    )
    cache: Literal["none", "int8"] = Field(
        "none",
        description="int8: the server keeps keys and values in int8, with a scale for every channel of each "
        "head, or the latent state of latent attention with one scale; for the ascend format.",
    )
    min_expert_tokens: int = Field(
        32,
        ge=1,
        description="An expert that got fewer calibration tokens is given those that came nearest to going "
        "to it; with fewer still, it is listed and quantized from its weights alone.",
    )

    def scheme(self, linear: str) -> Scheme:
        """How the linear of that full name, for example `model.layers.0.mlp.up_proj`, is computed.

        How keys and values are kept is not in it, see `cache_quant`.
        """
        return next(scheme for pattern, scheme in self.schemes if matches(pattern, linear))

    @property
    def cache_quant(self) -> Quant | None:
        """How keys and values are kept; None in floating point."""
        return C8 if self.cache == "int8" else None

    def smooths(self, scheme: Scheme) -> bool:
        """Whether groups of linears in that scheme share a smooth scale."""
        return self.suppression(scheme) != "NONE"

    def suppression(self, scheme: Scheme) -> str:
        """The member of golden-stick's `OutliersSuppressionType` for groups of linears in that scheme.

        NONE where they share no smooth scale. golden-stick's check of a config decides which it may be.
        """
        return "NONE"

    @property
    def searches_feed_forward(self) -> bool:
        """Whether dense feed-forward blocks with a scale per token are searched with the attention."""
        return False

    @property
    def feed_forward_smoothing(self) -> float | None:
        """The migration strength in feed-forward blocks that go one expert at a time; None: no smoothing."""
        return None

    @property
    def search_options(self) -> dict[str, Any]:
        """What its modules read from `PTQConfig.algo_args`."""
        return {}

    def modules(self) -> Sequence[Any]:
        """The golden-stick modules it runs before weights are rounded, each made with a `report`."""
        return ()

    def quantizer(self) -> Any:
        """The golden-stick module that rounds the weights."""
        from msquant.kernels.quantizer import FastQuantizer

        return FastQuantizer

    def rounder(self, inputs: Any) -> "Rounder":
        """How the weights of an expert are rounded that read these inputs; golden-stick never sees experts.

        Args:
            inputs: float32 `[T, K]`; T may be 0.

        Returns:
            As `msquant.kernels.weight_rounding.quantize_weight` is called and returns.
        """
        from msquant.kernels.weight_rounding import quantize_weight

        return quantize_weight

    def ptq_config(self, scheme: Scheme = W8A8, skip: Sequence[str] = (), dtype: str = "float32") -> Any:
        """golden-stick's `PTQConfig` for linears in a scheme.

        Args:
            scheme: of the linears it is for, not in floating point.
            skip: cells whose name contains one of these stay in floating point.
            dtype: the model's; see `Scheme.scale_dtype`.
        """
        from mindspore import dtype as types
        from mindspore_gs.common import BackendTarget
        from mindspore_gs.ptq import PTQConfig, PTQMode
        from mindspore_gs.ptq.ptq_config import OutliersSuppressionType, QuantGranularity

        granularity = QuantGranularity.PER_TOKEN if scheme.is_dynamic else QuantGranularity.PER_TENSOR
        return PTQConfig(
            mode=PTQMode.QUANTIZE,
            backend=BackendTarget.ASCEND,
            opname_blacklist=list(skip),
            weight_quant_dtype=types.int8,
            act_quant_dtype=None if scheme.is_weight_only else types.int8,
            outliers_suppression=OutliersSuppressionType[self.suppression(scheme)],
            weight_quant_granularity=QuantGranularity.PER_CHANNEL,
            act_quant_granularity=granularity,
            algo_args={
                **self.search_options,
                "scheme": str(scheme),
                "weight_scale_dtype": scheme.scale_dtype(dtype),
            },
        )

    @model_validator(mode="before")
    @classmethod
    def _refuse_old_lists(cls, raw: Any) -> Any:
        """`skip`, `weight_only` and `dynamic`, each a list of patterns, came before `schemes`."""
        if isinstance(raw, Mapping) and (old := [key for key in _OLD_LISTS if key in raw]):
            rules = [{str(name): _OLD_LISTS[key]} for key in old for name in raw[key] or ()]
            raise ValueError(
                f"{' and '.join(old)} became one ordered list; write schemes: "
                + json.dumps([*rules, {"*": "W8A8"}], ensure_ascii=False)
            )
        return raw


def matches(pattern: str, linear: str) -> bool:
    """Whether a pattern of a recipe is a part of a name; one with `*`, `?` or `[` has to match all of it."""
    return fnmatchcase(linear, pattern) if set("*?[") & set(pattern) else pattern in linear
