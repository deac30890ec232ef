"""`msquant run` on a tiny model; in a process of its own where the terminal or the environment matters."""

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from msquant.checkpoint.results import remember_result
from msquant.cli.app import main
from tests.fixtures.tiny_model import BOS, EOS
from tests.inference.quantized_folder import write_quantized

COMMAND = [sys.executable, "-m", "msquant", "run"]


@pytest.fixture(scope="module")
def model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model quantized, in the golden-stick format."""
    return write_quantized(tiny_llama, tmp_path_factory.mktemp("run") / "model", calibration=list(range(60)))


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the command line in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["msquant", "run", *arguments])
    with pytest.raises(SystemExit) as exited:
        main()
    assert isinstance(exited.value.code, int)
    return exited.value.code


def test_json(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", str(model), "--max-tokens", "4", "--json"]
    assert run([*options, "--prompt", "I am", "--prompt", "It's"], monkeypatch) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert printed.err == f"{model.name} answers, on the engine embedded: {model}\n"
    assert document["engine"] == "embedded"
    assert document["model"] == str(model)
    assert [completion["prompt"] for completion in document["completions"]] == ["I am", "It's"]
    for completion in document["completions"]:
        assert set(completion) == {"prompt", "text", "token_ids", "finish_reason", "tokens_per_second"}
        assert len(completion["token_ids"]) == 4
        assert completion["tokens_per_second"] > 0


@pytest.mark.e2e
def test_lines_of_the_guide_and_nothing_else(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(model), "--prompt", "I am", "--prompt", "It's", "--max-tokens", "4"]
    assert run([*options, "--json"], monkeypatch) == 0
    texts = [completion["text"] for completion in json.loads(capsys.readouterr().out)["completions"]]
    process = subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0
    assert process.stdout.splitlines() == [
        f"Prompt: 'I am'. Generated text: {texts[0]!r}",
        f'Prompt: "It\'s". Generated text: {texts[1]!r}',
    ]
    who, speed = process.stderr.splitlines()
    assert who == f"{model.name} answers, on the engine embedded: {model}"
    assert re.fullmatch(r"8 tokens in \d+\.\d s, \d+\.\d tokens/s", speed)


def test_without_model(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MSQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    options = ["--prompt", "I am", "--max-tokens", "2", "--json"]
    assert run(options[:2], monkeypatch) == 1
    message = capsys.readouterr().err
    assert "no model has been quantized or downloaded yet" in message
    assert "msquant quantize smollm2-135m --algo osl" in message
    (model / "msquant.json").write_text("{}")
    remember_result(model)
    assert run(options, monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)["model"] == str(model)


@pytest.mark.e2e
def test_text_grows_on_a_terminal(model: Path) -> None:
    """The growing text is drawn on stderr and wiped; stdout has the final line alone."""
    terminal, stderr = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "--model", str(model), "--prompt", "I am", "--max-tokens", "40"],
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=stderr,
    )
    os.close(stderr)
    drawn = b""
    # Reading ends with an OSError when the last process has closed the terminal.
    with contextlib.suppress(OSError):
        while data := os.read(terminal, 4096):
            drawn += data
    os.close(terminal)
    final, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"loading the model" in drawn
    assert b"I am" in drawn
    assert final.startswith(b"Prompt: 'I am'. Generated text: ")
    assert final.count(b"\n") == 1


def test_stream_prints_the_text_alone(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(model), "--prompt", "I am", "--max-tokens", "12"]
    assert run([*options, "--json"], monkeypatch) == 0
    document = json.loads(capsys.readouterr().out)
    whole = document["completions"][0]["text"]
    assert document["tokens_per_second"] > 0
    assert run([*options, "--stream"], monkeypatch) == 0
    assert capsys.readouterr().out == f"{whole}\n"
    stop = whole[5:8]
    assert run([*options, "--stream", "--stop", "not there", "--stop", stop], monkeypatch) == 0
    assert capsys.readouterr().out == f"{whole[: whole.index(stop)]}\n"


@pytest.mark.e2e
def test_prompts_from_a_file_come_after_those_of_the_command_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("Today is\n\ndef f(x):\n")
    options = ["--model", str(model), "--max-tokens", "2", "--json"]
    assert run([*options, "--prompt", "I am", "--prompt-file", str(path)], monkeypatch) == 0
    completions = json.loads(capsys.readouterr().out)["completions"]
    assert [completion["prompt"] for completion in completions] == ["I am", "Today is", "def f(x):"]
    # Standard input, in a process that has one.
    command = [*COMMAND, *options, "--prompt-file", "-"]
    process = subprocess.run(command, input=b'{"prompt": "I am"}', capture_output=True, timeout=120)
    assert json.loads(process.stdout)["completions"] == [
        completions[0]
        | {"tokens_per_second": json.loads(process.stdout)["completions"][0]["tokens_per_second"]}
    ]


def test_chat_puts_the_template_around_the_prompt(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(chat_model), "--max-tokens", "6", "--json"]
    assert run([*options, "--prompt", "Who are you?", "--chat"], monkeypatch) == 0
    (chat,) = json.loads(capsys.readouterr().out)["completions"]
    assert chat["prompt"] == "Who are you?"
    rendered = f"{BOS}user: Who are you?{EOS}{BOS}assistant: "
    assert run([*options, "--prompt", rendered], monkeypatch) == 0
    (plain,) = json.loads(capsys.readouterr().out)["completions"]
    assert chat["token_ids"] == plain["token_ids"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "--prompt"),
        (["--prompt", "I am", "--stop", ""], 1, "a stop string is empty"),
        (["--prompt", "I am", "--chat"], 1, "has no chat template"),
        (["--prompt", "I am", "--stream", "--json"], 2, "--stream"),
        (["--prompt", "I am", "--prompt", "b", "--stream"], 2, "it is for one prompt, there are 2"),
        (["--prompt-file", "/no/such/file"], 1, "the file of prompts cannot be read"),
        (["--prompt", ""], 1, "prompt 1 of 1 is empty"),
        (["--prompt", "I am", "--temperature", "-1"], 1, "temperature is -1.0"),
        (["--prompt", "I am", "--max-tokens", "0"], 1, "max_tokens is 0"),
        (["--prompt", "I am", "--max-tokens", "many"], 2, "'--max-tokens'"),
        (["--prompt", "I am", "--top-p", "0"], 1, "top_p is 0.0"),
        (["--prompt", "I am", "--engine", "cuda"], 1, "engine 'cuda' is unknown"),
        (["--prompt", "I am", "--engine", "vllm-mindspore"], 1, "vllm_mindspore is not installed"),
        (["--prompt", "I am", "--device", "tpu"], 1, "device 'tpu' is unknown"),
        (["--prompt", "word " * 300], 1, "leaves no room"),
    ],
)
def test_wrong_usage(
    model: Path,
    arguments: list[str],
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["--model", str(model), *arguments], monkeypatch) == code
    output = capsys.readouterr()
    said, silent = (output.out, output.err) if "--json" in arguments else (output.err, output.out)
    assert message in said
    assert silent == ""


def test_error_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--model", str(tmp_path / "absent"), "--prompt", "I am", "--json"], monkeypatch) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["what"] == "there is no such model folder"
    assert error["where"] == str(tmp_path / "absent")


def test_dry_run_starts_nothing_and_says_so(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(model), "--prompt", "I am", "--dry-run"]
    assert run([*options, "--engine", "embedded"], monkeypatch) == 0
    assert capsys.readouterr().out.startswith("# the embedded engine runs in this process")
    assert run([*options, "--engine", "embedded", "--json"], monkeypatch) == 0
    assert json.loads(capsys.readouterr().out) is None


def test_dry_run_of_vllm_mindspore_is_the_whole_command(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It needs neither the package nor an NPU."""
    for name in ("VLLM_MS_MODEL_BACKEND", "MS_ALLOC_CONF", "HCCL_OP_EXPANSION_MODE", "MS_ENABLE_LCCL"):
        monkeypatch.delenv(name, raising=False)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: m\nserving: {tensor_parallel_size: 2, max_model_len: 512, devices: [4, 5]}\n")
    options = ["--model", str(model), "--prompt", "I am", "--dry-run", "--engine", "vllm-mindspore"]
    assert run([*options, "--recipe", str(recipe), "--json"], monkeypatch) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["env"] == {
        "VLLM_MS_MODEL_BACKEND": "Native",
        "HCCL_OP_EXPANSION_MODE": "AIV",
        "MS_ENABLE_LCCL": "off",
        "MS_ALLOC_CONF": "enable_vmm:true",
        "ASCEND_RT_VISIBLE_DEVICES": "4,5",
    }
    assert document["argv"][0] == sys.executable
    assert document["requests"] == [
        {
            "op": "load",
            "model": str(model),
            "options": {
                "max_model_len": 512,
                "block_size": 128,
                "gpu_memory_utilization": 0.9,
                "tensor_parallel_size": 2,
                "quantization": "golden-stick",
            },
        }
    ]
    assert run(options, monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "export VLLM_MS_MODEL_BACKEND=Native"
    assert lines[-1].startswith('# its input: {"op": "load"')


def test_a_recipe_for_another_engine(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(model), "--prompt", "x", "--engine", "embedded", "--recipe", "deepseek-r1"]
    assert run([*options, "--json"], monkeypatch) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["where"], error["what"]) == (
        "--recipe",
        "deepseek-r1 is for the engine vllm-mindspore, this is embedded",
    )
