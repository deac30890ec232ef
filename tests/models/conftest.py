"""Fixtures for the tests of the MindSpore layers."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest

from msquant.models.device import use_device


@pytest.fixture(scope="session")
def dtype() -> Any:
    """The compute dtype of the CPU, with MindSpore set up for it."""
    return use_device("cpu")


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    """Only what nobody refers to is freed."""
    gc.disable()
    yield
    gc.enable()
