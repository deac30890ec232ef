"""What the shared options stand for."""

import pytest

from msquant.checkpoint import memory
from msquant.cli import console, options
from msquant.recipe.recipe import Recipe, default_folder


def test_the_memory_budget_is_the_librarys_own() -> None:
    assert console.parse_bytes(options.MEMORY_BUDGET, "--memory-budget") == memory.MEMORY_BUDGET


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
    assert str(default_folder(model, Recipe(model=model))) == output


@pytest.mark.parametrize(
    ("width", "left"), [(60, ["text", "KL", "noise"]), (26, ["text", "KL"]), (9, ["text"])]
)
def test_a_table_drops_columns_before_it_cuts_digits(
    width: int, left: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "stdout", console.PlainConsole(width=width))
    rows = [["dialogue", "0.1234", "1.5e-03"], ["all", "0.2", "2.5e-04"]]
    console.print_table("T", ["text", "KL", "noise"], rows, spare=("noise", "KL"))
    shown = capsys.readouterr().out
    assert [name for name in ("text", "KL", "noise") if name in shown] == left
    assert ("0.1234" in shown) == ("KL" in left)
