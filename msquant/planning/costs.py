"""What quantizing a model takes: the work of one decoder layer in counts.

The counts follow the code in `quantization/`: `decoder_pass.py` says which block is computed how often,
`osl.py` and `clip.py` what the searches cost, `feed_forward.py` what each expert does. Divided by the rates
of a machine they give seconds.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import ceil, prod

from msquant.checkpoint.weights import Scheme
from msquant.models.config import ModelConfig
from msquant.quantization.policy import QuantizationPolicy
from msquant.quantization.schemes import in_two_blocks, layer_schemes

SEARCH_TOKENS = 512
"""Inputs that the clip search keeps, as in `quantization/clip.py`."""

# Of the candidates of a group, how many are computed beyond the first batch: measured on SmolLM2-135M.
SURVIVORS = 9

# Floating-point passes of golden-stick's block: ours, one before its modules, one in each of its three
# modules, and the one that keeps what the search starts from.
FLOAT_PASSES = 6

# Python, operator dispatch and garbage collection, measured on tiny models: seconds.
LAYER_SECONDS = 0.5
EVALUATION_SECONDS = 0.01
EXPERT_SECONDS = 0.02

START_SECONDS = 8.0
"""Loading MindSpore and golden-stick, once a run."""


@dataclass(frozen=True)
class Work:
    """How often something is done.

    Attributes:
        read: bytes of shards.
        converted: values made float32, or float32 made something else.
        products: floating-point operations of matrix products, two for a multiplication with its addition.
        streamed: weights that such products read, which binds those of few rows.
        scores: of attention, a query with a key.
        rounded: weights fake-quantized by the searches.
        inputs: values of linears' inputs fake-quantized by the search.
        quantized: weights made int8.
        written: bytes of shards.
        seconds: what depends on no size.
    """

    read: float = 0
    converted: float = 0
    products: float = 0
    streamed: float = 0
    scores: float = 0
    rounded: float = 0
    inputs: float = 0
    quantized: float = 0
    written: float = 0
    seconds: float = 0

    def __add__(self, other: "Work") -> "Work":
        mine, others = asdict(self), asdict(other)
        return Work(**{name: mine[name] + others[name] for name in mine})


@dataclass(frozen=True)
class Rates:
    """How much of each a machine does in a second, in the units of `Work`."""

    read: float
    converted: float
    products: float
    streamed: float
    scores: float
    rounded: float
    inputs: float
    quantized: float
    written: float

    def parts(self, work: Work) -> dict[str, float]:
        """Seconds of every kind of work."""
        counts = asdict(work)
        return {name: counts[name] / rate for name, rate in asdict(self).items()} | {"other": work.seconds}

    def seconds(self, work: Work) -> float:
        """Seconds of all work, one kind after the other."""
        return sum(self.parts(work).values())


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
        attends: of each group, whether attention follows its linears.
        inner: the blocks that go one by one: the experts, or a dense feed-forward; by name, often none.
        experts: routed experts of the layer.
    """

    def __init__(self, config: ModelConfig, policy: QuantizationPolicy, index: int) -> None:
        self.config, self.policy = config, policy
        name, shapes = f"{config.family.layer_name(index)}.", config.layer_shapes(index)
        self.schemes = layer_schemes(config, policy, index)
        linears = {}
        for module, scheme in self.schemes.items():
            rows, columns = shapes[f"{module}.weight"]
            linears[module.removeprefix(name)] = Linear(rows, columns, scheme)
        two = in_two_blocks(config, policy, index)
        groups = config.attention_groups if two else config.groups
        self.groups = [[linears[linear] for linear in group.linears] for group in groups]
        self.attends = [group.name != "o" and group in config.attention_groups for group in groups]
        self.inner: dict[str, list[Linear]] = {}
        for key, linear in linears.items() if two else ():
            if key.startswith("mlp."):
                self.inner.setdefault(key.rpartition(".")[0], []).append(linear)
        self.experts = config.num_experts if config.has_experts(index) else 0

    @property
    def searched(self) -> list[Linear]:
        """All linears of golden-stick's block."""
        return [linear for group in self.groups for linear in group]

    @property
    def streamed(self) -> list[Linear]:
        """All linears that go one by one."""
        return [linear for block in self.inner.values() for linear in block]


