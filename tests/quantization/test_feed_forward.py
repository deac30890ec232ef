"""The feed-forward block expert by expert, beside the same block computed as a whole."""

from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest

from msquant.algorithms import make_algorithm
from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.weights import FloatLinear, Linear, QuantizedLinear
from msquant.kernels.layer_report import relative_error
from msquant.kernels.smoothing import power_of_two
from msquant.models.config_json import read_config
from msquant.models.device import use_device
from msquant.models.feed_forward import MLP
from msquant.models.layers import DecoderLayer, positions
from msquant.models.moe import Router
from msquant.quantization.feed_forward_pass import FeedForwardPass
from msquant.schemes import W8A16
from tests.fixtures.policies import rules
from tests.fixtures.tiny_families import write_tiny

DENSE, EXPERTS = 0, 1
TOKENS = 24


class Collected:
    """A sink that is the source of what it took, over another source for the rest."""

    def __init__(self, source: Checkpoint) -> None:
        self.source = source
        self.tensors: dict[str, np.ndarray] = {}
        self.linears: dict[str, Linear] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.tensors or name in self.source

    def tensor(self, name: str, values: Any = None) -> Any:
        if values is None:
            return self.tensors[name] if name in self.tensors else self.source.tensor(name)
        self.tensors[name] = values

    def linear(self, module: str, linear: Linear | None = None) -> Any:
        if linear is None:
            return self.linears.get(module) or self.source.linear(module)
        self.linears[module] = linear

    def rows(self, name: str, indices: Any) -> Any:
        return self.tensor(name)[indices]


class Block:
    """Layer `index` of a tiny model, with inputs and outputs of its feed-forward block."""

    def __init__(self, folder: Path, index: int) -> None:
        self.index = index
        self.dtype = use_device()
        self.config = read_config(folder)
        self.source = Checkpoint.open(folder)
        self.places = positions(self.config, TOKENS, self.dtype)
        hidden = np.random.default_rng(0).normal(size=(1, TOKENS, self.config.hidden_size))
        self.hidden = ms.Tensor(hidden, self.dtype)
        self.before = self.output(self.source, "attention")
        self.after = self.output(self.source, "whole")

    def output(self, source: Any, part: Any) -> np.ndarray:
        layer = DecoderLayer(self.config, source, self.index, self.dtype, part)
        return layer(self.hidden, self.places).asnumpy()[0]

    def run(self, **policy: Any) -> tuple[FeedForwardPass, np.ndarray, np.ndarray, Collected]:
        """Both readings: the pass, its outputs in floating point and in int8, and the weights."""
        settings = make_algorithm(**{"schemes": rules(dynamic=["mlp."]), "min_expert_tokens": 1} | policy)
        block = FeedForwardPass(self.config, self.source, self.index, settings, self.dtype)
        forward = block.forward(self.before)
        sink = Collected(self.source)
        return block, forward, block.quantize(self.before, sink), sink


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "deepseek", "deepseek_v3")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "qwen", "qwen3_moe")


@pytest.fixture(params=[("deepseek", DENSE), ("deepseek", EXPERTS), ("qwen", EXPERTS)], ids=str)
def block(request: pytest.FixtureRequest) -> Block:
    name, index = request.param
    return Block(request.getfixturevalue(name), index)


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_the_output_is_that_of_the_whole_layer(block: Block, alpha: float | None) -> None:
    done, forward, _, _ = block.run(feed_forward_alpha=alpha)
    scale = np.abs(block.after).max()
    np.testing.assert_allclose(forward, block.after, rtol=0, atol=1e-6 * scale)
    if block.config.has_experts(block.index):
        assert sum(done.expert_tokens) == TOKENS * block.config.experts_per_token
    else:
        assert done.expert_tokens == []


def test_smoothquant_smooths_with_its_own_alpha(block: Block) -> None:
    _, _, _, own = block.run(algorithm="smoothquant", smoothquant_alpha=0.3)
    _, _, _, given = block.run(algorithm="osl-golden-stick", feed_forward_alpha=0.3)
    _, _, _, other = block.run(algorithm="smoothquant", smoothquant_alpha=0.3, feed_forward_alpha=0.5)
    same = [np.array_equal(own.linears[name].weight, given.linears[name].weight) for name in own.linears]
    assert all(same)
    assert not all(np.array_equal(own.linears[n].weight, other.linears[n].weight) for n in own.linears)


