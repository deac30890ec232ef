"""Recipes are found by name or path, and closed."""

import json
from pathlib import Path

import pytest

from msquant.calibration.sources import load_texts
from msquant.errors import OutputError, RecipeError
from msquant.hub.published import published_config
from msquant.recipe.listing import list_shipped
from msquant.recipe.recipe import (
    Recipe,
    copy_recipe,
    find_recipe,
    find_shipped_recipe,
    load_recipe,
    matching_recipes,
    shipped_recipes,
    validate_recipe,
    write_recipe,
)
from msquant.schemes import FLOAT, W4A16, Scheme, parse_scheme
from tests.fixtures.policies import rules

PER_TOKEN = [{"lm_head": "FLOAT"}, {"*": "W8A8_DYNAMIC"}]
LATENT_PER_TOKEN = [{"lm_head": "FLOAT"}, {"kv_b_proj": "FLOAT"}, {"*": "W8A8_DYNAMIC"}]


def test_every_shipped_recipe_is_valid() -> None:
    recipes = {name: load_recipe(path) for name, path in shipped_recipes().items()}
    assert "smollm2-135m" in recipes
    assert all(recipe.description for recipe in recipes.values())


def test_a_name_a_file_and_a_folder(tmp_path: Path) -> None:
    assert find_recipe("smollm2-135m").model == "smollm2-135m"
    file = tmp_path / "mine.yaml"
    file.write_text("model: smollm2-135m\ncalibration: {samples: 3}\n")
    assert find_recipe(str(file)).calibration.samples == 3
    assert find_recipe(str(tmp_path)) == Recipe(model=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("deepseek-r1", "deepseek-r1"),
        ("DeepSeek-R1", "deepseek-r1"),
        ("deepseek-ai/DeepSeek-R1", "deepseek-r1"),
        ("deepseek-ai/deepseek-r1-0528", "deepseek-r1-0528"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b-instruct"),
        ("deepseek-r1-distill-*-70b", "deepseek-r1-distill-llama-70b"),
        ("Qwen3-235B*b", "qwen3-235b-a22b"),
        ("qwen3-[38]b", "qwen3-8b"),
        ("SMOLLM2-135m", "smollm2-135m"),
    ],
)
def test_a_shipped_recipe_has_several_names(name: str, recipe: str) -> None:
    assert find_shipped_recipe(name) == shipped_recipes()[recipe]
    assert find_recipe(name) == load_recipe(shipped_recipes()[recipe])


def test_a_pattern_that_matches_several_names_them() -> None:
    with pytest.raises(RecipeError, match="matches 7 recipes") as caught:
        find_recipe("deepseek-r1-distill-*")
    assert "deepseek-r1-distill-qwen-7b" in (caught.value.remedy or "")
    assert len(matching_recipes("DeepSeek-R1-Distill-*")) == 7
    assert matching_recipes("*") == shipped_recipes()


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("smollm-135m", "smollm2-135m"),
        ("deepsek-r1", "deepseek-r1"),
        ("DeepSeekR1", "deepseek-r1"),
        ("unsloth/Qwen3-8B", "qwen3-8b"),
        ("qwen3-30ba3b", "qwen3-30b-a3b"),
        ("qwen3-8x*", "qwen3-8b"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(RecipeError, match="neither a recipe nor a folder") as caught:
        find_recipe(name)
    assert f"did you mean {nearest}?" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["", "zzzzzz", "../configs/deepseek-r1", "~no-such-user", "a\0b", "x" * 5000]
)
def test_a_name_that_is_like_none(name: str) -> None:
    with pytest.raises(RecipeError, match="neither a recipe nor a folder") as caught:
        find_recipe(name)
    assert "msquant recipes list" in (caught.value.remedy or "")


def test_a_folder_that_is_called_like_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen3-8b").mkdir()
    (tmp_path / "Qwen" / "Qwen3-8B").mkdir(parents=True)
    assert find_recipe("qwen3-8b").model == "Qwen/Qwen3-8B"
    assert find_recipe("./qwen3-8b").model == "qwen3-8b"
    assert find_recipe("Qwen/Qwen3-8B") == Recipe(model="Qwen/Qwen3-8B")


def test_the_list_is_by_family_and_says_what_was_run() -> None:
    found = list_shipped()
    assert {each.name for each in found} == set(shipped_recipes())
    assert [each.family for each in found] == sorted(each.family for each in found)
    # Of all models, the weights of one alone are at hand: the tests quantize it.
    assert [each.name for each in found if each.evidence == "run"] == ["smollm2-135m"]
    for each in found:
        assert each.evidence == "run" or published_config(each.recipe.model) is not None
        assert each.has_code is not each.recipe.calibration.is_none
    with pytest.raises(RecipeError, match="neither a recipe"):
        list_shipped("no-such-*")


