"""`msquant serve` as a process: what it prints, how it ends, what it refuses before the model is loaded."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from msquant.cli.app import main
from tests.formats.folders import write_folder
from tests.inference.quantized_folder import write_quantized

COMMAND = [sys.executable, "-m", "msquant", "serve"]


@pytest.fixture(scope="module")
def model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quantized(tiny_llama, tmp_path_factory.mktemp("serve") / "tiny", calibration=list(range(60)))


@contextmanager
def served(model: Path, *options: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and the line that it prints when it is ready."""
    process = subprocess.Popen(
        [*COMMAND, "--model", str(model), "--port", "0", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    try:
        assert process.stdout
        line = process.stdout.readline()
        assert line, process.communicate(timeout=10)[1]
        yield process, line
    finally:
        process.kill()
        process.communicate(timeout=30)


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["msquant", "serve", *arguments])
    with pytest.raises(SystemExit) as exited:
        main()
    assert isinstance(exited.value.code, int)
    return exited.value.code


def end(process: subprocess.Popen[str], url: str, number: signal.Signals, key: str) -> tuple[str, str]:
    """Signal a server that has a long stream under way; returns what is left of stdout, and stderr."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    assert client.completions.create(model="tiny", prompt="I am", max_tokens=2).choices[0].text
    stream = client.completions.create(
        model="tiny", prompt=["I am"] * 128, max_tokens=250, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    start = time.monotonic()
    process.send_signal(number)
    with pytest.raises(openai.APIError, match="the server is stopping"):
        list(stream)
    rest, errors = process.communicate(timeout=60)
    assert time.monotonic() - start < 20
    return rest, errors


@pytest.mark.e2e
def test_serves_scripts_until_ctrl_c(model: Path) -> None:
    with served(model, "--json", "--api-key-env", "THE_KEY", THE_KEY="s3cret") as (process, line):
        ready = json.loads(line)
        assert ready == {"url": ready["url"], "pid": process.pid, "model": "tiny", "engine": "embedded"}
        assert httpx.get(f"{ready['url']}/v1/models", trust_env=False).status_code == 401
        assert httpx.get(f"{ready['url']}/", trust_env=False).status_code == 200, "the page needs no key"
        rest, errors = end(process, ready["url"], signal.SIGINT, "s3cret")
        assert (rest, process.returncode) == ("", 130)
        *log, last = errors.splitlines()
        assert last == "interrupted"
        assert [line.split()[2:5] for line in log] == [
            ["GET", "/v1/models", "status=401"],
            ["GET", "/", "status=200"],
            ["POST", "/v1/completions", "status=200"],
            ["POST", "/v1/completions", "status=200"],
        ]
        assert re.search(r" prompt_tokens=\d+ completion_tokens=2 seconds=", log[2])
        assert "s3cret" not in errors
        assert "I am" not in errors


@pytest.mark.e2e
def test_serves_people_until_sigterm(model: Path) -> None:
    with served(model, "--host", "0.0.0.0", "--no-access-log") as (process, line):
        assert line.startswith("tiny (embedded) is served at http://0.0.0.0:")
        url = line.split(" served at ")[1].split("/v1")[0].replace("0.0.0.0", "127.0.0.1")
        assert process.stdout
        assert process.stdout.readline() == f"try it in a browser: {url}/\n"
        assert httpx.get(f"{url}/health", trust_env=False).json() == {"status": "ok", "active_requests": 0}
        rest, errors = end(process, url, signal.SIGTERM, "any")
        assert (rest, process.returncode) == ("", 0)
        assert errors.startswith("warning: listening on 0.0.0.0: everybody who reaches it can use the model")
        assert errors.count("\n") == 1


def test_port_in_use(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = "msquant.flows.engines.load_embedded"
    monkeypatch.setattr(loaded, lambda *_: pytest.fail("the model was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert run(["--model", str(model), "--port", port, "--json"], monkeypatch) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["what"] == f"port {port} of 127.0.0.1 is in use"
    assert error["where"] == "--port"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--engine", "cuda"], 1, "engine 'cuda' is unknown"),
        (["--port", "70000"], 2, "--port"),
        (["--engine", "vllm-mindspore"], 1, "vllm-mindspore"),
        (["--engine", "vllm"], 1, "is in the golden-stick format"),
        (["--dtype", "float32"], 1, "float32 is for the engine vllm"),
        (["--max-body", "huge"], 1, "'huge' is not a size"),
        (["--max-requests", "0"], 2, "--max-requests"),
        (["--api-key-env", "NO_SUCH_KEY"], 1, "environment variable NO_SUCH_KEY is not set"),
        (["--allow-host", "http://x", "--port", "0"], 1, "'http://x' is not a name"),
        (["--host", "no.such.host.invalid"], 1, "'no.such.host.invalid' is unknown"),
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
    assert message in output.err
    assert output.out == ""


def test_missing_tokenizer(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert run(["--model", str(folder), "--port", "0"], monkeypatch) == 1
    assert "holds no tokenizer.json" in capsys.readouterr().err


def test_dry_run(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--model", str(model), "--port", "8123", "--dry-run"], monkeypatch) == 0
    remark = "# the embedded engine serves in this process; nothing is started\n"
    assert capsys.readouterr().out == remark
    monkeypatch.setenv("THE_KEY", "s3cret")
    options = ["--engine", "vllm-mindspore", "--api-key-env", "THE_KEY", "--dry-run"]
    assert run(["--model", str(model), *options], monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == 'export VLLM_API_KEY="$THE_KEY"'
    assert "export VLLM_MS_MODEL_BACKEND=Native" in lines
    assert f"serve {model} --served-model-name {model.name} --host 127.0.0.1 --port 8000" in lines[-1]
    assert run(["--model", str(model), *options, "--json"], monkeypatch) == 0
    (document,) = json.loads(capsys.readouterr().out)
    assert document["argv"][-1] == "0.9"
    assert "s3cret" not in json.dumps(document)


def test_a_folder_that_the_server_would_refuse_is_named_before_anything_starts(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(model), "--engine", "vllm-mindspore", "--recipe", "deepseek-r1", "--dry-run"]
    assert run([*options, "--json"], monkeypatch) == 1
    error = json.dumps(json.loads(capsys.readouterr().out))
    assert "vllm-mindspore 0.5.1 (Native) with tensor_parallel_size 16 cannot serve this" in error
    assert "num_attention_heads" in error
    assert "choose a tensor_parallel_size that divides it" in error


def test_dry_run_of_every_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray's start on both nodes with the variables, its state, and the server on the first."""
    model = write_folder(tmp_path / "m", num_attention_heads=16, num_key_value_heads=4, intermediate_size=32)
    options = ["--model", str(model), "--engine", "vllm-mindspore", "--recipe", "deepseek-r1", "--dry-run"]
    assert run([*options, "--json"], monkeypatch) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["where"], "--head-address" in error["remedy"]) == ("serving.head_address", True)

    site = ["--head-address", "192.10.10.10", "--network-interface", "enp189s0f0"]
    assert run([*options, *site, "--json"], monkeypatch) == 0
    head, worker, status, server = json.loads(capsys.readouterr().out)
    assert [launch["place"] for launch in (head, worker, status, server)] == [
        "node 0, the head",
        "node 1",
        "node 0, the head",
        "node 0, the head",
    ]
    assert worker["argv"] == ["ray", "start", "--address=192.10.10.10:6379"]
    assert worker["env"]["HCCL_SOCKET_IFNAME"] == "enp189s0f0"
    assert server["argv"][-2:] == ["--distributed-executor-backend", "ray"]
    assert run([*options, *site], monkeypatch) == 0
    assert "# node 1\nexport " in capsys.readouterr().out
