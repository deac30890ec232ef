"""Routers against the classes of transformers, and the mixture of experts."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mindspore import Tensor
from numpy.typing import NDArray
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Config, DeepseekV2MoEGate
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3TopkRouter

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.weights import FloatLinear, Linear, QuantizedLinear
from msquant.errors import CheckpointError, ModelError
from msquant.families.base import ExpertSizes
from msquant.models import moe
from msquant.models.config import ModelConfig
from msquant.models.config_json import parse_config, read_config
from msquant.models.feed_forward import MLP
from msquant.models.moe import MoE, Router
from msquant.models.routing import choose, tokens_of
from msquant.schemes import W8A8, W8A8_DYNAMIC
from tests.fixtures.tiny_families import write_tiny
from tests.models.folders import Replaced

NAME = "model.layers.1.mlp"


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "deepseek", "deepseek_v3")


def inputs(rows: int = 40, scale: float = 1.0) -> NDArray[np.float32]:
    return (scale * np.random.default_rng(1).standard_normal((rows, 64))).astype(np.float32)


def as_matrix(ids: Any, weights: Any, experts: int = 8) -> NDArray[np.float64]:
    """Weights by token and expert, whatever the order of the choice."""
    matrix = np.zeros((len(ids), experts))
    np.put_along_axis(matrix, np.asarray(ids, dtype=np.int64), np.asarray(weights, dtype=np.float64), axis=1)
    return matrix


@pytest.mark.parametrize("bias", [0.1, 1.0, -2.0], ids=["small", "large", "all scores below 0"])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (2, 1)])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_sigmoid_router_equals_transformers(
    bias: float, groups: tuple[int, int], normalize: bool, tmp_path: Path, dtype: Any
) -> None:
    settings = {"n_group": groups[0], "topk_group": groups[1], "norm_topk_prob": normalize}
    folder = write_tiny(tmp_path, "deepseek_v3", **settings)
    config, source = read_config(folder), Checkpoint.open(folder)
    name = f"{NAME}.gate.e_score_correction_bias"
    corrected = bias * (1 + 0.1 * np.arange(8, dtype=np.float32))
    router = Router(config, Replaced(source, {name: corrected}), f"{NAME}.gate", dtype)
    reference = DeepseekV3TopkRouter(DeepseekV3Config.from_pretrained(folder))
    if bias < 0:
        reference.get_topk_indices = lambda scores: best_of_best_groups(reference, scores)
    reference.weight.data = torch.from_numpy(source.tensor(f"{NAME}.gate.weight"))
    reference.e_score_correction_bias = torch.from_numpy(corrected)
    x = inputs()
    ids, weights = router(Tensor(x))
    expected_ids, expected_weights = reference(torch.from_numpy(x)[None])
    assert (ids.dtype, weights.dtype) == (np.int32, np.float32)
    found, expected = as_matrix(ids, weights), as_matrix(expected_ids, expected_weights.detach())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def best_of_best_groups(reference: Any, scores: torch.Tensor) -> torch.Tensor:
    """The choice of vLLM 0.11's `grouped_topk`; transformers lets experts of other groups count as 0."""
    ranked = scores + reference.e_score_correction_bias
    groups = ranked.view(len(scores), reference.n_group, -1)
    kept = groups.topk(2, dim=-1).values.sum(-1).topk(reference.topk_group, dim=-1).indices
    left_out = torch.ones_like(groups, dtype=torch.bool).scatter_(
        1, kept[:, :, None].expand(-1, -1, groups.shape[2]), value=False
    )
    return groups.masked_fill(left_out, -torch.inf).flatten(1).topk(reference.top_k, dim=-1).indices


@pytest.mark.parametrize(
    "settings",
    [
        {"topk_method": "greedy", "routed_scaling_factor": 2.0},
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    ],
)
def test_the_softmax_router_equals_transformers(settings: dict[str, Any], tmp_path: Path, dtype: Any) -> None:
    folder = write_tiny(tmp_path, "deepseek_v2", **settings)
    config, source = read_config(folder), Checkpoint.open(folder)
    reference = DeepseekV2MoEGate(DeepseekV2Config.from_pretrained(folder))
    reference.weight.data = torch.from_numpy(source.tensor(f"{NAME}.gate.weight"))
    # The last inputs are so large that all but one score vanish.
    for x in (inputs(), inputs(scale=200.0)):
        ids, weights = Router(config, source, f"{NAME}.gate", dtype).route(Tensor(x))
        expected_ids, expected_weights = reference(torch.from_numpy(x)[None])
        found, expected = as_matrix(ids, weights), as_matrix(expected_ids, expected_weights.detach())
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_sigmoid_far_below_zero_is_no_warning(deepseek: Path, dtype: Any) -> None:
    config, source = read_config(deepseek), Checkpoint.open(deepseek)
    with np.errstate(all="raise", under="ignore"):
        _, weights = Router(config, source, f"{NAME}.gate", dtype)(Tensor(inputs(scale=500.0)))
    assert np.isfinite(weights).all()


