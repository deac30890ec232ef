"""`analyze` on tiny models, and the recipes that it makes."""

import json
from pathlib import Path
from typing import Any

import pytest

from msquant.algorithms import find_algorithm, make_algorithm
from msquant.errors import CalibrationError, ModelError, MsquantError, RecipeError
from msquant.flows.analysis import Analysis, analyze
from msquant.flows.pipeline import Progress, quantize
from msquant.flows.source import folder_plan, open_source
from msquant.formats.golden_stick.form import GoldenStickFormat
from msquant.quantization.layer_schemes import model_schemes
from msquant.quantization.selection import Budget
from msquant.recipe.recipe import Recipe, default_recipe, validate_recipe
from msquant.schemes import FLOAT, W8A8, W8A8_DYNAMIC
from tests.fixtures.policies import rules
from tests.fixtures.tiny_families import write_tiny
from tests.fixtures.tiny_model import write_tiny_llama


def short_recipe(model: Path, **quantization: Any) -> Recipe:
    return validate_recipe(
        {
            "model": str(model),
            "description": "kept",
            "quantization": {"algorithm": "smoothquant", **quantization},
            "calibration": {"samples": 4, "sequence_length": 16, "seed": 3},
        },
        "test",
    )


@pytest.fixture(scope="module")
def six(tiny_llama: Path) -> Analysis:
    return analyze(short_recipe(tiny_llama), budget=Budget("keep_float", 6))


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("deepseek") / "model", "deepseek_v3")


def test_all_groups_are_ranked_and_the_worst_six_matrices_kept(six: Analysis, tiny_llama: Path) -> None:
    errors = [group.measured.error for group in six.groups]
    assert len(errors) == 2 * 4
    assert errors == sorted(errors, reverse=True)
    assert six.error == pytest.approx(sum(errors))
    assert sum(group.share for group in six.groups) == pytest.approx(1)
    kept = [linear for group in six.kept for linear in group.measured.linears]
    assert 0 < len(kept) <= 6
    assert six.recipe is not None
    assert six.recipe == short_recipe(tiny_llama, schemes=rules(skip=[*kept, "lm_head"]))
    assert six.mixed_error == pytest.approx(six.error - sum(group.measured.error for group in six.kept))


def test_sizes_are_those_of_the_plan_to_the_byte(six: Analysis, tiny_llama: Path) -> None:
    assert six.recipe is not None
    assert (
        six.output_bytes == folder_plan(short_recipe(tiny_llama), open_source(str(tiny_llama))).tensor_bytes
    )
    mixed = folder_plan(six.recipe, open_source(str(tiny_llama))).tensor_bytes
    assert six.mixed_bytes == mixed
    assert mixed == six.output_bytes + sum(group.float_bytes or 0 for group in six.kept)


def test_kept_names_match_no_other_layer(six: Analysis, tmp_path: Path) -> None:
    names = [name for group in six.groups if group.measured.layer == 1 for name in group.measured.linears]
    assert len(names) == 7
    # Layers 10 and 11 begin like layer 1.
    deep = open_source(str(write_tiny_llama(tmp_path / "deep", layers=12)))
    for name in names:
        policy = make_algorithm(schemes=rules(skip=[name]))
        floats = [module for module, scheme in model_schemes(deep.config, policy).items() if scheme == FLOAT]
        assert floats == [name]


@pytest.mark.parametrize(
    ("algorithm", "count"),
    [("osl", 4), ("osl-golden-stick", 4), ("smoothquant", 4), ("rtn", 4), ("osl", 7), ("smoothquant", 14)],
)
def test_quantize_takes_the_recipe_whatever_it_keeps(
    tiny_llama: Path, tmp_path: Path, algorithm: str, count: int
) -> None:
    known = find_algorithm(algorithm).model_fields
    options = {"smooth_alpha": [0.5], "weight_clip_ratio": [1.0], "range_floor": [0.0]}
    options = {key: value for key, value in options.items() if key in known}
    recipe = short_recipe(tiny_llama, algorithm=algorithm, **options)
    analysis = analyze(recipe, budget=Budget("keep_float", count))
    assert analysis.recipe is not None
    folder = quantize(analysis.recipe, tmp_path / "out").folder
    assert GoldenStickFormat().validate(folder, verify_hashes=True) == []
    kept = {linear for group in analysis.kept for linear in group.measured.linears}
    description = json.loads((folder / "quantization_description.json").read_text())
    floats = {name for name, kind in description.items() if kind == "FLOAT" and "_proj." in name}
    assert floats == {f"{linear}.weight" for linear in kept}


