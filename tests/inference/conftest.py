"""A quantized tiny model, shared by the tests of the engines and of `msquant run`."""

from pathlib import Path

import pytest

from tests.inference.quantized_folder import write_quantized


@pytest.fixture(scope="session")
def tiny_quantized(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_llama` in the golden-stick format; read it, copy it, never change it."""
    folder = tmp_path_factory.mktemp("quantized") / "llama"
    return write_quantized(tiny_llama, folder, calibration=[token % 512 for token in range(7, 700, 11)])
