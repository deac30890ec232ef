"""The page of a large model, drawn once for all tests."""

from pathlib import Path

import pytest

from msquant.reporting.write import write_report
from tests.reporting.folders import poison, write_large


@pytest.fixture(scope="package")
def large_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """61 layers with 256 experts; read it, never change it."""
    return write_large(tmp_path_factory.mktemp("report") / "large")


@pytest.fixture(scope="package")
def large(large_folder: Path) -> Path:
    """Its page."""
    return write_report(large_folder)[0]


@pytest.fixture(scope="package")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a folder whose names are no names."""
    folder = write_large(tmp_path_factory.mktemp("hostile") / "<img src=x onerror=alert(5)>")
    poison(folder)
    return write_report(folder, folder.parent / "hostile.html")[0]