def test_progress_names_every_layer_and_nothing_is_left_in_the_temporary_folder(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    records: list[dict[str, Any]] = []
    analyze(short_recipe(tiny_llama), progress=Progress(layer=records.append))
    assert [record["index"] for record in records] == [0, 1]
    assert list(records[0]["errors"]) == ["qkv", "o", "gate_up", "down"]
    assert list(tmp_path.iterdir()) == []


def test_a_mixture_of_experts_is_ranked_but_its_experts_cannot_be_kept(deepseek: Path) -> None:
    recipe = default_recipe(str(deepseek), {"model_type": "deepseek_v3"})
    recipe = recipe.replace("calibration", samples=2, sequence_length=16)
    analysis = analyze(recipe, budget=Budget("keep_dynamic", 3))
    by_name = {(g.measured.layer, g.measured.group): g for g in analysis.groups}
    assert len(by_name) == 2 * 4
    assert by_name[1, "feed_forward"].float_bytes is None
    assert by_name[1, "feed_forward"].matrices == 27
    assert by_name[0, "feed_forward"].float_bytes is not None
    # MindFormers' fused attention below TP16 takes these in static W8A8 alone.
    fused = [g for g in analysis.groups if any("q_b_proj" in name for name in g.measured.linears)]
    assert len(fused) == 2
    assert all((group.float_bytes, group.per_token) == (None, False) for group in fused)
    assert not set(fused) & set(analysis.kept)
    assert all(g.measured.dynamic_error for g in analysis.groups if g.measured.scheme == W8A8)
    assert analysis.recipe is not None
    kept = [linear for group in analysis.kept for linear in group.measured.linears]
    assert 0 < len(kept) <= 3
    assert analysis.recipe.quantization.schemes[: len(kept)] == tuple((name, W8A8_DYNAMIC) for name in kept)
    plan = folder_plan(analysis.recipe, open_source(str(deepseek)))
    assert {plan.linears[name] for name in kept} == {W8A8_DYNAMIC}


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget("keep_float", 15), ["--keep-float", "15 matrices", "14"]),
        (Budget("keep_float", 0), ["--keep-float", "0 is too little"]),
        (
            Budget("keep_dynamic", 1),
            ["--keep-dynamic", "native backend", "W8A8 and FLOAT only", "--keep-float"],
        ),
        (Budget("max_size", 1000), ["--max-size", "1.0 kB is less than", "give 1MB or more"]),
        (Budget("max_error", -1), ["--max-error", "-1 is too little"]),
        (Budget("max_error", float("nan")), ["--max-error", "nan"]),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused_before_any_work(
    tiny_llama: Path, budget: Budget, words: list[str]
) -> None:
    stages: list[str] = []
    with pytest.raises(RecipeError) as caught:
        analyze(short_recipe(tiny_llama), budget=budget, progress=Progress(stage=stages.append))
    for word in words:
        assert word in str(caught.value)
    assert len(stages) == 1


def test_bad_input_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    bad: list[tuple[Recipe, type[MsquantError], str]] = [
        (short_recipe(tmp_path / "none"), ModelError, "none"),
        (short_recipe(tiny_llama).replace("calibration", source=str(empty)), CalibrationError, "empty.txt"),
        (
            short_recipe(tiny_llama, schemes=rules(skip=["lm_head", "q_proj"])),
            RecipeError,
            "run as one layer",
        ),
    ]
    for recipe, error, words in bad:
        with pytest.raises(error, match=words):
            analyze(recipe)
