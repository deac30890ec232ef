"""A promise of accuracy: the units' losses, the rounds, and what is written of them, on tiny models."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msquant.calibration.builtin import CODE_MODULES as CALIBRATION_MODULES
from msquant.calibration.builtin import calibration_domains
from msquant.calibration.evaluation import CODE_MODULES as CHOICE_MODULES
from msquant.calibration.evaluation import evaluation_domains
from msquant.calibration.verdict import CODE_MODULES, DOCUMENTED_MODULES, verdict_domains
from msquant.errors import CalibrationError, OutputError, RecipeError
from msquant.flows import promise
from msquant.flows.comparison import compare
from msquant.flows.frontier import (
    UnitLosses,
    assigned,
    find_frontier,
    format_for,
    measure_losses,
    model_units,
    open_subject,
)
from msquant.flows.pipeline import quantize
from msquant.flows.promise import Bounds, PromiseResult, keep_promise
from msquant.flows.source import folder_plan, open_source
from msquant.formats.registry import find_format
from msquant.progress import Progress
from msquant.quantization.assignment import Assignment, smallest
from msquant.quantization.layer_schemes import model_schemes
from msquant.quantization.unit_losses import fitted_scales, relative_noise
from msquant.recipe.recipe import Recipe, find_recipe
from msquant.schemes import W4A8_DYNAMIC, W8A8_DYNAMIC
from tests.fixtures.tiny_families import write_tiny

BOUND = 0.003


def short(model: Path, server: str) -> Recipe:
    return find_recipe(str(model), format_for(server)).adjusted(samples=4, sequence_length=32)


@pytest.fixture(scope="module")
def kept(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> PromiseResult:
    output = tmp_path_factory.mktemp("promise") / "out"
    return keep_promise(short(tiny_llama, "vllm-mindspore"), output, Bounds(BOUND))


def test_the_three_sets_of_text_share_nothing() -> None:
    modules = [*CALIBRATION_MODULES, *CHOICE_MODULES, *CODE_MODULES, *DOCUMENTED_MODULES]
    assert len(modules) == len(set(modules))
    sets = [calibration_domains(), evaluation_domains(), verdict_domains()]
    paragraphs = [
        {
            part.strip()
            for domain in each
            for text in domain.texts
            for part in text.split("\n\n")
            if len(part) > 80
        }
        for each in sets
    ]
    assert all(paragraphs)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not paragraphs[one] & paragraphs[other]


def test_every_verdict_domain_has_enough_for_its_windows() -> None:
    domains = {domain.name: sum(map(len, domain.texts)) for domain in verdict_domains()}
    assert list(domains) == ["documentation", "code", "chinese", "dialogue", "fiction", "math"]
    # By a tokenizer that makes tokens of four characters, as most do of English.
    assert min(domains.values()) > 4 * promise.SEQUENCES * promise.SEQUENCE_LENGTH


def test_the_folder_keeps_the_promise_by_the_command_that_measures(
    kept: PromiseResult, tiny_llama: Path, tmp_path: Path
) -> None:
    assert kept.kept
    assert kept.reason == ""
    assert kept.folder is not None
    assert find_format("golden-stick")().validate(kept.folder, verify_hashes=True) == []
    best = kept.rounds[(kept.best or 0) - 1]
    assert best.worst <= BOUND
    texts = []
    for domain in verdict_domains():
        texts.append(tmp_path / f"{domain.name}.txt")
        texts[-1].write_text("\n\n".join(domain.texts), encoding="utf-8")
    found = compare(
        [str(kept.folder)],
        baseline=str(tiny_llama),
        texts=list(map(str, texts)),
        builtin=False,
        sequences=promise.SEQUENCES,
        sequence_length=promise.SEQUENCE_LENGTH,
    )
    for text in found.score.texts:
        # The file is one document, and the domain several: windows begin at other tokens.
        assert text.kl is not None
        assert text.kl == pytest.approx(best.verdict[text.text.removesuffix(".txt")], rel=0.5)


def test_it_is_smaller_than_the_float_model_and_no_larger_than_the_rounds_before(kept: PromiseResult) -> None:
    best = kept.rounds[(kept.best or 0) - 1]
    assert best.nbytes == min(each.nbytes for each in kept.rounds if each.kept)
    assert set(best.schemes) == {"W8A8", "FLOAT"}
    assert sum(best.schemes.values()) == 14
    assert best.gap <= 1e-3


def test_the_manifest_names_the_text_of_each_number(kept: PromiseResult) -> None:
    assert kept.folder is not None
    manifest = json.loads((kept.folder / "msquant.json").read_text())
    record = manifest["promise"]
    assert record["max_kl"] == BOUND
    assert record["kept"] is True
    assert record["kl"] <= BOUND
    assert record["texts"]["choice"] == [domain.name for domain in evaluation_domains()]
    assert list(record["texts"]["verdict"]) == [domain.name for domain in verdict_domains()]
    assert len(record["rounds"]) == len(kept.rounds)
    assert "folder" not in record["rounds"][0]
    assert set(record["rounds"][0]["choice"]) == set(record["texts"]["choice"])
    assert manifest["calibration"]["sources"]
    # Nothing is left beside the result.
    assert [path.name for path in kept.folder.parent.iterdir()] == ["out"]


def test_layers_of_an_earlier_round_are_taken_and_the_bytes_are_those_of_quantize(
    kept: PromiseResult, tmp_path: Path
) -> None:
    assert kept.folder is not None
    manifest = json.loads((kept.folder / "msquant.json").read_text())
    recipe = Recipe.model_validate(manifest["recipe"])
    plain = quantize(recipe, tmp_path / "plain", remember=False).folder
    for path in plain.glob("*.safetensors"):
        assert path.read_bytes() == (kept.folder / path.name).read_bytes()


def test_a_promise_that_cannot_be_kept_says_why_and_leaves_no_output(
    tiny_llama: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    found = keep_promise(short(tiny_llama, "vllm-mindspore"), output, Bounds(1e-9), remember=False)
    assert not found.kept
    assert "float model" in found.reason
    assert not output.exists()


def test_a_run_that_was_interrupted_measures_nothing_twice(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, output = short(tiny_llama, "vllm-mindspore"), tmp_path / "out"
    real = promise.score_folders

    def broken(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(promise, "score_folders", broken)
    with pytest.raises(KeyboardInterrupt):
        keep_promise(recipe, output, Bounds(BOUND), remember=False)
    assert not output.exists()
    monkeypatch.setattr(promise, "score_folders", real)
    monkeypatch.setattr(promise, "measure_losses", broken)
    with pytest.raises(OutputError, match=r"started otherwise.*recipe"):
        keep_promise(recipe.adjusted(samples=2), output, Bounds(BOUND), remember=False)
    found = keep_promise(recipe, output, Bounds(BOUND), remember=False)
    assert found.kept
    assert found.folder == output


def test_the_pass_continues_with_the_layer_that_it_was_in(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses are those of a pass that was not interrupted, to the last digit."""
    subject = open_subject(short(tiny_llama, "vllm"))
    budget = 1 << 20
    whole = measure_losses(subject, tmp_path / "whole", memory_budget=budget)
    seen: list[int] = []

    def stop(record: dict[str, Any]) -> None:
        seen.append(record["index"])
        raise KeyboardInterrupt

    folder = tmp_path / "parts"
    for _ in range(subject.source.config.num_hidden_layers):
        with pytest.raises(KeyboardInterrupt):
            measure_losses(subject, folder, memory_budget=budget, progress=Progress(layer=stop))
    assert seen == [0, 1]
    found = measure_losses(subject, folder, memory_budget=budget, progress=Progress(layer=stop))
    assert found == whole
    with pytest.raises(OutputError, match="started otherwise"):
        measure_losses(open_subject(short(tiny_llama, "vllm-mindspore")), folder, memory_budget=budget)
    # What `<output>.promise` holds before the losses are there is msquant's own, and is not kept after.
    work = promise._Work(tmp_path / "out.promise")
    measure_losses(subject, work.folder / "pass", memory_budget=budget)
    assert work.losses({}) is None
    work.keep_losses({}, found)
    assert [path.name for path in work.folder.iterdir()] == ["losses.json"]
    assert work.losses({}) == found


