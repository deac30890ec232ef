"""A tiny quantized model with a chat template, loaded once, and a server of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from msquant.flows.engines import load_embedded
from msquant.inference.embedded import EmbeddedEngine
from tests.server.running import RunningServer, running


@pytest.fixture(scope="session")
def engine(chat_model: Path) -> EmbeddedEngine:
    return load_embedded(chat_model)


@pytest.fixture(scope="module")
def server(engine: EmbeddedEngine) -> Iterator[RunningServer]:
    with running(engine) as server:
        yield server
