"""What differs from one checkpoint format to another; everything else is written by the same code."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, get_args

from numpy.typing import NDArray
from pydantic import BeforeValidator

from msquant.checkpoint.reader import Checkpoint
from msquant.checkpoint.rope_rows import RopeRows
from msquant.checkpoint.tensor_spec import TensorSpec
from msquant.checkpoint.weights import Linear, WeightSource
from msquant.errors import RecipeError
from msquant.formats.stored import stored_scheme
from msquant.schemes import Scheme

FormatName = Literal["golden-stick", "compressed-tensors", "ascend"]
"""The formats by name, as recipes and manifests have them."""

FORMAT_NAMES: tuple[FormatName, ...] = get_args(FormatName)


FORMAT_DESCRIPTION = (
    f"The checkpoint format to write: {', '.join(FORMAT_NAMES)}; or a list of them, each in its own folder."
)


def _known(value: Any) -> Any:
    names = list(value) if isinstance(value, list | tuple) else [value]
    if not names or any(name not in FORMAT_NAMES or names.count(name) > 1 for name in names):
        raise ValueError(f"one of {', '.join(FORMAT_NAMES)} is expected, or a list of them, each once")
    return names[0] if len(names) == 1 else tuple(names)


FormatNames = Annotated[FormatName | tuple[FormatName, ...], BeforeValidator(_known)]
"""One format, or several in a list, as a recipe asks for them."""


def parse_formats(text: str) -> FormatName | tuple[FormatName, ...]:
    """The formats that an option names, with commas between them. Raises RecipeError."""
    try:
        return _known([name.strip() for name in text.split(",")])
    except ValueError as error:
        raise RecipeError(f"is {text!r}: {error}", where="--format") from error


def names_of(formats: FormatName | tuple[FormatName, ...]) -> tuple[FormatName, ...]:
    """One format or several as a tuple."""
    return formats if isinstance(formats, tuple) else (formats,)


@dataclass(frozen=True)
class Finding:
    """One broken rule.

    Attributes:
        where: the tensor, layer or file.
        problem: what is wrong with it.
    """

    where: str
    problem: str

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


class Format(Protocol):
    """A checkpoint format as the consumer of one model's folder takes it.

    Tensor names are Hugging Face's; rows of what `encode_linear` takes are in the order of `row_orders`.
    """

    @property
    def name(self) -> FormatName:
        """How recipes and manifests call it."""
        ...

    @property
    def variant(self) -> str:
        """What the manifest says it is made for, for example a serving engine's backend."""
        ...

    @property
    def consumer(self) -> str:
        """Who serves such a folder, for people."""
        ...

    @property
    def schemes(self) -> Mapping[Scheme, str]:
        """The schemes a linear layer can have, with the consumer's words for them."""
        ...

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes that a model can be in."""
        ...

    def check(self, linears: Mapping[str, Scheme], config: Mapping[str, Any]) -> Iterator[Finding]:
        """Check that the consumer can run the layers of a model in the given schemes together.

        Args:
            linears: the scheme of each linear layer by module, also of those in floating point.
            config: the content of the model's `config.json`.
        """
        ...

    def row_orders(self, config: Mapping[str, Any]) -> RopeRows:
        """Whose rows are stored in another order than Hugging Face's."""
        ...

    def linear_specs(
        self, module: str, shape: tuple[int, ...], scheme: Scheme, dtype: str, bias: bool
    ) -> list[TensorSpec]:
        """The tensors that `encode_linear` makes of a quantized layer.

        Args:
            module: its name, for example `model.layers.0.self_attn.q_proj`.
            shape: `(N, K)`.
            scheme: one of `schemes`, not in floating point.
            dtype: the model's, one of `dtypes`.
            bias: whether it has one.
        """
        ...

    def encode_linear(self, module: str, linear: Linear, dtype: str) -> dict[str, NDArray[Any]]:
        """The tensors that a layer is stored as, by full name.

        Raises:
            CheckpointError: a value does not fit.
        """
        ...

    def documents(
        self, linears: Mapping[str, Scheme], names: Iterable[str], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The JSON files beside the shards that only this format has, by file name.

        Args:
            linears: as for `check`.
            names: every tensor that is stored.
            config: as for `check`.
        """
        ...

    def config_entries(
        self, linears: Mapping[str, Scheme], names: Iterable[str], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What is put into `config.json`. Arguments as for `documents`."""
        ...

    def adapted(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """`config.json` of a model in the words that the consumer takes; `config_entries` come on top."""
        ...

    def stored_schemes(self, checkpoint: Checkpoint, modules: Iterable[str]) -> dict[str, Scheme]:
        """The schemes of some modules of a folder, damaged or not; `FLOAT` where nothing says another."""
        ...

    def open(self, folder: Path) -> WeightSource:
        """Open a folder without validating it.

        Raises:
            CheckpointError: a file is missing or cannot be understood.
        """
        ...

    def validate(self, folder: Path, *, verify_hashes: bool = False) -> list[Finding]:
        """The broken rules of a folder; none for one that is correct.

        Args:
            folder: the checkpoint.
            verify_hashes: also compare every file's sha256 with the manifest.
        """
        ...

    def notes(self, config: Mapping[str, Any]) -> list[str]:
        """What keeps today's consumer from serving a correct folder of a model; often nothing."""
        ...


class PlainFormat:
    """What a `Format` is where nothing else is said: shards alone, in Hugging Face's order of rows."""

    def row_orders(self, config: Mapping[str, Any]) -> RopeRows:
        """See `Format`: none."""
        return RopeRows({}, 0)

    def documents(
        self, linears: Mapping[str, Scheme], names: Iterable[str], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See `Format`: none."""
        return {}

    def config_entries(
        self, linears: Mapping[str, Scheme], names: Iterable[str], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """See `Format`: nothing."""
        return {}

    def adapted(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Format`: as they are."""
        return dict(config)

    def stored_schemes(self, checkpoint: Checkpoint, modules: Iterable[str]) -> dict[str, Scheme]:
        """See `Format`: the tensors tell."""
        return {module: stored_scheme(checkpoint, module) for module in modules}

    def notes(self, config: Mapping[str, Any]) -> list[str]:
        """See `Format`: none."""
        return []
