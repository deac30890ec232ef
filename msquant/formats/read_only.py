"""A format of other tools, which msquant reads and does not write."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from numpy.typing import NDArray

from msquant.checkpoint.weights import QuantizedLinear
from msquant.errors import RecipeError
from msquant.formats.base import Format
from msquant.schemes import Scheme


@dataclass(frozen=True)
class ReadOnlyFormat(Format):
    """A format that folders are read from, to be run, compared or exported to one that msquant writes.

    `open`, `stored` and `stored_schemes` are what it has; no recipe and no `--format` can name it.
    """

    written: ClassVar[bool] = False
    dtypes: ClassVar[tuple[str, ...]] = ()

    @property
    def words(self) -> Mapping[Scheme, str]:
        """None: nothing is written in it."""
        return {}

    def part_specs(
        self, module: str, shape: tuple[int, ...], scheme: Scheme, dtype: str
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Raises RecipeError."""
        self._refuse()

    def encode_parts(
        self, module: str, linear: QuantizedLinear, dtype: str, bias: NDArray[Any] | None
    ) -> dict[str, NDArray[Any]]:
        """Raises RecipeError."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise RecipeError(
            f"{self.name} is a format that msquant reads and does not write",
            where="format",
            remedy="write compressed-tensors, which holds the same numbers",
        )

    def notes(self, config: Mapping[str, Any]) -> list[str]:
        """That it is read alone."""
        return [
            f"msquant reads {self.name} and does not write it; msquant export FOLDER --format "
            "compressed-tensors keeps every integer, scale and zero point"
        ]
