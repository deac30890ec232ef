"""What a report takes from `msquant.json`: typed, with a default for all that an older version did not write.

The file may come with a folder that somebody else made, so nothing in it is taken for granted: names lose
what no document can hold, and numbers that are none count as not recorded.
"""

import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.results import MANIFEST_NAME
from msquant.errors import CheckpointError

M = TypeVar("M", bound=BaseModel)

_LONGEST_NAME = 200
_LARGEST = 1e30
"""Nothing that is measured reaches this; axes end somewhere."""
# Control characters, which XML has no way to write, and halves of surrogate pairs, which UTF-8 has none for.
_UNWRITABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def printable(text: str) -> str:
    """A text without what HTML, SVG or UTF-8 cannot hold."""
    return _UNWRITABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def _name(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = printable(value).replace("\n", " ")
    return text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}..."


def _measured(value: Any) -> Any:
    return None if isinstance(value, float | int) and not abs(value) < _LARGEST else value


def _piece(value: Any) -> Any:
    return _name(
        value.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}") if isinstance(value, str) else value
    )


Piece = Annotated[str, BeforeValidator(_piece)]
"""A token's text, with a visible mark where a line ends."""
Name = Annotated[str, BeforeValidator(_name)]
Number = Annotated[float | None, BeforeValidator(_measured)]
Count = Annotated[int, Field(ge=0, le=2**53)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Ranges(_Record):
    """The channels' greatest magnitudes; see `kernels.report.ChannelRanges`."""

    median: Number = None
    p99: Number = None
    largest: Number = None


class Group(_Record):
    """What was chosen for a smooth group; see `kernels.report.GroupReport`."""

    name: Name
    alpha: Number = None
    loss: Number = None
    range_floor: Number = None
    before: Ranges | None = None
    after: Ranges | None = None


class Experts(_Record):
    """Calibration tokens of every routed expert, those that it was lent, and which got too few even so."""

    tokens: list[Count] = Field(default_factory=list)
    lent_tokens: list[Count] = Field(default_factory=list)
    few_tokens: list[Count] = Field(default_factory=list)


class Layer(_Record):
    """One decoder layer."""

    index: Count
    error: Number = None
    groups: list[Group] = Field(default_factory=list)
    mean_clip_ratio: dict[Name, Number] = Field(default_factory=dict)
    experts: Experts | None = None


class File(_Record):
    """A file of the folder."""

    size: Count
    sha256: Name


class RecordedSource(_Record):
    """The checkpoint that was quantized."""

    shards: dict[Name, Count] = Field(default_factory=dict)
    sha256: Name | None = None


class RecordedTokens(_Record):
    """The calibration tokens."""

    shape: list[Count] = Field(default_factory=list)
    sha256: Name | None = None


class RecordedTextScore(_Record):
    """How a text is predicted; see `evaluation.scores.TextScore`."""

    text: Name = ""
    tokens: Count | None = None
    perplexity: Number = None
    baseline_perplexity: Number = None
    kl: Number = None
    top1: Number = None
    top5: Number = None
    logit_error: Number = None


class RecordedLayerScore(_Record):
    """Signal-to-noise of a decoder layer's output in dB; see `evaluation.scores.LayerScore`."""

    index: Count
    snr: Number = None
    own_snr: Number = None


class RecordedLimits(_Record):
    """The limits in the `evaluation` section of the recipe; see `EvaluationSettings`."""

    max_kl: Number = None
    max_perplexity_increase: Number = None


class Broken(_Record):
    """A limit of the recipe that a result breaks: `kl` or `perplexity_increase`."""

    measure: Name
    value: Number = None
    limit: Number = None


class RecordedPrediction(_Record):
    """Next tokens of both models, token by token of a text; see `evaluation.predictions.Prediction`."""

    text: Name = ""
    before: Piece = ""
    actual: list[Piece] = Field(default_factory=list)
    expected: list[Piece] = Field(default_factory=list)
    found: list[Piece] = Field(default_factory=list)

    @property
    def places(self) -> list[tuple[str, str, str]]:
        """The text's own token, the float model's and the quantized one's of each place."""
        return list(zip(self.actual, self.expected, self.found, strict=False))

    @property
    def agreeing(self) -> int:
        """In how many places both models find the same."""
        return sum(expected == found for _, expected, found in self.places)


class Evaluation(_Record):
    """The record of the short evaluation at the end of `msquant quantize`; see `short_evaluation.py`."""

    texts: list[RecordedTextScore] = Field(default_factory=list)
    overall: RecordedTextScore | None = None
    layers: list[RecordedLayerScore] = Field(default_factory=list)
    beyond: list[Broken] | None = None
    predictions: list[RecordedPrediction] = Field(default_factory=list)

    @property
    def own_snr(self) -> dict[int, float | None]:
        """Signal-to-noise of each decoder layer's own, in dB."""
        return {layer.index: layer.own_snr for layer in self.layers}


class RecordedRound(_Record):
    """A round of a promise; see `flows.promise.Round`."""

    number: Count = 0
    choice: dict[Name, Number] = Field(default_factory=dict)
    verdict: dict[Name, Number] = Field(default_factory=dict)


class RecordedPromise(_Record):
    """What was promised of a folder and measured; see `flows.promise`."""

    max_kl: Number = None
    max_perplexity_increase: Number = None
    max_bytes: Number = None
    kept: bool = False
    round: Count = 0
    rounds: list[RecordedRound] = Field(default_factory=list)

    def of(self, texts: str) -> str | None:
        """KL by text of the round that the folder is of: of its `choice` or its `verdict` texts."""
        mine = next((each for each in self.rounds if each.number == self.round), RecordedRound())
        found: dict[str, float | None] = getattr(mine, texts)
        listed = sorted(((kl, name) for name, kl in found.items() if kl is not None), reverse=True)
        return ", ".join(f"{name} {kl:.4f}" for kl, name in listed) or None


class Manifest(_Record):
    """`msquant.json`, as far as a report shows it; all of it is empty where there is none."""

    versions: dict[Name, Name] = Field(default_factory=dict)
    recipe: dict[str, Any] = Field(default_factory=dict)
    source: RecordedSource = Field(default_factory=RecordedSource)
    calibration: RecordedTokens = Field(default_factory=RecordedTokens)
    device: Name | None = None
    layers: list[Layer] = Field(default_factory=list)
    files: dict[Name, File] = Field(default_factory=dict)
    evaluation: Evaluation | None = None
    promise: RecordedPromise | None = None


def read_manifest(folder: Path) -> Manifest:
    """Read a folder's manifest; an empty one where there is none.

    Raises:
        CheckpointError: it is not JSON, or a value is of a wrong type; names the value's place.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        return Manifest()
    return parse(Manifest, read_json(path), path, "copy the folder again, or quantize again")


def parse(model: type[M], raw: Any, where: Path, remedy: str) -> M:
    """Check plain data that a file held.

    Raises:
        CheckpointError: a value is of a wrong type.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{place}: {first['msg']}", where=where, remedy=remedy) from error
