"""`import msquant`: each function beside the command that it stands for."""

import doctest
import importlib
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main
from typer.testing import CliRunner

import msquant
from msquant import api
from msquant.cli.app import app
from tests.fixtures.tiny_model import write_tiny_llama

COMMANDS = ("quantize", "plan", "analyze", "evaluate", "compare", "inspect", "export", "download")
# What a command has for a terminal, or a recipe holds, and what stands for it in the function.
RENAMED = {
    "algo": "algo",
    "text": "texts",
    "no_builtin": "builtin",
    "no_evaluate": "evaluate",
    "verdict_text": "verdict_texts",
}
# What a command calls where it is asked to choose schemes.
CHOOSING = {"quantize": "promise", "analyze": "frontier"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny model quantized by `quantize`, from a recipe that is changed first."""
    folder = tmp_path_factory.mktemp("api")
    write_tiny_llama(folder / "float")
    recipe = msquant.find_recipe(folder / "float").replace("evaluation", sequences=1, sequence_length=16)
    records: list[dict[str, Any]] = []
    result = msquant.quantize(
        recipe,
        folder / "made",
        algo="rtn",
        samples=1,
        sequence_length=16,
        progress=msquant.Progress(layer=records.append),
    )
    return result, records, folder


def test_everything_that_is_offered_is_there_typed_and_explained() -> None:
    assert set(msquant.__all__) == {*api.__all__, "__version__"}
    assert set(msquant.__all__) <= set(dir(msquant))
    for name in api.__all__:
        assert getattr(msquant, name) is getattr(api, name)
        assert inspect.getdoc(getattr(msquant, name))
    for name in (*COMMANDS, *CHOOSING.values(), "load", "find_recipe"):
        function = getattr(msquant, name)
        assert "Examples:" in function.__doc__
        assert "Raises:" in function.__doc__
        hints = [parameter.annotation for parameter in inspect.signature(function).parameters.values()]
        assert inspect.Parameter.empty not in [*hints, inspect.signature(function).return_annotation]


def test_analyze_gives_a_recipe_that_quantize_takes(made: Any, tmp_path: Path) -> None:
    recipe = msquant.find_recipe(made[2] / "float").adjusted(samples=1, sequence_length=16, evaluate=False)
    analysis = msquant.analyze(recipe, keep_float=2)
    assert analysis.recipe is not None
    planned = msquant.plan(analysis.recipe, tmp_path / "mixed")
    result = msquant.quantize(analysis.recipe, tmp_path / "mixed")
    assert result.output_bytes == analysis.mixed_bytes
    assert planned.output_bytes == sum(path.stat().st_size for path in result.folder.glob("*.safetensors"))
    with pytest.raises(msquant.MsquantError, match="exclude one another"):
        msquant.analyze(recipe, keep_float=2, keep_dynamic=2)


def test_what_is_not_offered_is_an_attribute_error() -> None:
    for module in (msquant, api):
        with pytest.raises(AttributeError, match=f"{module.__name__}' has no attribute 'prune'"):
            module.prune  # noqa: B018


def test_importing_it_loads_nothing_heavy() -> None:
    from tests.test_package import HEAVY, run

    code = "import sys, msquant; msquant.quantize; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = set(run(sys.executable, "-c", code).stdout.split())
    assert "msquant" in loaded
    assert loaded & HEAVY == set()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_function_takes_what_its_command_takes(name: str) -> None:
    """An option is a parameter of the function or of `Recipe.adjusted`, or shows something on a terminal."""
    command = typer.main.get_command(app)
    assert isinstance(command, click.Group) or hasattr(command, "commands")
    options = {parameter.name for parameter in command.commands[name].params}
    function = set(inspect.signature(getattr(msquant, name)).parameters)
    if name in CHOOSING:
        function |= set(inspect.signature(getattr(msquant, CHOOSING[name])).parameters)
    recipe = inspect.signature(msquant.Recipe.adjusted).parameters
    shown = {"as_json", "dry_run", "markdown", "verbose", "server", "tensor_parallel", "probe"}
    if name == "analyze":
        # Of the file for its recipe, and which of its two functions it calls.
        shown |= {"output", "overwrite", "frontier"}
    # Tasks of lm_eval are asked by another function of the command, of `msquant.tasks`.
    tasks = {"tasks", "task_data", "limit", "num_fewshot", "endpoint"} if name == "evaluate" else set()
    taken = function | (set(recipe) if name in ("quantize", "plan", "analyze") else set())
    assert {RENAMED.get(str(option), option) for option in options - shown - tasks} <= taken | {"model"}


@pytest.mark.parametrize("name", ["msquant", "msquant.api"])
def test_the_examples_of_docstrings_do_what_they_say(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
    assert name == "msquant" or result.attempted >= 2


def test_quantize_calls_back_and_says_what_it_cost(made: Any) -> None:
    result, records, folder = made
    assert result.folder == folder / "made"
    assert [record["index"] for record in records] == [layer["index"] for layer in result.layers]
    assert result.evaluation["overall"]["kl"] > 0
    assert json.loads((result.folder / "msquant.json").read_text())["recipe"]["calibration"]["samples"] == 1


def test_evaluate_is_compare_with_one_model(made: Any, tmp_path: Path) -> None:
    result, _, folder = made
    own = tmp_path / "own.txt"
    own.write_text("Nobody has seen this sentence before, and nobody will see it again. " * 9)
    few: dict[str, Any] = {"texts": [str(own)], "builtin": False, "sequences": 1, "sequence_length": 32}
    one = msquant.evaluate(result.folder, **few)
    both = msquant.compare([result.folder, folder / "float"], folder / "float", **few)
    assert one.baseline is not None
    assert one.baseline.folder == folder / "float"
    assert one.score.overall == both.score.overall
    assert both.models[1].score.overall.kl == 0
    options = ["--text", str(own), "--no-builtin", "--sequences", "1", "--sequence-length", "32", "--json"]
    shown = CliRunner().invoke(app, ["evaluate", str(result.folder), *options])
    assert shown.exit_code == 0
    (model,) = json.loads(shown.stdout)["models"]
    assert model["overall"] == one.score.as_dict()["overall"]


def test_inspect_and_export(made: Any) -> None:
    folder = made[0].folder
    summary = msquant.inspect(folder, verify=True)
    assert summary.findings == []
    assert summary.quantization == "golden-stick"
    (exported,) = msquant.export(folder, ["ascend"], folder.parent / "ascend")
    assert msquant.inspect(exported.folder).quantization == exported.format == "ascend"
    with pytest.raises(msquant.MsquantError, match="int5"):
        msquant.export(folder, "int5")


def test_load_generates_until_it_is_closed(made: Any) -> None:
    pieces: list[tuple[int, str]] = []
    with msquant.load(made[0].folder) as model:
        assert (model.folder, model.engine) == (made[0].folder, "embedded")
        (one,) = model.generate("I am", max_tokens=3, on_text=lambda *piece: pieces.append(piece))
        two = model.generate(["I am", "Today"], max_tokens=3)
        with pytest.raises(msquant.MsquantError, match="prompt 2 of 2 is empty"):
            model.generate(["I am", ""])
        with pytest.raises(msquant.MsquantError, match="chat template"):
            model.generate("I am", chat=True)
    assert "".join(text for _, text in pieces) == one.text
    assert two[0].token_ids == one.token_ids
    assert [completion.prompt for completion in two] == ["I am", "Today"]


def test_load_without_a_folder_takes_the_newest_result(made: Any) -> None:
    from msquant.checkpoint.results import remember_result

    remember_result(made[0].folder)
    with msquant.load() as model:
        assert model.folder == made[0].folder


def test_a_scheme_is_its_word() -> None:
    scheme = msquant.parse_scheme("W4A16_G64")
    assert isinstance(scheme, msquant.Scheme)
    assert str(scheme) == "W4A16_G64"


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: msquant.find_recipe("deepseek-r11"), "deepseek-r1"),
        (lambda: msquant.quantize("smollm2-135m", samples=0), "samples"),
        (lambda: msquant.quantize("smollm2-135m", formats="onnx"), "onnx"),
        (lambda: msquant.evaluate("nowhere/at-all"), "nowhere"),
        (lambda: msquant.load("nowhere"), "no such model folder"),
        (lambda: msquant.download("one-name"), "one-name"),
        (lambda: msquant.inspect("nowhere"), "nowhere"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(
    call: Any, says: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(msquant.MsquantError) as error:
        call()
    assert says in str(error.value)
    assert list(tmp_path.iterdir()) == []