def test_of_equal_scores_the_lower_number_wins() -> None:
    scores = np.array([[0.5, 0.7, 0.5, 0.7, 0.1, 0.5]], np.float32)
    assert choose(scores, ExpertSizes(count=6, per_token=4, intermediate_size=1)).tolist() == [[1, 3, 0, 2]]
    grouped = ExpertSizes(count=6, per_token=2, intermediate_size=1, groups=3, groups_per_token=1)
    assert choose(scores, grouped).tolist() == [[1, 0]]


def test_the_tokens_of_an_expert() -> None:
    ids = np.array([[2, 0], [1, 2], [0, 1], [2, 1]], np.int32)
    weights = np.arange(8, dtype=np.float32).reshape(4, 2)
    rows, chosen = tokens_of(ids, weights, 2)
    assert (rows.dtype, chosen.dtype) == (np.int64, np.float32)
    assert (rows.tolist(), chosen.tolist()) == ([0, 1, 3], [0.0, 3.0, 6.0])
    rows, chosen = tokens_of(ids, weights, 7)
    assert (len(rows), len(chosen)) == (0, 0)


def block_by_hand(config: ModelConfig, source: Checkpoint, x: NDArray[np.float32], dtype: Any) -> Any:
    ids, weights = Router(config, source, f"{NAME}.gate", dtype)(Tensor(x))
    expected = MLP(config, source, f"{NAME}.shared_experts", dtype)(Tensor(x)).asnumpy().astype(np.float64)
    for token in range(len(x)):
        for expert, weight in zip(ids[token], weights[token], strict=True):
            parts = [
                source.tensor(f"{NAME}.experts.{expert}.{part}_proj.weight").astype(np.float64)
                for part in ("gate", "up", "down")
            ]
            gate, up = parts[0] @ x[token], parts[1] @ x[token]
            expected[token] += weight * (parts[2] @ (gate / (1 + np.exp(-gate)) * up))
    return expected


def test_an_expert_is_freed_before_the_next_is_read(
    deepseek: Path, dtype: Any, monkeypatch: pytest.MonkeyPatch, no_garbage_collection: None
) -> None:
    weights: list[weakref.ref[Any]] = []

    def read(*given: Any) -> MLP:
        assert [weight for weight in weights if weight() is not None] == []
        expert = MLP(*given)
        weights.extend(weakref.ref(weight) for weight in expert.get_parameters())
        return expert

    block = MoE(read_config(deepseek), Checkpoint.open(deepseek), NAME, dtype, resident=False)
    monkeypatch.setattr(moe, "MLP", read)
    block(Tensor(inputs()))
    assert len(weights) > 3


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("rows", [1, 40])
def test_the_block_adds_what_its_experts_say(resident: bool, rows: int, deepseek: Path, dtype: Any) -> None:
    config, source = read_config(deepseek), Checkpoint.open(deepseek)
    block = MoE(config, source, NAME, dtype, resident=resident)
    x = inputs(rows)
    expected = block_by_hand(config, source, x, dtype)
    np.testing.assert_allclose(block(Tensor(x)).asnumpy(), expected, rtol=1e-4, atol=1e-4)


class Counting(Replaced):
    """Counts the linears that are read, by name."""

    def __init__(self, source: Any) -> None:
        super().__init__(source, {})
        self.read: list[str] = []

    def linear(self, module: str) -> Linear:
        self.read.append(module)
        return super().linear(module)


def test_only_experts_with_tokens_are_read_unless_resident(deepseek: Path, dtype: Any) -> None:
    config, source = read_config(deepseek), Counting(Checkpoint.open(deepseek))
    block = MoE(config, source, NAME, dtype, resident=False)
    assert not any(".experts." in name for name in source.read)
    x = inputs(2)
    ids, _ = block.gate(Tensor(x))
    block(Tensor(x))
    read = {int(name.split(".")[5]) for name in source.read if ".experts." in name}
    assert read == set(ids.ravel().tolist())
    assert len(read) < 8
    resident = Counting(Checkpoint.open(deepseek))
    MoE(config, resident, NAME, dtype, resident=True)
    assert sum(".experts." in name for name in resident.read) == 3 * 8


