"""A decoder layer and the calibration tokens as the quantization pass sees them, in sizes alone."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

from msquant.algorithms.base import Algorithm
from msquant.models.config import ModelConfig
from msquant.quantization.layer_schemes import in_two_blocks, layer_schemes
from msquant.schemes import Scheme


@dataclass(frozen=True)
class Tokens:
    """The calibration tokens, as they are computed.

    Attributes:
        samples: how many sequences.
        length: tokens in each.
        batch: samples in a full batch.
    """

    samples: int
    length: int
    batch: int

    @property
    def count(self) -> int:
        """All tokens."""
        return self.samples * self.length

    @property
    def batches(self) -> int:
        """How many batches they make."""
        return ceil(self.samples / self.batch)

    @property
    def first(self) -> int:
        """Tokens of the first batch."""
        return min(self.samples, self.batch) * self.length


@dataclass(frozen=True)
class Linear:
    """A linear layer's sizes and how it is computed."""

    rows: int
    columns: int
    scheme: Scheme

    @property
    def size(self) -> int:
        """Its weights."""
        return self.rows * self.columns


class LayerBlocks:
    """A decoder layer as it is quantized: what golden-stick gets, and what goes expert by expert.

    Args:
        config: the model's shape.
        policy: what is done to it.
        index: of the layer.

    Attributes:
        config: as given.
        policy: as given.
        schemes: of its linears, by full name.
        groups: the linears of golden-stick's block by smooth group, in the order of computation.
        inner: the blocks that go one by one: the experts, or a dense feed-forward; by name, often none.
        experts: routed experts of the layer.
        kind: whether it has any, and what mixes tokens in it.
    """

    def __init__(self, config: ModelConfig, policy: Algorithm, index: int) -> None:
        self.config, self.policy = config, policy
        name, shapes = f"{config.family.layer_name(index)}.", config.layer_shapes(index)
        self.schemes = layer_schemes(config, policy, index)
        linears = {}
        for module, scheme in self.schemes.items():
            rows, columns = shapes[f"{module}.weight"]
            linears[module.removeprefix(name)] = Linear(rows, columns, scheme)
        two = in_two_blocks(config, policy, index)
        groups = config.mixer_groups(index) if two else config.groups(index)
        self.groups = [[linears[linear] for linear in group.linears] for group in groups]
        self.inner: dict[str, list[Linear]] = {}
        for key, linear in linears.items() if two else ():
            if key.startswith(f"{config.family.names.feed_forward}."):
                self.inner.setdefault(key.rpartition(".")[0], []).append(linear)
        self.experts = config.num_experts if config.has_experts(index) else 0
        self.kind = bool(self.experts), config.mixer(index)

    @property
    def searched(self) -> list[Linear]:
        """All linears of golden-stick's block."""
        return [linear for group in self.groups for linear in group]

    @property
    def streamed(self) -> list[Linear]:
        """All linears that go one by one."""
        return [linear for block in self.inner.values() for linear in block]


def weights_of(linears: Iterable[Linear]) -> int:
    """Weights of all of them."""
    return sum(linear.size for linear in linears)