def test_the_builtin_text_is_enough_for_every_shipped_recipe() -> None:
    characters = sum(len(text) for domain in load_texts("builtin") for text in domain.texts)
    for path in shipped_recipes().values():
        settings = load_recipe(path).calibration
        if settings.is_none:
            continue
        # A token of English is about four characters; ten leave room for stretches that cannot be used.
        assert settings.source == "builtin"
        assert 10 * settings.samples * settings.sequence_length < characters


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("model: a\nquantisation: {}\n", "unknown key quantisation (did you mean quantization?)"),
        ("model: a\ncalibration: {sample: 3}\n", "unknown key calibration.sample (did you mean samples?)"),
        ("model: a\ncalibration: {zzz: 3}\n", "unknown key calibration.zzz (known: source"),
        ("model: a\ncalibration: {samples: 0}\n", "calibration.samples: Input should be greater than"),
        (
            "model: a\nquantization: {algorithm: aqlm}\n",
            "'aqlm' is not an algorithm\nuse one of: osl, osl-golden-stick, gptq, awq, smoothquant, rtn",
        ),
        ("model: a\nquantization: {range_floor: [0, 1]}\n", "quantization.range_floor.1"),
        ("model: a\nquantization: {algorithm: osl-robust}\n", "did you mean osl?"),
        ("model: a\nquantization: {algorithm: 3}\n", "3 is not an algorithm"),
        ("model: a\nquantization: {rotation: hadamar}\n", "quantization.rotation"),
        ("model: a\nquantization: {cache: int4}\n", "quantization.cache: Input should be 'none' or 'int8'"),
        (
            "model: a\nquantization: {schemes: [{'*': W8A8_C8}]}\n",
            "the scheme of '*' is W8A8_C8: a cache is of all layers; write *: W8A8, and beside schemes "
            "cache: int8",
        ),
        (
            "model: a\nformat: ascend\ncalibration: {source: none}\n"
            "quantization: {algorithm: rtn, cache: int8, schemes: [{'*': W8A8_DYNAMIC}]}\n",
            "cache: int8 needs calibration text, and its source is none",
        ),
        (
            "model: a\nquantization: {smooth_alfa: [0.5]}\n",
            "quantization.smooth_alfa (did you mean smooth_alpha?)",
        ),
        (
            "model: a\nquantization: {algorithm: rtn, range_floor: [0.5]}\n",
            "unknown key quantization.range_floor (known: algorithm, schemes, rotation, rotation_matrix, "
            "cache, min_expert_tokens)",
        ),
        ("model: a\nquantization: [osl]\n", "quantization"),
        ("model: a\nquantization: {smooth_alpha: [0.5, 1.5]}\n", "quantization.smooth_alpha.1"),
        ("model: a\nquantization: {smooth_alpha: [0.5, 0.2]}\n", "ascending"),
        (
            "model: a\nquantization: {algorithm: osl-golden-stick, weight_clip_ratio: [0]}\n",
            "quantization.weight_clip_ratio.0",
        ),
        ("description: no model\n", "model: Field required"),
        ("model: a\nmodel: b\n", "the key model stands twice"),
        ("model: a\ncalibration: {seed: 1, samples: 2, seed: 3}\n", "the key seed stands twice"),
        ("- a\n- list\n", "holds a list"),
        ("1: a\nmodel: a\n", "1: Keys should be strings"),
        ("[a]: b\n", "cannot be read as YAML"),
        ("model: [\n", "cannot be read as YAML"),
        ("!!python/object/apply:os.system ['true']\n", "cannot be read as YAML"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert complaint in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        find_recipe(str(tmp_path / "none.yaml"))


def test_options_replace_only_what_is_given() -> None:
    recipe = Recipe(model="a").replace("calibration", samples=5, seed=None)
    assert recipe.calibration.samples == 5
    assert recipe.calibration.seed == 0
    with pytest.raises(RecipeError, match=r"the options given: calibration\.samples"):
        recipe.replace("calibration", samples=-1)


def test_a_copy_is_the_same_text(tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    copy_recipe("DeepSeek-R1", target)
    assert target.read_bytes() == shipped_recipes()["deepseek-r1"].read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_a_copy_replaces_nothing_unless_asked(tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    target.write_text("mine")
    with pytest.raises(OutputError, match="exists already") as caught:
        copy_recipe("qwen3-8b", target)
    assert "--overwrite" in (caught.value.remedy or "")
    assert target.read_text() == "mine"
    copy_recipe("qwen3-8b", target, overwrite=True)
    assert load_recipe(target).model == "Qwen/Qwen3-8B"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_copy_that_cannot_be_made_leaves_nothing(overwrite: bool, tmp_path: Path) -> None:
    folder = tmp_path / "folder.yaml"
    folder.mkdir()
    for target, complaint in (
        (folder, "is a folder"),
        (tmp_path / "none" / "mine.yaml", "cannot be written"),
        (tmp_path / ("n" * 300 + ".yaml"), "cannot be written"),
    ):
        with pytest.raises(OutputError, match=complaint) as caught:
            copy_recipe("qwen3-8b", target, overwrite=overwrite)
        assert caught.value.where == str(target)
    with pytest.raises(RecipeError, match=r"ends in \.yaml"):
        copy_recipe("qwen3-8b", tmp_path / "mine", overwrite=overwrite)
    with pytest.raises(RecipeError, match="did you mean qwen3-8b"):
        copy_recipe("qwen3-8", tmp_path / "mine.yaml", overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.yaml"]


@pytest.mark.parametrize(
    ("model_type", "schemes"),
    [
        ("llama", rules()),
        ("mistral", PER_TOKEN),
        ("qwen3_moe", PER_TOKEN),
        ("deepseek_v2", LATENT_PER_TOKEN),
        ("deepseek_v3", rules(skip=["lm_head", "kv_b_proj"], dynamic=["mlp."])),
        ("glm4", PER_TOKEN),
        (None, rules()),
    ],
)
def test_a_folder_gets_what_the_engine_serves(
    model_type: str | None, schemes: list[dict[str, str]], tmp_path: Path
) -> None:
    if model_type:
        (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    recipe = find_recipe(str(tmp_path))
    assert recipe.model == str(tmp_path)
    assert recipe.model_dump()["quantization"]["schemes"] == schemes
    assert "golden-stick" in recipe.formats or schemes in (PER_TOKEN, LATENT_PER_TOKEN)


@pytest.mark.parametrize(
    ("name", "formats", "schemes"),
    [
        ("qwen3-8b", "ascend", PER_TOKEN),
        ("qwen3-8b", ["compressed-tensors", "ascend"], PER_TOKEN),
        ("qwen3-8b", "ascend,golden-stick", rules()),
        ("qwen3-8b-w4a16", "golden-stick", [{"lm_head": "FLOAT"}, {"*": "W4A16"}]),
        ("deepseek-r1", "ascend", LATENT_PER_TOKEN),
        (
            "deepseek-r1-w4a8",
            "golden-stick",
            [
                {"lm_head": "FLOAT"},
                {"kv_b_proj": "FLOAT"},
                {"mlp.experts.": "W4A8_DYNAMIC"},
                {"mlp.": "W8A8_DYNAMIC"},
                {"*": "W8A8"},
            ],
        ),
    ],
)
def test_a_shipped_recipe_is_for_the_formats_that_are_asked_for(
    name: str, formats: str | list[str], schemes: list[dict[str, str]], tmp_path: Path
) -> None:
    recipe = find_recipe(name, formats)
    assert recipe.formats == tuple(formats.split(",") if isinstance(formats, str) else formats)
    assert recipe.model_dump()["quantization"]["schemes"] == schemes
    # A file of one's own says what it says.
    file = tmp_path / "mine.yaml"
    copy_recipe(name, file)
    assert find_recipe(str(file), formats).quantization == load_recipe(file).quantization
    file.write_text("model: here\nformat: ascend\nquantization: {algorithm: rtn}\n")
    assert find_recipe(str(file)).model_dump()["quantization"]["schemes"] == PER_TOKEN
    assert find_recipe(str(file), "golden-stick").model_dump()["quantization"]["schemes"] == rules()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    assert (
        find_recipe(str(folder), "golden-stick,ascend").quantization == find_recipe(str(folder)).quantization
    )
    assert find_recipe(str(folder), "ascend").model_dump()["quantization"]["schemes"] == PER_TOKEN


def test_every_shipped_recipe_is_per_token_where_all_its_servers_are() -> None:
    for name, path in shipped_recipes().items():
        assert find_recipe(name) == load_recipe(path), name


def test_a_written_recipe_reads_back_the_same(tmp_path: Path) -> None:
    recipe = load_recipe(shipped_recipes()["deepseek-r1"]).replace(
        "quantization", schemes=rules(skip=["lm_head", "größer"])
    )
    target = tmp_path / "mine.yaml"
    write_recipe(recipe, target)
    assert load_recipe(target) == recipe
    assert "  schemes: [{lm_head: FLOAT}, {größer: FLOAT}, {'*': W8A8}]\n" in target.read_text(
        encoding="utf-8"
    )
    with pytest.raises(OutputError, match="exists already"):
        write_recipe(recipe, target)
    write_recipe(recipe.replace("calibration", samples=5), target, overwrite=True)
    assert load_recipe(target).calibration.samples == 5
    with pytest.raises(OutputError, match="cannot be written"):
        write_recipe(recipe, tmp_path / "none" / "mine.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            {"skip": ["lm_head", "kv_b_proj"], "dynamic": ["mlp."]},
            '[{"lm_head": "FLOAT"}, {"kv_b_proj": "FLOAT"}, {"mlp.": "W8A8_DYNAMIC"}, {"*": "W8A8"}]',
        ),
        ({"weight_only": ["proj"]}, '[{"proj": "W8A16"}, {"*": "W8A8"}]'),
    ],
)
def test_an_old_recipe_is_shown_its_new_form(old: dict[str, list[str]], new: str) -> None:
    with pytest.raises(RecipeError, match=" and ".join(old)) as caught:
        validate_recipe({"model": "m", "quantization": old}, "old.yaml")
    assert f"write schemes: {new}" in str(caught.value)
    assert validate_recipe({"model": "m", "quantization": {"schemes": json.loads(new)}}, "new.yaml")


@pytest.mark.parametrize(
    ("schemes", "message"),
    [
        ("W8A8", "a list of PATTERN: SCHEME is expected"),
        ([], "the last entry is for all other linears"),
        ([{"lm_head": "FLOAT"}], "the last entry is for all other linears"),
        ([{"lm_head": "FLOAT", "*": "W8A8"}], "each entry is one PATTERN: SCHEME"),
        ([{"": "FLOAT"}, {"*": "W8A8"}], "a pattern is a part of a linear's name"),
        ([{"*": "INT8"}], "'INT8' is not a scheme"),
        ([{"*": 8}], "the scheme of '\\*' is 8"),
    ],
)
def test_schemes_that_say_nothing_are_refused(schemes: object, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        validate_recipe({"model": "m", "quantization": {"schemes": schemes}}, "bad.yaml")


def test_the_first_pattern_that_matches_decides() -> None:
    schemes = [{"layers.1.": "FLOAT"}, {"*.mlp.*": "W8A8_DYNAMIC"}, {"*": "W8A8"}]
    policy = validate_recipe({"model": "m", "quantization": {"schemes": schemes}}, "r.yaml").quantization
    assert str(policy.scheme("model.layers.1.mlp.up_proj")) == "FLOAT"
    assert str(policy.scheme("model.layers.0.mlp.up_proj")) == "W8A8_DYNAMIC"
    assert str(policy.scheme("model.layers.0.self_attn.q_proj")) == "W8A8"


@pytest.mark.parametrize(
    ("scheme", "group_size", "wanted"),
    [
        ("W4A16", None, "W4A16"),
        ("W4A16", 64, "W4A16_G64"),
        ("W4A16_G32_ASYM", None, "W4A16_G32_ASYM"),
        ("W4A8_DYNAMIC", 128, "W4A8_DYNAMIC_G128"),
        (W4A16, 32, "W4A16_G32"),
    ],
)
def test_a_scheme_replaces_all_rules_but_those_for_floating_point(
    scheme: str | Scheme, group_size: int | None, wanted: str
) -> None:
    changed = find_recipe("deepseek-r1").adjusted(scheme=scheme, group_size=group_size)
    expected = (("lm_head", FLOAT), ("kv_b_proj", FLOAT), ("*", parse_scheme(wanted)))
    assert changed.quantization.schemes == expected
    assert changed.quantization.feed_forward_smoothing == 0.5
    assert changed.adjusted(samples=3).quantization == changed.quantization


@pytest.mark.parametrize(
    ("scheme", "group_size", "message"),
    [
        ("W4A61", None, "--scheme: 'W4A61' is not a scheme"),
        (None, 64, "--group-size: is given without a scheme"),
        ("W4A16", 0, "--group-size: is 0, a number of columns is expected"),
        ("W4A16", -1, "--group-size: is -1"),
        ("FLOAT", 64, "--group-size: FLOAT has no groups"),
        ("W4A16_G64", 32, "--group-size: is 32, and W4A16_G64 says by itself what shares a scale"),
        ("W4A16_CHANNEL", 32, "--group-size: is 32, and W4A16_CHANNEL says by itself"),
    ],
)
def test_a_scheme_that_makes_no_sense(scheme: str | None, group_size: int | None, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        find_recipe("qwen3-8b").adjusted(scheme=scheme, group_size=group_size)
    assert message in str(caught.value)
    assert caught.value.remedy