class Int8Experts(Replaced):
    """Gives the routed experts in W8A8: dynamic, but static behind the norm where the number is odd."""

    def linear(self, module: str) -> Linear:
        linear = super().linear(module)
        if ".experts." not in module or not isinstance(linear, FloatLinear):
            return linear
        scale = 2 * np.abs(linear.weight).max(axis=1) / 255
        weight = np.clip(np.round(linear.weight / scale[:, None]), -128, 127).astype(np.int8)
        static: dict[str, Any] = {}
        if int(module.split(".")[5]) % 2 and not module.endswith("down_proj"):
            static = {"input_scale": np.float32([0.05]), "input_offset": np.int32([3])}
        return QuantizedLinear(weight, scale.astype(np.float32), W8A8 if static else W8A8_DYNAMIC, **static)


def test_experts_may_be_quantized(deepseek: Path, dtype: Any) -> None:
    config, source = read_config(deepseek), Checkpoint.open(deepseek)
    x = inputs()
    plain = MoE(config, source, NAME, dtype, resident=False)(Tensor(x)).asnumpy()
    blocks = [MoE(config, Int8Experts(source, {}), NAME, dtype, resident=kept) for kept in (False, True)]
    streamed, resident = (block(Tensor(x)).asnumpy() for block in blocks)
    np.testing.assert_array_equal(streamed, resident)
    error = np.linalg.norm(streamed - plain) / np.linalg.norm(plain)
    assert 1e-4 < error < 0.1


def test_the_names_of_cells_are_those_of_the_tensors(deepseek: Path, dtype: Any) -> None:
    config, source = read_config(deepseek), Checkpoint.open(deepseek)
    block = MoE(config, source, NAME, dtype, resident=True)
    expected = {name for name in config.layer_shapes(1) if name.startswith(f"{NAME}.")}
    assert len(expected) == 2 + 3 * 9
    for name in expected:
        cell: Any = block
        for part in name.removeprefix(f"{NAME}.").split("."):
            cell = getattr(cell, part)
        assert cell.shape == config.shapes[name], name


@pytest.mark.parametrize(
    ("make", "missing"),
    [
        (lambda *given: MoE(*given, resident=True), f"{NAME}.experts.5.up_proj.weight"),
        (lambda *given: MoE(*given, resident=False), f"{NAME}.shared_experts.up_proj.weight"),
        (lambda *given: MoE(*given, resident=False), f"{NAME}.gate.e_score_correction_bias"),
    ],
)
def test_a_missing_tensor_is_named(
    make: Callable[..., Any], missing: str, deepseek: Path, dtype: Any
) -> None:
    config, source = read_config(deepseek), Checkpoint.open(deepseek)
    del source.weight_map[missing]
    with pytest.raises(CheckpointError, match=f"there is no tensor {missing}"):
        make(config, source, NAME, dtype)


def test_a_missing_expert_is_named_when_it_is_streamed(deepseek: Path, dtype: Any) -> None:
    config, source = read_config(deepseek), Checkpoint.open(deepseek)
    block = MoE(config, source, NAME, dtype, resident=False)
    for expert in range(8):
        del source.weight_map[f"{NAME}.experts.{expert}.down_proj.weight"]
    with pytest.raises(CheckpointError, match=r"there is no tensor .*experts\.\d\.down_proj\.weight"):
        block(Tensor(inputs()))


@pytest.mark.parametrize("part", ["weight", "e_score_correction_bias"])
def test_a_router_of_the_wrong_shape_is_named(part: str, deepseek: Path, dtype: Any) -> None:
    config, source = read_config(deepseek), Checkpoint.open(deepseek)
    name = f"{NAME}.gate.{part}"
    short = Replaced(source, {name: source.tensor(name)[:6]})
    with pytest.raises(CheckpointError, match=rf"{name} has shape \[6.*config\.json says \[8"):
        Router(config, short, f"{NAME}.gate", dtype)


def test_an_expert_of_the_wrong_shape_is_named(tmp_path: Path, dtype: Any) -> None:
    folder = write_tiny(tmp_path, "deepseek_v3", moe_intermediate_size=40)
    raw = read_config(folder).raw | {"moe_intermediate_size": 32}
    config, source = parse_config(raw), Checkpoint.open(folder)
    with pytest.raises(
        CheckpointError, match=r"experts\.0\.gate_proj\.weight has shape \[40, 64\].*\[32, 64\]"
    ):
        MLP(config, source, f"{NAME}.experts.0", dtype)


def test_a_dense_model_has_no_router(tiny_llama: Path, dtype: Any) -> None:
    config, source = read_config(tiny_llama), Checkpoint.open(tiny_llama)
    with pytest.raises(ModelError, match="a model of type llama has no experts"):
        Router(config, source, f"{NAME}.gate", dtype)
