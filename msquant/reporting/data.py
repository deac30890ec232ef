"""All that a report says, as plain data: the HTML, the Markdown and the JSON have the same numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from msquant.reporting.histograms import Histogram
from msquant.reporting.manifest_data import Evaluation, File, Layer

Level = Literal["good", "check", "bad"]


@dataclass(frozen=True)
class ReportVerdict:
    """Whether to serve the folder.

    Attributes:
        level: `good`; `check`: look before you serve it; `bad`: do not.
        reason: one sentence.
        remarks: what else there is to know or to do, a sentence each.
    """

    level: Level
    reason: str
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Size:
    """Bytes on disk.

    Attributes:
        tensors: of all tensors.
        source: of the shards it was made from; None where that is not recorded.
        half: what the same weights take at 16 bits each.
        parameters: elements of all weights.
        quantized: how many of them are integers, by the integers' width in bits.
    """

    tensors: int
    source: int | None
    half: int
    parameters: int
    quantized: dict[int, int]


@dataclass(frozen=True)
class Reads:
    """Bytes of weights that one token takes to be read, which bounds the speed of decoding one prompt.

    It counts the decoder layers and the output head, and of routed experts those that work on one token.

    Attributes:
        stored: as they are stored.
        half: at 16 bits a weight.
    """

    stored: int
    half: int


@dataclass(frozen=True)
class KindRow:
    """Modules that are alike but for their layer.

    Attributes:
        kind: for example `self_attn.q_proj`.
        modules: how many there are.
        scheme: as the folder's description has it.
        dtype: safetensors dtype of the weight.
        shape: of the weight.
        nbytes: of all their tensors.
        static_range: the smallest and the largest range of their static int8 activations, that is 255 steps
            of the input scale; None without one.
    """

    kind: str
    modules: int
    scheme: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    static_range: tuple[float, float] | None


@dataclass(frozen=True)
class RankedRow:
    """A decoder layer or a group of linears, by what quantizing it costs.

    Attributes:
        name: for example `layer 11` or `layer 11 down`.
        error: relative error.
        share: of the sum of all.
        scheme: of a group; empty for a layer.
        float_bytes: what the folder grows by if a group stays in floating point; None if that is not known.
        dynamic_error: a group's with a scale per token; None where that was not measured.
    """

    name: str
    error: float
    share: float
    scheme: str = ""
    float_bytes: int | None = None
    dynamic_error: float | None = None


@dataclass(frozen=True)
class Ranking:
    """What costs most.

    Attributes:
        origin: where the numbers are from.
        rows: the greatest error first.
    """

    origin: str
    rows: tuple[RankedRow, ...]


@dataclass(frozen=True)
class ExpertsRow:
    """Calibration tokens that a layer's routed experts got.

    Attributes:
        layer: its number.
        tokens: of each expert, by the router.
        few: how many got too few to be calibrated, with those that they were lent.
    """

    layer: int
    tokens: tuple[int, ...]
    few: int

    def below(self, minimum: int) -> int:
        """How many experts got fewer than `minimum` by the router."""
        return sum(tokens < minimum for tokens in self.tokens)


@dataclass(frozen=True)
class Command:
    """A command line to copy.

    Attributes:
        what: what it does.
        lines: as a shell takes them.
    """

    what: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """A checkpoint folder, and what quantization did to it.

    Attributes:
        name: of the folder.
        architecture: from config.json, or None.
        format: the format's name, or None for a model in floating point.
        consumer: who serves it, for people; None likewise.
        dtype: the model's, or None.
        checked: whether every weight was read to check the format's contract.
        findings: broken rules of it.
        notes: what may keep the consumer from serving a correct folder.
        verdict: whether to serve it.
        size: bytes on disk.
        reads: bytes a token; None where config.json does not say how many experts work.
        evaluation: accuracy; None where it was not measured.
        kinds: the modules.
        layers: what the manifest says of the decoder layers; empty without one.
        histograms: of integer weights, by kind.
        experts: tokens by layer; empty where there are no experts.
        min_expert_tokens: fewer are too few; None where the recipe is not known.
        ranking: what costs most; None where nothing is known of that.
        recipe: as YAML; empty without one.
        facts: what it was made from, by name.
        versions: of the packages that made it.
        files: with sizes and hashes, by name.
        serving: commands.
    """

    name: str
    architecture: str | None
    format: str | None
    consumer: str | None
    dtype: str | None
    checked: bool
    findings: tuple[str, ...]
    notes: tuple[str, ...]
    verdict: ReportVerdict
    size: Size
    reads: Reads | None
    evaluation: Evaluation | None
    kinds: tuple[KindRow, ...]
    layers: tuple[Layer, ...]
    histograms: tuple[Histogram, ...]
    experts: tuple[ExpertsRow, ...]
    min_expert_tokens: int | None
    ranking: Ranking | None
    recipe: str
    facts: dict[str, str]
    versions: dict[str, str]
    files: dict[str, File]
    serving: tuple[Command, ...]

    @property
    def groups(self) -> list[str]:
        """Names of the smooth groups, in order of computation."""
        return list(dict.fromkeys(group.name for layer in self.layers for group in layer.groups))

    @property
    def errors(self) -> list[float]:
        """The layers' errors that are known, in ascending order."""
        return sorted(layer.error for layer in self.layers if layer.error is not None)


def quantile(values: Sequence[float], q: float) -> float | None:
    """Of ascending values, the one at that part of the way; None of none."""
    return values[min(len(values) - 1, int(q * len(values)))] if values else None


def as_plain(value: Any) -> Any:
    """Plain data for JSON, of dataclasses and pydantic models alike."""
    from pydantic import TypeAdapter

    return TypeAdapter(type(value)).dump_python(value, mode="json")