def test_perplexity_is_promised_and_measured(tiny_llama: Path, tmp_path: Path) -> None:
    bounds = Bounds(max_perplexity_increase=0.02)
    found = keep_promise(short(tiny_llama, "vllm-mindspore"), tmp_path / "out", bounds, remember=False)
    assert found.kept
    best = found.rounds[(found.best or 0) - 1]
    assert best.target is not None
    assert best.target <= promise.HEADROOM * math.log(1.02)
    texts = []
    # Each of one document, so that windows of the file are those of the domain.
    for domain in (each for each in verdict_domains() if len(each.texts) == 1):
        texts.append(tmp_path / f"{domain.name}.txt")
        texts[-1].write_text("\n\n".join(domain.texts), encoding="utf-8")
    measured = compare(
        [str(tmp_path / "out")],
        baseline=str(tiny_llama),
        texts=list(map(str, texts)),
        builtin=False,
        sequences=promise.SEQUENCES,
        sequence_length=promise.SEQUENCE_LENGTH,
    )
    for text in measured.score.texts:
        assert text.baseline_perplexity is not None
        increase = text.perplexity / text.baseline_perplexity - 1
        assert increase == pytest.approx(best.verdict_increase[text.text.removesuffix(".txt")], abs=1e-6)
    assert len(texts) >= 3
    assert max(best.verdict_increase.values()) <= 0.02
    record = json.loads((tmp_path / "out" / "msquant.json").read_text())["promise"]
    assert record["max_perplexity_increase"] == 0.02
    assert record["rounds"][-1]["verdict_increase"].keys() == record["rounds"][-1]["verdict"].keys()


