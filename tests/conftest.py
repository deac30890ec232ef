"""Fixtures that every test may use."""

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

import msquant  # noqa: F401  # chooses how NumPy computes, before anything loads it
from tests.fixtures import fuzzing  # noqa: F401  # registers the profiles
from tests.fixtures.browser import Open, chromium, pages
from tests.fixtures.tiny_model import CHAT_TEMPLATE, write_tiny_llama


def _is_slow_run(config: pytest.Config) -> bool:
    return config.getoption("markexpr") == "slow"


def pytest_configure(config: pytest.Config) -> None:
    """Choose how many cases the fuzzed tests try."""
    settings.load_profile("slow" if _is_slow_run(config) else "plain")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let the fuzzed tests take part in the slow run too."""
    if _is_slow_run(config):
        for item in items:
            if item.get_closest_marker("fuzz"):
                item.add_marker("slow")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache folder of this run: a fresh one, unless MSQUANT_CACHE names one to share between runs.

    Tests that run at the same time have each their own: one asks for the newest result that it has made.
    """
    given, worker = os.environ.get("MSQUANT_CACHE"), os.environ.get("PYTEST_XDIST_WORKER", "")
    folder = Path(given) / worker if given else tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MSQUANT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Let the processes that tests start be interrupted: a shell's background jobs inherit a deaf SIGINT."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def _device() -> None:
    """Set up MindSpore before a test file that imports it computes: its first operator fixes the device."""
    if "mindspore" in sys.modules:
        from msquant.models.device import use_device

        use_device()


@pytest.fixture(scope="module", autouse=True)
def _leave_what_is_loaded() -> None:
    """Take what other test files have loaded out of the garbage collector's sight.

    golden-stick collects garbage after every decoder layer, a second each with all modules of this run.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """See `chromium`."""
    with chromium() as found:
        yield found


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """See `pages`."""
    with pages(browser) as opens:
        yield opens


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama model folder; read it, copy it, never change it."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def chat_model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_llama` quantized, with a chat template; read it, never change it."""
    from tests.inference.quantized_folder import write_quantized

    folder = write_quantized(
        tiny_llama, tmp_path_factory.mktemp("chat") / "tiny", calibration=list(range(60))
    )
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": CHAT_TEMPLATE}))
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 kB; where it cannot be mounted, tests with a limited file size stand in for it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.fixture(params=["onednn", "widened"])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Layers built in the test use oneDNN's kernel, or float32."""
    from msquant.kernels import onednn

    if request.param == "widened":
        monkeypatch.setattr(onednn, "load_int8", lambda: None)
    elif onednn.load_int8() is None:
        pytest.skip("this processor has no exact int8 instructions")
    return str(request.param)
