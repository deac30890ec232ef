"""An engine is added through its public point, and runs and serves a folder by name."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from msquant.errors import EngineError
from msquant.flows import engines
from msquant.flows.engines import EngineKind, EngineOptions, load_embedded
from msquant.flows.generation import dry_run, generate
from msquant.inference.engine_protocol import Engine, Sampling
from msquant.inference.launch import Launch


class EchoEngine(EngineKind):
    """The embedded engine under another name, with a server that prints its folder."""

    name = "echo"
    takes = frozenset({"dtype"})

    def load(self, folder: Path, options: EngineOptions) -> Engine:
        """In this process."""
        return load_embedded(folder)

    def serve_commands(self, folder: Path, options: EngineOptions, host: str, port: int) -> list[Launch]:
        """One process."""
        return [Launch(("echo", str(folder), options.dtype, f"{host}:{port}"), {})]


@pytest.fixture(autouse=True)
def _added() -> Iterator[None]:
    engines.register(EchoEngine())
    yield
    del engines._REGISTERED[EchoEngine.name]


def test_it_generates_by_name(tiny_llama: Path) -> None:
    sampling = Sampling(max_tokens=4, temperature=0.0, ignore_eos=True)
    done = generate(tiny_llama, ["I am"], sampling, engine="echo", dtype="float32")
    assert len(done.completions[0].token_ids) == 4
    assert dry_run(tiny_llama, engine="echo") is None


def test_its_options_and_name_are_checked(tiny_llama: Path) -> None:
    assert engines.engine_names()[-1] == "echo"
    with pytest.raises(EngineError, match="vllm-mindspore, this is echo"):
        dry_run(tiny_llama, engine="echo", recipe="mine.yaml")
    with pytest.raises(EngineError, match="vllm-mindspore, echo"):
        dry_run(tiny_llama, engine="tgi")


def test_serve_prints_its_command(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from typer.testing import CliRunner

    from msquant.cli.app import app

    options = ["--engine", "echo", "--dtype", "float32", "--port", "8001", "--dry-run"]
    run = CliRunner().invoke(app, ["serve", "--model", str(tiny_llama), *options])
    assert run.exit_code == 0, run.output
    assert f"echo {tiny_llama} float32 127.0.0.1:8001" in run.output.replace("\n", "")
