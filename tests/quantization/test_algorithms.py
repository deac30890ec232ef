"""Every algorithm on one decoder layer: golden-stick's own arithmetic where it has one."""

from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest

from msquant.checkpoint.weights import QuantizedLinear
from msquant.schemes import W8A8, W8A8_DYNAMIC, W8A16
from tests.fixtures.policies import rules
from tests.fixtures.tiny_families import write_tiny
from tests.quantization.test_osl import CASES, SAMPLES, run_pass

FLOORS = {"smooth_alpha": (0.3, 0.5, 0.7, 0.85), "range_floor": (0.0, 0.5, 0.9)}


def same(ours, theirs):
    for name, linear in theirs.linears.items():
        np.testing.assert_array_equal(ours.linears[name].weight, linear.weight)
        np.testing.assert_allclose(ours.linears[name].weight_scale, linear.weight_scale, rtol=1e-6)
        assert ours.linears[name].scheme == linear.scheme
        if linear.input_scale is not None:
            np.testing.assert_allclose(ours.linears[name].input_scale, linear.input_scale, rtol=1e-6)
            np.testing.assert_array_equal(ours.linears[name].input_offset, linear.input_offset)
    for name, theirs_norm in theirs.tensors.items():
        np.testing.assert_allclose(ours.tensors[name], theirs_norm, rtol=1e-6)


@pytest.mark.parametrize(
    "scheme",
    [W8A8, W8A8_DYNAMIC, W8A16],
    ids=["static", "per token", "weights alone"],
)
@pytest.mark.parametrize("algorithm", ["smoothquant", "rtn"])
@pytest.mark.parametrize("case", ["grouped queries", "one key per query, biases", "latent attention"])
def test_fast_equals_golden_sticks_own(case, algorithm, scheme, tmp_path):
    model_type, part, overrides = CASES[case]
    folder = write_tiny(tmp_path / "model", model_type, **overrides)
    policy = {"algorithm": algorithm, "smoothquant_alpha": 0.5, "schemes": (("*", scheme),)}
    reference = run_pass(folder, 2, part, reference=True, **policy)
    fast = run_pass(folder, 2, part, **policy)
    same(fast, reference)
    assert {linear.scheme for linear in fast.linears.values()} == {scheme}
    smoothed = algorithm == "smoothquant" and not scheme.is_weight_only
    assert [group.alpha for group in fast.report.groups] == [0.5] * len(reference.report.groups)
    assert smoothed == bool(reference.report.groups)


def test_scales_of_weights_are_numbers_of_the_models_dtype_where_servers_keep_them_in_it(tmp_path):
    folder = write_tiny(tmp_path / "model", "llama", dtype="bfloat16")
    schemes = rules(dynamic=["down_proj"], weight_only=["o_proj"])
    for name, linear in run_pass(folder, 2, algorithm="rtn", schemes=schemes).linears.items():
        held = linear.weight_scale.astype(ml_dtypes.bfloat16).astype(np.float32)
        assert (held == linear.weight_scale).all() == (not linear.is_static), name


@pytest.mark.parametrize("algorithm", ["osl", "osl-golden-stick", "smoothquant"])
def test_int8_weights_alone_are_not_smoothed_while_others_are(algorithm, tmp_path):
    folder = write_tiny(tmp_path / "model", "llama")
    policy = {"algorithm": algorithm, "smooth_alpha": (0.5,), "range_floor": (0.0,)}
    result = run_pass(folder, 2, **policy, schemes=rules(weight_only=["down_proj"]))
    rtn = run_pass(folder, 2, algorithm="rtn", schemes=rules(weight_only=["down_proj"]))
    name = "model.layers.1.mlp.down_proj"
    assert [group.name for group in result.report.groups] == ["qkv", "o", "gate_up"]
    assert [linear for linear in result.linears if result.linears[linear].scheme == W8A16] == [name]
    np.testing.assert_array_equal(result.linears[name].weight, rtn.linears[name].weight)
    np.testing.assert_array_equal(result.linears[name].weight_scale, rtn.linears[name].weight_scale)


def test_smoothquant_has_an_alpha_of_its_own(tmp_path):
    folder = write_tiny(tmp_path / "model", "llama")
    result = run_pass(folder, 2, algorithm="smoothquant")
    assert {group.alpha for group in result.report.groups} == {0.6}


def test_smoothquant_takes_its_alpha_from_the_recipe(tmp_path):
    folder = write_tiny(tmp_path / "model", "llama")
    half = run_pass(folder, 2, algorithm="smoothquant", smoothquant_alpha=0.5)
    most = run_pass(folder, 2, algorithm="smoothquant", smoothquant_alpha=0.8)
    assert {group.alpha for group in most.report.groups} == {0.8}
    name = "model.layers.1.input_layernorm.weight"
    assert not np.allclose(half.tensors[name], most.tensors[name])


@pytest.mark.parametrize("case", CASES)
def test_held_out_search_chooses_for_every_group(case, tmp_path):
    model_type, part, overrides = CASES[case]
    folder = write_tiny(tmp_path / "model", model_type, **overrides)
    result = run_pass(folder, 2, part, algorithm="osl", **FLOORS)
    osl = run_pass(folder, 2, part, algorithm="osl-golden-stick", smooth_alpha=(0.5,))
    assert [group.name for group in result.report.groups] == [group.name for group in osl.report.groups]
    for group in result.report.groups:
        assert group.alpha in FLOORS["smooth_alpha"]
        assert group.range_floor in FLOORS["range_floor"]
        assert 0 < group.loss < 0.1


def test_held_out_search_does_not_depend_on_the_batches(tmp_path):
    folder = write_tiny(tmp_path / "model", "llama")
    results = [run_pass(folder, batch, algorithm="osl", **FLOORS) for batch in (1, 2, SAMPLES)]
    for one, other in pairwise(results):
        assert [(g.alpha, g.range_floor) for g in one.report.groups] == [
            (g.alpha, g.range_floor) for g in other.report.groups
        ]
        for name, linear in one.linears.items():
            np.testing.assert_array_equal(linear.weight, other.linears[name].weight)


def test_held_out_search_smooths_linears_with_a_scale_per_token_too(tmp_path):
    folder = write_tiny(tmp_path / "model", "llama")
    result = run_pass(folder, 2, algorithm="osl", schemes=rules(dynamic=["down_proj"]), **FLOORS)
    assert [group.name for group in result.report.groups] == ["qkv", "o", "gate_up", "down"]
    down = result.linears["model.layers.1.mlp.down_proj"]
    assert isinstance(down, QuantizedLinear)
    assert down.input_scale is None
    rtn = run_pass(folder, 2, algorithm="rtn", schemes=rules(dynamic=["down_proj"]))
    assert not np.array_equal(down.weight, rtn.linears["model.layers.1.mlp.down_proj"].weight)
