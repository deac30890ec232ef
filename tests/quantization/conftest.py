"""MindSpore, set up before any test here computes with it."""

import pytest

from msquant.models.device import use_device


@pytest.fixture(scope="session", autouse=True)
def _device() -> None:
    """The device of a process cannot be chosen after its first operator."""
    use_device("cpu")
