"""The scripts of `examples/`, each run as a person would, on a model that is small enough."""

import contextlib
import io
import runpy
import sys
from pathlib import Path

import pytest

from tests.fixtures.tiny_model import write_tiny_llama

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: object, fails: bool = False) -> str:
    """What a script prints, or ends with. It runs in this process, which has imported MindSpore already."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        if not fails:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
            return printed.getvalue()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return str(ended.value.code)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("examples") / "float")


@pytest.fixture(scope="module")
def quantized(model: Path) -> tuple[Path, str]:
    output = model.with_name("quantized")
    return output, run("own_model.py", model, output, "--samples", 1, "--prompt", "I am")


def test_there_is_one_for_each_guide() -> None:
    guides = {path.stem for path in (EXAMPLES.parent / "docs" / "guides").glob("*.md")}
    assert {path.stem.replace("_", "-") for path in EXAMPLES.glob("*.py")} == guides


def test_quantize_your_own_model(quantized: tuple[Path, str]) -> None:
    said = quantized[1].splitlines()
    assert "GB become" in said[0]
    assert said[1:3] == ["decoder layer 0 is done", "decoder layer 1 is done"]
    assert said[3].startswith("KL to the float model: 0.")
    assert said[4].startswith("I am")


def test_many_machines(model: Path) -> None:
    output = model.with_name("shared")
    said = run("many_machines.py", model, output, "--workers", 2).splitlines()
    assert said[0].endswith("GB for each worker")
    assert sorted(said[1:3]) == ["decoder layer 0 is done", "decoder layer 1 is done"]
    assert said[-1] == f"written to {output}"


def test_state_the_accuracy(model: Path) -> None:
    output = model.with_name("promised")
    said = run("promise.py", model, output, "--max-kl", 0.05, "--server", "vllm-ascend").splitlines()
    assert said[0].startswith("round 1: 0.0")
    assert said[-1] == f"kept by {output}"


def test_deepseek_r1_end_to_end(model: Path) -> None:
    planned = run("deepseek_r1.py", "--plan-only")
    assert "DeepSeek-R1: 684.5 B parameters" in planned
    output = model.with_name("end-to-end")
    said = run("deepseek_r1.py", "--recipe", model, "--output", output, "--samples", 1)
    assert "decoder layer 1: error" in said
    assert f"{output} is served by vllm-mindspore" in said
    assert f"{output}-ascend is served by vllm-ascend" in said


def test_serve_on_ascend(quantized: tuple[Path, str]) -> None:
    said = run("serve_on_ascend.py", quantized[0], "--export", "ascend")
    assert "vllm-ascend" in said
    assert f"msquant serve --model {quantized[0]}-ascend" in said


def test_read_a_report(quantized: tuple[Path, str], tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("Nobody has seen this sentence before, and nobody will see it again. " * 20)
    said = run("read_a_report.py", quantized[0], "--text", own, "--sequence-length", 32)
    assert "own.txt: perplexity" in said
    assert "all: perplexity" in said
    assert said.count("signal to noise of its own") == 2


def test_when_accuracy_is_not_enough(model: Path) -> None:
    arguments = model, model.with_name("ladder"), "--samples", 1, "--keep", 2
    said = run("accuracy.py", *arguments, "--limit", 0, fails=True)
    assert "no rung holds the limit" in said
    made = [path.name for path in sorted(model.parent.glob("ladder-*"))]
    assert made == ["ladder-1", "ladder-2", "ladder-3"]


def test_an_error_is_what_it_ends_with(tmp_path: Path) -> None:
    said = run("own_model.py", tmp_path / "nowhere", tmp_path / "out", fails=True)
    assert said.startswith("error: ")
