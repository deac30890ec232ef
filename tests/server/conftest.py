"""A tiny quantized model with a chat template, loaded once, and a server of it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from msquant.generation import load_embedded
from msquant.inference.embedded import EmbeddedEngine
from tests.fixtures.tiny_model import CHAT_TEMPLATE
from tests.inference.quantized_folder import write_quantized
from tests.server.running import RunningServer, running


@pytest.fixture(scope="session")
def chat_model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_llama` quantized, with a chat template; read it, never change it."""
    folder = write_quantized(
        tiny_llama, tmp_path_factory.mktemp("chat") / "tiny", calibration=list(range(60))
    )
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": CHAT_TEMPLATE}))
    return folder


@pytest.fixture(scope="session")
def engine(chat_model: Path) -> EmbeddedEngine:
    return load_embedded(chat_model)


@pytest.fixture(scope="module")
def server(engine: EmbeddedEngine) -> Iterator[RunningServer]:
    with running(engine) as server:
        yield server