def test_of_two_bounds_the_one_that_is_used_most_counts() -> None:
    kl, increase = {"code": 0.01, "math": 0.02}, {"code": 0.05, "math": -0.01}
    assert Bounds(0.04).used(kl, increase) == (0.5, "the verdict text math is at a KL of 0.02")
    both = Bounds(0.04, max_perplexity_increase=0.02)
    assert both.nats == pytest.approx(math.log(1.02))
    part, where = both.used(kl, increase)
    assert part == pytest.approx(math.log(1.05) / math.log(1.02))
    assert where == "on the verdict text code perplexity rises by 5.00%"
    assert Bounds(max_bytes=1).used(kl, increase) == (0.0, "")
    assert Bounds(max_bytes=1).nats is None


def test_a_kill_while_the_folder_moves_leaves_nothing_that_passes_for_whole(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, output = short(tiny_llama, "vllm-mindspore"), tmp_path / "out"
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.suffix == ".safetensors" and "round-" in str(self.parent):
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        keep_promise(recipe, output, Bounds(BOUND), remember=False)
    assert not output.exists()
    monkeypatch.undo()
    found = keep_promise(recipe, output, Bounds(BOUND), remember=False)
    assert found.kept
    assert find_format("golden-stick")().validate(output, verify_hashes=True) == []


def test_what_a_run_has_left_is_read_with_care(tmp_path: Path) -> None:
    """A folder that the file names is not taken, and a damaged file is named with what to do."""
    work, settings = promise._Work(tmp_path), {"bounds": 1}
    made = promise.Round(
        *(1, 0.02, {}, {}, {"code": 0.01}, {}, {"code": 0.0}),
        *(10, {}, 0, True, str(tmp_path / "round-1"), 0.0),
    )
    (tmp_path / "round-1").mkdir()
    (tmp_path / "round-1" / "msquant.json").write_text("{}")
    work.keep_rounds(settings, [(replace(made, folder="/elsewhere"), [])])
    ((found, _),) = work.rounds(settings)
    assert found == made
    path = tmp_path / "rounds.json"
    for wrong in ([{"round": {}, "records": []}], [{}], [7], 7):
        path.write_text(json.dumps({"settings": settings, "rounds": wrong}))
        with pytest.raises(OutputError, match=r"rounds\.json: is damaged") as caught:
            work.rounds(settings)
        assert "--restart" in str(caught.value.remedy)
    (tmp_path / "losses.json").write_text(json.dumps({"identity": settings, "losses": {"texts": []}}))
    with pytest.raises(OutputError, match=r"losses\.json: is damaged"):
        work.losses(settings)


def test_the_most_accurate_folder_of_a_size_is_of_that_size(tiny_llama: Path, tmp_path: Path) -> None:
    subject = open_subject(short(tiny_llama, "vllm-mindspore"))
    limit = subject.least_bytes + 20_000
    found = keep_promise(
        short(tiny_llama, "vllm-mindspore"), tmp_path / "out", Bounds(max_bytes=limit), remember=False
    )
    assert found.kept
    assert limit - 15_000 < found.rounds[0].nbytes <= limit


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        (Bounds(), ["--max-kl", "no bound"]),
        (Bounds(0.0), ["--max-kl", "is 0", "only the float model itself"]),
        (Bounds(math.nan), ["--max-kl", "is nan"]),
        (Bounds(math.inf), ["--max-kl", "is inf"]),
        (Bounds(max_bytes=0), ["--max-size", "340GB"]),
        (Bounds(max_perplexity_increase=0.0), ["--max-perplexity-increase", "is 0", "2%"]),
        (Bounds(max_perplexity_increase=math.nan), ["--max-perplexity-increase", "is nan"]),
        (Bounds(max_bytes=1000), ["--max-size", "1.0 kB is less than", "smallest folder"]),
    ],
)
def test_bounds_that_mean_nothing_are_refused_before_any_work(
    tiny_llama: Path, tmp_path: Path, bounds: Bounds, words: list[str]
) -> None:
    stages: list[str] = []
    with pytest.raises(RecipeError) as caught:
        keep_promise(
            short(tiny_llama, "vllm"), tmp_path / "out", bounds, progress=Progress(stage=stages.append)
        )
    for word in words:
        assert word in str(caught.value)
    assert not any("MindSpore" in stage for stage in stages)
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    recipe, output = short(tiny_llama, "vllm"), tmp_path / "out"
    none = tmp_path / "none.txt"
    with pytest.raises(CalibrationError, match=r"none\.txt"):
        keep_promise(recipe, output, Bounds(0.1), verdict_texts=[str(none)])
    with pytest.raises(RecipeError, match="takes no linear of this model in W4A8_DYNAMIC"):
        keep_promise(short(tiny_llama, "vllm-mindspore"), output, Bounds(0.1), schemes=[W4A8_DYNAMIC])
    with pytest.raises(RecipeError, match="chosen for one server"):
        keep_promise(recipe.adjusted(formats="ascend,golden-stick"), output, Bounds(0.1))
    with pytest.raises(RecipeError, match="measurement that a promise is made of"):
        keep_promise(recipe.adjusted(evaluate=False), output, Bounds(0.1))
    with pytest.raises(RecipeError, match="did you mean vllm-ascend"):
        format_for("vllm-asend")
    (tmp_path / "out.promise").mkdir()
    (tmp_path / "out.promise" / "mine").write_text("")
    with pytest.raises(OutputError, match="was not made by msquant"):
        keep_promise(recipe, output, Bounds(0.1), restart=True)
    assert (tmp_path / "out.promise" / "mine").exists()


