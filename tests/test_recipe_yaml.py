"""Recipe files from outside: every limit is named, in little time, and no value of YAML breaks the reader."""

import json
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import strategies as st

from msquant.errors import RecipeError
from msquant.hub.published import configs_folder
from msquant.recipe.recipe import load_recipe
from msquant.recipe.recipe_yaml import MAX_BYTES, MAX_DEPTH, MAX_DIGITS, MAX_NODES, read_yaml
from tests.fixtures.fuzzing import TEXTS, VALUES, changed, fuzz, within_limits

RECIPE = yaml.safe_load((configs_folder() / "deepseek-r1.yaml").read_text())
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 30))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, r"an alias \(\*name\) is not read in a recipe, write the value again, in line 2"),
        ("".join(f"key{i}: 1\n" for i in range(5_000)), f"more than {MAX_NODES} keys and values"),
        ("[" * 10_000, f"nested more than {MAX_DEPTH} deep, in line 1"),
        ("a: {" * 10_000, f"nested more than {MAX_DEPTH} deep"),
        ("model: " + "x" * MAX_BYTES, f"at most {MAX_BYTES} are read"),
        (
            "model: a\nseed: " + "9" * 5_000,
            f"a number of 5000 digits, at most {MAX_DIGITS} are read, in line 2",
        ),
        ("model: a\nseed: !!int x", "'x' is no int, in line 2, column 7"),
        ("seed: !!float x", "'x' is no float"),
        ("seed: !!bool x", "'x' is no bool"),
        ("seed: !!timestamp x", "'x' is no timestamp"),
        ("seed: 2001-13-45", "'2001-13-45' is no timestamp"),
    ],
    ids=["bomb", "keys", "lists", "maps", "bytes", "digits", "int", "float", "bool", "timestamp", "date"],
)
def test_a_limit_or_a_value_that_is_none(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with within_limits(), pytest.raises(RecipeError, match=says) as caught:
        load_recipe(path)
    assert caught.value.where == str(path)
    assert len(caught.value.what) < 500


def test_many_unknown_keys_are_not_all_listed(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: a\n" + "".join(f"key{i}: 1\n" for i in range(900)))
    with within_limits(), pytest.raises(RecipeError, match="and 890 more"):
        load_recipe(path)


@pytest.mark.parametrize("kind", ["device", "pipe"])
def test_only_a_file_is_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    if kind == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(path)
    with within_limits(), pytest.raises(RecipeError, match="only regular files are read"):
        load_recipe(path)


# JSON is YAML, but for what JSON escapes; tags and plain words are YAML alone.
TAGS = st.sampled_from(
    ["int", "float", "bool", "null", "timestamp", "binary", "set", "omap", "pairs", "str", "x"]
)
TAGGED = st.builds(lambda tag, value: f"model: a\nseed: !!{tag} {json.dumps(value)}", TAGS, VALUES)
PLAIN = st.builds(
    lambda key, value: f"{key}: {value}",
    TEXTS,
    st.text("0123456789.:-_eExoinfTtZ+~<=!&*?,[]{}#|>%@ \n", max_size=30),
)
DOCUMENTS = changed(RECIPE).map(json.dumps) | VALUES.map(json.dumps) | TAGGED | PLAIN | st.text()


@fuzz(DOCUMENTS)
def test_a_recipe(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    with within_limits():
        load_recipe(path)


def test_what_comes_with_msquant_is_within_the_limits() -> None:
    for path in configs_folder().glob("*.yaml"):
        assert read_yaml(path)
