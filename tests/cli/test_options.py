"""What the shared options stand for."""

import pytest

from msquant.cli import console, options
from msquant.flows import pipeline


def test_the_memory_budget_is_the_librarys_own() -> None:
    assert console.parse_bytes(options.MEMORY_BUDGET, "--memory-budget") == pipeline.MEMORY_BUDGET


@pytest.mark.parametrize(
    ("model", "output"),
    [
        ("smollm2-135m", "smollm2-135m-osl"),
        ("qwen2.5-7b", "qwen2.5-7b-osl"),
        ("recipes/mine.yaml", "mine-osl"),
        ("/data/Llama-3.1-8B/", "Llama-3.1-8B-osl"),
    ],
)
def test_the_output_is_named_after_the_model(model: str, output: str) -> None:
    assert str(options.default_output(model, "osl")) == output