def test_units_are_what_engines_run_as_one_and_their_bytes_add_up(tiny_llama: Path) -> None:
    recipe = short(tiny_llama, "vllm")
    source = open_source(recipe.model)
    units = model_units(recipe, source)
    assert [unit.key for unit in units[:4]] == ["0.qkv", "0.o", "0.gate_up", "0.down"]
    assert {str(option.scheme) for option in units[0].options} == {"FLOAT", "W8A16", "W4A16_G64"}
    rest = set()
    for place in range(3):
        chosen = Assignment(tuple(unit.options[(number + place) % 3] for number, unit in enumerate(units)))
        made = assigned(recipe, units, chosen)
        wanted = {
            name: o.scheme for unit, o in zip(units, chosen.chosen, strict=True) for name in unit.linears
        }
        assert model_schemes(source.config, made.quantization) == wanted
        rest.add(folder_plan(made, source).tensor_bytes - chosen.nbytes)
    assert len(rest) == 1


def test_experts_are_one_unit_with_the_schemes_that_their_server_takes(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    model = write_tiny(tmp_path_factory.mktemp("moe") / "model", "qwen3_moe")
    recipe = short(model, "vllm-ascend")
    source = open_source(recipe.model)
    units = model_units(recipe, source, [W8A8_DYNAMIC, W4A8_DYNAMIC])
    experts = [unit for unit in units if unit.name == "feed_forward"]
    assert experts
    assert {o.scheme for o in experts[0].options if not o.scheme.is_float} == {W8A8_DYNAMIC, W4A8_DYNAMIC}
    attention = next(unit for unit in units if unit.name == "qkv")
    assert W4A8_DYNAMIC not in {option.scheme for option in attention.options}
    least = Assignment(tuple(min(unit.options, key=lambda option: option.nbytes) for unit in units))
    made = assigned(recipe, units, least)
    wanted = {name: o.scheme for unit, o in zip(units, least.chosen, strict=True) for name in unit.linears}
    assert model_schemes(source.config, made.quantization) == wanted


def test_the_frontier_has_recipes_and_a_chosen_point(tiny_llama: Path) -> None:
    found = find_frontier(short(tiny_llama, "vllm"), point=0.01, points=6)
    sizes, losses = [each.nbytes for each in found.points], [each.loss for each in found.points]
    assert sizes == sorted(sizes)
    assert losses == sorted(losses, reverse=True)
    assert found.points[-1].recipe is None
    assert found.points[-1].counts == {"FLOAT": 14}
    assert found.chosen is not None
    assert found.chosen.recipe is not None
    assert found.chosen.loss <= 0.01
    # Int4 weights are among the schemes, so the algorithm is one that rounds them by their inputs.
    assert found.chosen.recipe.quantization.algorithm == "gptq"
    losses_again = UnitLosses.from_dict(json.loads(json.dumps(found.losses.as_dict())))
    assert losses_again == found.losses
    # With the interaction, a model that is all of one scheme loses what was measured of it.
    for scheme in found.losses.schemes:
        options = [next(o for o in unit.options if o.scheme == scheme) for unit in found.losses.units]
        sums = Assignment(tuple(options)).losses
        assert found.losses.predicted(sums) == pytest.approx(found.losses.whole[scheme], rel=1e-6)
    made = smallest(found.losses.units, found.losses.sums(0.01))
    assert made is not None
    assert found.chosen.losses == found.losses.predicted(made.losses)


def test_a_sum_is_what_whole_models_have_shown_that_it_becomes() -> None:
    """Between two of them in logarithms, outside by the ratio of the nearer one; there and back."""
    fine, coarse = W8A8_DYNAMIC, W4A8_DYNAMIC
    alone, whole = {fine: (0.01, 0.0), coarse: (0.64, 0.5)}, {fine: (0.02, 0.0), coarse: (0.16, 0.25)}
    losses = UnitLosses(("one", "other"), (), (fine, coarse), alone, whole)
    assert losses.predicted((0.01, 0.5)) == pytest.approx((0.02, 0.25))
    # Half way from 0.01 to 0.64 and from 0.02 to 0.16, by factors of 8 and of the root of 8.
    assert losses.predicted((0.08, 0.1)) == pytest.approx((0.02 * math.sqrt(8), 0.05))
    assert losses.predicted((0.001, 0.0)) == pytest.approx((0.002, 0.0))
    assert losses.predicted((1.28, 1.0)) == pytest.approx((0.32, 0.5))
    for kl in (0.001, 0.02, 0.05, 0.16, 1.0):
        assert losses.predicted(losses.sums(kl)) == pytest.approx((kl, kl))
    # A scheme that loses more alone and less as a whole says nothing of what is between.
    odd = UnitLosses(
        ("one",), (), (fine, coarse), {fine: (0.2,), coarse: (0.1,)}, {fine: (0.1,), coarse: (0.2,)}
    )
    assert odd.predicted((0.1,)) == pytest.approx((0.2,))
    assert odd.sums(0.2) == pytest.approx((0.1,))


def test_scales_of_rows_and_columns_are_found_again() -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((96, 64)).astype(np.float32)
    weight[3], weight[:, 5] = 0, 0
    rows, columns = random.uniform(0.2, 5, 96), random.uniform(0.2, 5, 64)
    scaled = (weight * rows[:, None] * columns).astype(np.float32)
    found = fitted_scales(weight, scaled)
    assert np.allclose(weight * found[0][:, None] * found[1], scaled, rtol=1e-3, atol=1e-5)
    rounded = np.rint(scaled / np.abs(scaled).max() * 127) * np.abs(scaled).max() / 127
    again = fitted_scales(weight, rounded.astype(np.float32))
    ratio = (again[0][:, None] * again[1])[np.abs(scaled) > 1] / (rows[:, None] * columns)[np.abs(scaled) > 1]
    assert np.abs(ratio - 1).max() < 0.1


def test_noise_is_relative_to_each_token() -> None:
    expected = np.ones((2, 3, 4), np.float32)
    expected[1] *= 10
    found = expected * np.float32(1.1)
    assert relative_noise(expected, found) == pytest.approx([0.01, 0.01], rel=1e-4)
    assert relative_noise(np.zeros_like(expected), found).tolist() == [0, 0]