def test_round_to_nearest_smooths_nothing(block: Block) -> None:
    done, _, _, sink = block.run(algorithm="rtn")
    assert done.groups() == []
    _, _, _, plain = block.run(algorithm="osl-golden-stick")
    assert all(np.array_equal(sink.linears[n].weight, plain.linears[n].weight) for n in plain.linears)


def test_shared_experts_can_have_int8_weights_alone(deepseek: Path) -> None:
    block = Block(deepseek, EXPERTS)
    _, _, output, sink = block.run(
        algorithm="rtn", schemes=rules(weight_only=["shared_experts."], dynamic=["mlp."])
    )
    assert {name for name, linear in sink.linears.items() if linear.scheme == W8A16} == {
        f"model.layers.{EXPERTS}.mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")
    }
    found = block.output(sink, "whole")
    np.testing.assert_allclose(output, found, rtol=0, atol=1e-6 * np.abs(found).max())


def test_tokens_in_two_rounds_give_the_same(deepseek: Path) -> None:
    block = Block(deepseek, EXPERTS)
    policy = make_algorithm(schemes=rules(dynamic=["mlp."]), feed_forward_alpha=0.5, min_expert_tokens=1)
    at_once, _, _, whole = block.run(feed_forward_alpha=0.5)
    rounds = FeedForwardPass(block.config, block.source, EXPERTS, policy, block.dtype)
    outputs = [rounds.forward(part) for part in np.split(block.before, [7])]
    np.testing.assert_allclose(np.concatenate(outputs), block.after, rtol=0, atol=1e-4)
    assert rounds.expert_tokens == at_once.expert_tokens
    sink = Collected(block.source)
    rounds.quantize(block.before, sink)
    for module, linear in whole.linears.items():
        assert np.abs(linear.weight.astype(int) - sink.linears[module].weight).max() <= 1, module


@pytest.mark.parametrize("alpha", [0.3, 0.7])
def test_smoothing_preserves_the_function(block: Block, alpha: float) -> None:
    _, _, _, sink = block.run(feed_forward_alpha=alpha, schemes=rules(skip=["mlp."]))
    assert all(isinstance(linear, FloatLinear) for linear in sink.linears.values())
    changed = [
        m for m, linear in sink.linears.items() if (linear.weight != block.source.linear(m).weight).any()
    ]
    assert len(changed) == len(sink.linears)
    smoothed = block.output(sink, "whole")
    np.testing.assert_allclose(smoothed, block.after, rtol=0, atol=1e-5 * np.abs(block.after).max())


def test_smoothing_moves_no_digit_of_the_norm_and_the_router(deepseek: Path) -> None:
    block = Block(deepseek, EXPERTS)
    _, _, _, sink = block.run(feed_forward_alpha=0.5)
    prefix = f"model.layers.{EXPERTS}"
    norm = f"{prefix}.post_attention_layernorm.weight"
    scale = block.source.tensor(norm) / sink.tensors[norm]
    assert len(np.unique(scale)) > 1
    np.testing.assert_array_equal(scale, power_of_two(scale))
    router = f"{prefix}.mlp.gate.weight"
    np.testing.assert_array_equal(sink.tensors[router], block.source.tensor(router) * scale)
    bias = f"{prefix}.mlp.gate.e_score_correction_bias"
    np.testing.assert_array_equal(sink.tensors[bias], block.source.tensor(bias))


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_the_quantized_output_is_that_of_the_exact_integer_layers(block: Block, alpha: float | None) -> None:
    _, _, quantized, sink = block.run(feed_forward_alpha=alpha)
    assert all(isinstance(linear, QuantizedLinear) for linear in sink.linears.values())
    exact = block.output(sink, "whole")
    assert relative_error(block.before, exact, quantized) < 1e-7
    assert 1e-7 < relative_error(block.before, block.after, quantized) < 5e-3


