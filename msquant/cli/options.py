"""The options that several commands share, and what they stand for."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str, typer.Argument(help="A recipe's name or file (.yaml), or a model's folder (Hugging Face).")
]
Source = Annotated[str | None, typer.Option(help="Folder of the weights, in place of the recipe's model.")]
Samples = Annotated[int | None, typer.Option(help="Calibration sequences.")]
SequenceLength = Annotated[int | None, typer.Option(help="Tokens in each calibration sequence.")]
MemoryBudget = Annotated[
    str, typer.Option(help="Hidden states beyond this are kept on disk, for example 4GB.")
]

MEMORY_BUDGET = "1GB"


def default_output(model: str, algorithm: str) -> Path:
    """MODEL-ALGO in the current folder; only a recipe file's suffix is left out: `qwen2.5-7b` stays whole."""
    path = Path(model)
    name = path.stem if path.suffix in (".yaml", ".yml") else path.resolve().name
    return Path(f"{name}-{algorithm}")
