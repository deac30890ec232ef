"""Which tensor goes into which shard, decided before any of them is computed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from msquant.checkpoint.tensor_spec import TensorSpec
from msquant.checkpoint.writer import shard_name
from msquant.errors import OutputError

MAX_SHARD_BYTES = 5_000_000_000
"""The limit that transformers keeps to."""


@dataclass(frozen=True)
class PlannedShard:
    """A safetensors file that will be written.

    Attributes:
        file_name: for example `model-00001-of-00163.safetensors`.
        specs: its tensors, in the order they were given.
    """

    file_name: str
    specs: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors, without the header."""
        return sum(spec.nbytes for spec in self.specs)


def plan_shards(
    groups: Sequence[Sequence[TensorSpec]], max_bytes: int = MAX_SHARD_BYTES
) -> list[list[PlannedShard]]:
    """Cut groups of tensors into shards.

    Every group starts a new shard, and its order is kept: what stands together, such as an expert's tensors,
    is cut apart at most once a shard.

    Args:
        groups: for example one a decoder layer and one for the ends.
        max_bytes: of the tensors of a shard; a larger tensor has a shard of its own.

    Returns:
        The shards of each group, numbered through over all groups; none for an empty group.

    Raises:
        OutputError: a name occurs twice.
    """
    _check_names(spec.name for group in groups for spec in group)
    cut = [_cut(group, max_bytes) for group in groups]
    count = sum(map(len, cut))
    planned: list[list[PlannedShard]] = []
    number = 0
    for pieces in cut:
        planned.append([])
        for piece in pieces:
            number += 1
            planned[-1].append(PlannedShard(shard_name(number, count), tuple(piece)))
    return planned


def weight_map(shards: Iterable[PlannedShard]) -> dict[str, str]:
    """The file name of each tensor's shard, by tensor name, as `write_index` takes it."""
    return {spec.name: shard.file_name for shard in shards for spec in shard.specs}


def _cut(group: Sequence[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    pieces: list[list[TensorSpec]] = []
    size = 0
    for spec in group:
        if not pieces or size + spec.nbytes > max_bytes:
            pieces.append([])
            size = 0
        pieces[-1].append(spec)
        size += spec.nbytes
    return pieces


def _check_names(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise OutputError(f"{name} is to be written twice")
        seen.add(name)
