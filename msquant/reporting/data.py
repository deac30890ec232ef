"""All that a report says, as plain data: the HTML, the Markdown and the JSON have the same numbers."""

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
    """A decoder layer or a group of linears, by the noise that quantizing it adds.

    Attributes:
        name: for example `layer 11` or `layer 11 down`.
        patterns: that name its linears in a recipe.
        snr: of its own, in dB: `-10 log10(noise)`; None where it adds no noise.
        noise: mean relative squared error of the residual stream, see `evaluation/ranking.py`.
        share: of the noise of all.
        scheme: of a group; empty for a layer.
        float_bytes: what the folder grows by if a group stays in floating point; None if that is not known.
        dynamic_error: a group's with a scale per token; None where that was not measured.
    """

    name: str
    patterns: tuple[str, ...]
    snr: float | None
    noise: float
    share: float
    scheme: str = ""
    float_bytes: int | None = None
    dynamic_error: float | None = None


@dataclass(frozen=True)
class Ranking:
    """What costs most.

    Attributes:
        origin: where the numbers are from.
        rows: the one that adds most noise first.
    """

    origin: str
    rows: tuple[RankedRow, ...]


@dataclass(frozen=True)
class FrontierRow:
    """An assignment of schemes, and what is predicted of it; see `flows.frontier.FrontierPoint`.

    Attributes:
        nbytes: of the folder's safetensors files.
        kl: on the choice text on which it is greatest, in nats.
        linears: how many each scheme has.
    """

    nbytes: int
    kl: float
    linears: dict[str, int]

    @property
    def listed(self) -> str:
        """How many linears each scheme has: `154 W8A16, 56 W4A16_G64`."""
        return ", ".join(f"{count} {word}" for word, count in self.linears.items())


@dataclass(frozen=True)
class FrontierRows:
    """Size against KL, from the fewest bits to floating point.

    Attributes:
        origin: where the numbers are from.
        rows: the smallest first.
    """

    origin: str
    rows: tuple[FrontierRow, ...]


@dataclass(frozen=True)
class Limits:
    """What the recipe allows at most; each None where it does not say.

    Attributes:
        kl: KL divergence from the float model, in nats.
        perplexity_increase: as a part of the float model's perplexity.
    """

    kl: float | None = None
    perplexity_increase: float | None = None

    def perplexity(self, baseline: float | None) -> float | None:
        """The greatest perplexity allowed beside the float model's; None where either is not known."""
        if baseline is None or self.perplexity_increase is None:
            return None
        return baseline * (1 + self.perplexity_increase)


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

    @property
    def spread(self) -> tuple[int, int, int]:
        """The fewest tokens, the upper median and the most; there is an expert."""
        ordered = sorted(self.tokens)
        return ordered[0], ordered[len(ordered) // 2], ordered[-1]

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
class Fix:
    """How to lose less: the worst parts once more, in floating point.

    Attributes:
        spared: names of the parts, as the ranking has them.
        algorithm: that quantizes all else.
        share: of the noise that the parts add now.
        nbytes: what the folder grows by.
        command: makes the recipe and the folder.
    """

    spared: tuple[str, ...]
    algorithm: str
    share: float
    nbytes: int
    command: Command


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
        fix: how to lose less; None where that is not known.
        frontier: what other schemes would take and lose; None where that was not asked.
        limits: of the recipe.
        date: of `msquant.json`, by the file system, `2026-11-28` in UTC; None without one.
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
    fix: Fix | None
    frontier: FrontierRows | None
    limits: Limits
    date: str | None
    recipe: str
    facts: dict[str, str]
    versions: dict[str, str]
    files: dict[str, File]
    serving: tuple[Command, ...]

    @property
    def groups(self) -> list[str]:
        """Names of the smooth groups, in order of computation."""
        return list(dict.fromkeys(group.name for layer in self.layers for group in layer.groups))


def as_plain(value: Any) -> Any:
    """Plain data for JSON, of dataclasses and pydantic models alike."""
    from pydantic import TypeAdapter

    return TypeAdapter(type(value)).dump_python(value, mode="json")