def feed_forward_rounds(config: ModelConfig, tokens: Tokens, memory_budget: int) -> int:
    """How often the experts are read for their outputs: once for as many batches as the budget holds."""
    batch = 3 * 4 * tokens.first * config.hidden_size
    return ceil(tokens.batches / max(1, memory_budget // batch))


def layer_work(
    blocks: LayerBlocks, tokens: Tokens, source: Mapping[str, int], written: int, memory_budget: int
) -> Work:
    """All that is done to a layer.

    Args:
        blocks: the layer.
        tokens: the calibration tokens.
        source: bytes of each of its tensors as it is stored.
        written: bytes of its shards.
        memory_budget: bytes of hidden states held in memory.
    """
    inner = sum(n for name, n in source.items() if ".mlp." in name) if blocks.inner else 0
    work = Work(read=sum(source.values()) - inner, written=written, seconds=LAYER_SECONDS)
    work += _golden_stick(blocks, tokens)
    if blocks.inner:
        rounds = feed_forward_rounds(blocks.config, tokens, memory_budget)
        work += _feed_forward(blocks, tokens, inner, rounds)
    return work


def carried_work(source_bytes: int, shapes: Iterable[tuple[int, ...]], written: int) -> Work:
    """The work of tensors that are read, converted and written as they are."""
    return Work(read=source_bytes, converted=2 * sum(map(prod, shapes)), written=written)


def weights_of(linears: Iterable[Linear]) -> int:
    """Weights of all of them."""
    return sum(linear.size for linear in linears)


def _golden_stick(blocks: LayerBlocks, tokens: Tokens) -> Work:
    weights = weights_of(blocks.searched)
    scores = tokens.count * tokens.length * blocks.config.num_attention_heads
    total = Work(
        converted=weights,
        products=FLOAT_PASSES * 2 * tokens.count * weights,
        streamed=FLOAT_PASSES * tokens.batches * weights,
        scores=FLOAT_PASSES * scores,
    )
    for place, group in enumerate(blocks.groups):
        if group[0].scheme == "static":
            total += _search(blocks, place, tokens, scores)
    for linear in blocks.searched:
        if linear.scheme == "static":
            total += _clip(linear, tokens.count, len(blocks.policy.weight_clip_ratio))
    quantized = weights_of(linear for linear in blocks.searched if linear.scheme != "float")
    # The quantized block is computed once, for the first batch, from weights in float32 again.
    once = 2 * tokens.first * weights
    return total + Work(quantized=quantized, converted=quantized, products=once, streamed=weights)


def _search(blocks: LayerBlocks, place: int, tokens: Tokens, scores: int) -> Work:
    """One group: every candidate on the first batch, few on the others."""
    candidates, group = len(blocks.policy.smooth_alpha), blocks.groups[place]
    later = min(SURVIVORS, candidates) if tokens.batches > 1 else 0
    evaluations = candidates + later * (tokens.batches - 1)
    batch = tokens.count / tokens.batches
    rest = sum(weights_of(linears) for linears in blocks.groups[place:])
    return Work(
        products=evaluations * 2 * batch * rest,
        streamed=evaluations * rest,
        scores=evaluations * scores / tokens.batches if blocks.attends[place] else 0,
        rounded=(candidates + later) * weights_of(group),
        inputs=evaluations * batch * group[0].columns,
        seconds=evaluations * EVALUATION_SECONDS,
    )


def _clip(linear: Linear, tokens: int, ratios: int) -> Work:
    kept = ceil(tokens / max(1, tokens // SEARCH_TOKENS))
    rank = min(kept, linear.columns)
    # The Gram matrix, and its eigenvectors in float64 at the cost of some ten products of its size.
    root = 2 * kept * linear.columns**2 + 20 * linear.columns**3 if kept > linear.columns else 0
    products = ratios * 2 * linear.size * rank + root
    return Work(products=products, streamed=ratios * linear.size, rounded=ratios * linear.size)


def _feed_forward(blocks: LayerBlocks, tokens: Tokens, source_bytes: int, rounds: int) -> Work:
    """Read once for each round of tokens, and once more to be quantized."""
    weights = weights_of(blocks.streamed)
    quantized = weights_of(linear for linear in blocks.streamed if linear.scheme != "float")
    routed = weights_of(
        linear for name, block in blocks.inner.items() if ".experts." in name for linear in block
    )
    # Of the weights, those that a token meets.
    met = weights - routed + (routed * blocks.config.experts_per_token // blocks.experts if routed else 0)
    return Work(
        read=(rounds + 1) * source_bytes,
        # The quantized block is computed from weights in float32 again.
        converted=(rounds + 1) * weights + quantized,
        products=2 * (tokens.count + tokens.first) * met,
        streamed=(rounds + 1) * weights,
        quantized=quantized,
        seconds=(rounds + 1) * len(blocks.inner) * EXPERT_SECONDS,
    )