def test_smoothing_helps_against_outlier_channels(deepseek: Path) -> None:
    block = Block(deepseek, EXPERTS)
    errors = [
        relative_error(block.before, block.after, block.run(feed_forward_alpha=alpha)[2])
        for alpha in (None, 0.5)
    ]
    assert errors[1] < errors[0] / 2


def test_an_expert_with_few_tokens_is_quantized_from_its_weights_alone(deepseek: Path) -> None:
    block = Block(deepseek, EXPERTS)
    done, _, _, smoothed = block.run(feed_forward_alpha=0.5)
    least = min(done.expert_tokens)
    _, _, _, plain = block.run(feed_forward_alpha=0.5, min_expert_tokens=least + 1)
    for number, tokens in enumerate(done.expert_tokens):
        name = f"model.layers.{EXPERTS}.mlp.experts.{number}.down_proj"
        same = np.array_equal(smoothed.linears[name].weight, plain.linears[name].weight)
        assert same == (tokens > least)


@pytest.mark.parametrize("model", ["deepseek", "qwen"])
def test_hungry_experts_get_the_tokens_that_came_nearest(model: str, request: pytest.FixtureRequest) -> None:
    """Against a loop over tokens and experts, with the router's own scores; in two rounds as in one."""
    block = Block(request.getfixturevalue(model), EXPERTS)
    settings = make_algorithm(
        schemes=rules(dynamic=["mlp."]), feed_forward_alpha=0.5, min_expert_tokens=TOKENS - 1
    )
    passes = [FeedForwardPass(block.config, block.source, EXPERTS, settings, block.dtype) for _ in range(3)]
    for each in passes:
        each.forward(block.before)
    fed, halves, plain = passes
    before = list(fed.expert_tokens)
    fed.feed(lambda: [block.before])
    halves.feed(lambda: np.split(block.before, [7]))
    least = settings.min_expert_tokens
    assert min(before) < least
    assert fed.expert_tokens == before, "what the router says stays on record"
    assert fed.lent_tokens == halves.lent_tokens == [max(0, least - tokens) for tokens in before]
    x = fed._normalize(block.before)
    router = Router(block.config, block.source, block.config.family.router_name(EXPERTS), block.dtype)
    near = router.margins(ms.Tensor(x, block.dtype))
    ids, _ = router.route(ms.Tensor(x, block.dtype))
    for number, tokens in enumerate(before):
        own = {row for row in range(TOKENS) if number in ids[row]}
        assert len(own) == tokens
        others = sorted(set(range(TOKENS)) - own, key=lambda row: (-near[row, number], row))
        given = sorted(own | set(others[: max(0, least - tokens)]))
        mlp = MLP(block.config, block.source, f"model.layers.{EXPERTS}.mlp.experts.{number}", block.dtype)
        seen = np.abs(mlp.gated(ms.Tensor(x[given], block.dtype)).asnumpy()).max(axis=0)
        for each in (fed, halves):
            np.testing.assert_allclose(each._experts[number].gated, seen, rtol=2e-5, atol=1e-6)
        assert not np.array_equal(plain._experts[number].gated, fed._experts[number].gated) or tokens >= least


def test_feeding_changes_no_output_and_leaves_none_to_its_weights_alone(deepseek: Path) -> None:
    block = Block(deepseek, EXPERTS)
    settings = make_algorithm(schemes=rules(dynamic=["mlp."]), feed_forward_alpha=0.5, min_expert_tokens=12)
    fed = FeedForwardPass(block.config, block.source, EXPERTS, settings, block.dtype)
    forward = fed.forward(block.before)
    fed.feed(lambda: [block.before])
    np.testing.assert_allclose(forward, block.after, rtol=0, atol=1e-6 * np.abs(block.after).max())
    assert all(fed._inner_scale(expert) is not None for expert in fed._experts)


def test_an_expert_without_a_token_is_quantized_too(deepseek: Path) -> None:
    block = Block(deepseek, EXPERTS)
    block.before = block.before[:1]
    done, _, quantized, sink = block.run(feed_forward_alpha=0.5)
    unseen = [number for number, tokens in enumerate(done.expert_tokens) if not tokens]
    assert unseen
    assert len(sink.linears) == 3 * (block.config.num_experts + 1)
    assert np.isfinite(quantized).all()
