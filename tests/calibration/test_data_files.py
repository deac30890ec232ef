"""Which files of a dataset are of a configuration and a split."""

import pytest

from msquant.calibration.data_files import card_configs, choose_data_files
from msquant.errors import CalibrationError

CARD = """---
license: mit
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
- config_name: socratic
  default: true
  data_files: "socratic/**/*.parquet"
---
# A set
"""
FILES = ["README.md", "main/train-00000-of-00001.parquet", "main/test-00000-of-00001.parquet"]
FILES += ["socratic/a/b.parquet", "socratic/c.parquet", ".hidden/train.parquet", "load.py"]


@pytest.mark.parametrize(
    ("names", "paths", "split"),
    [
        (("main", "test"), ["main/test-00000-of-00001.parquet"], "test"),
        (("main",), ["main/train-00000-of-00001.parquet"], "train"),
        ((), ["socratic/a/b.parquet", "socratic/c.parquet"], "train"),
    ],
)
def test_as_the_readme_says(names: tuple[str, ...], paths: list[str], split: str) -> None:
    files = choose_data_files(FILES, card_configs(CARD), names, "set")
    assert (list(files.paths), files.split, files.reader) == (paths, split, "parquet")


@pytest.mark.parametrize(
    ("names", "paths"),
    [
        ((), ["data/train.jsonl"]),
        (("validation",), ["dev.jsonl"]),
        (("", "test"), ["x_test.jsonl.gz"]),
        (("train_sft",), ["data/train_sft-00000-of-00002.jsonl", "data/train_sft-00001-of-00002.jsonl"]),
    ],
)
def test_by_the_words_of_paths(names: tuple[str, ...], paths: list[str]) -> None:
    listed = ["data/train.jsonl", "dev.jsonl", "x_test.jsonl.gz", "notes.md", "requirements.txt"]
    listed += ["data/train_sft-00000-of-00002.jsonl", "data/train_sft-00001-of-00002.jsonl"]
    assert list(choose_data_files(listed, [], names, "set").paths) == paths


def test_a_folder_is_a_configuration() -> None:
    listed = ["en/train.csv", "zh/train.csv", "zh/test.csv"]
    assert choose_data_files(listed, [], ("zh", "test"), "set").paths == ("zh/test.csv",)
    assert choose_data_files(listed, [], ("en",), "set").paths == ("en/train.csv",)


def test_what_was_left_open_is_said() -> None:
    assert (
        choose_data_files(["train.csv", "test.csv"], [], (), "set").note == "set: split train of test, train"
    )


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (("main", "dev"), "no split 'dev'; there is train, test"),
        (("other", "train"), "no configuration 'other'; there is main, socratic"),
    ],
)
def test_unknown_names_list_the_real_ones(names: tuple[str, ...], what: str) -> None:
    with pytest.raises(CalibrationError, match=what):
        choose_data_files(FILES, card_configs(CARD), names, "set")


def test_several_configurations_and_none_named() -> None:
    configs = [{"config_name": name, "data_files": "*.csv"} for name in "ab"]
    with pytest.raises(CalibrationError, match="several configurations") as caught:
        choose_data_files(["x.csv"], configs, (), "set")
    assert "a, b" in (caught.value.remedy or "")


@pytest.mark.parametrize("listed", [[], ["load.py", "README.md", "data.zip"]])
def test_a_set_that_is_a_script_is_not_run(listed: list[str]) -> None:
    with pytest.raises(CalibrationError, match="no file that can be read") as caught:
        choose_data_files(listed, [], (), "set")
    assert "not run" in (caught.value.remedy or "")


@pytest.mark.parametrize("card", ["", "# none", "---\nconfigs: 3\n---", "---\n: [\n---", "---\n- a\n---"])
def test_a_readme_without_configurations(card: str) -> None:
    assert card_configs(card) == []


@pytest.mark.parametrize(
    "files", [3, [3], [{"split": "train", "path": "**x"}], {"train": ["**/[z-a]", "a**"]}]
)
def test_a_readme_that_makes_no_sense_is_named(files: object) -> None:
    with pytest.raises(CalibrationError, match=r"configuration 'odd' cannot be understood") as caught:
        choose_data_files(["x.csv"], [{"config_name": "odd", "data_files": files}], (), "hf:org/odd")
    assert caught.value.where == "hf:org/odd"
