"""Fixtures for the tests of the MindSpore layers."""

from typing import Any

import pytest

from msquant.models.device import use_device


@pytest.fixture(scope="session")
def dtype() -> Any:
    """The compute dtype of the CPU, with MindSpore set up for it."""
    return use_device("cpu")
