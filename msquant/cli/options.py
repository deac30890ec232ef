"""The options that several commands share, and what they stand for."""

from pathlib import Path
from typing import Annotated

import typer

from msquant.algorithms import algorithm_names, find_algorithm
from msquant.errors import RecipeError


def _known_algorithm(name: str | None) -> str | None:
    if name is not None:
        try:
            find_algorithm(name)
        except RecipeError as error:
            raise RecipeError(error.what, where="--algo", remedy=error.remedy) from None
    return name


Model = Annotated[
    str, typer.Argument(help="A recipe's name or file (.yaml), or a model's folder (Hugging Face).")
]
Source = Annotated[str | None, typer.Option(help="Folder of the weights, in place of the recipe's model.")]
Algo = Annotated[
    str | None,
    typer.Option(help=f"Algorithm: {', '.join(algorithm_names())}.", callback=_known_algorithm),
]
Calibration = Annotated[
    str | None, typer.Option(help="Text to calibrate on: builtin, or a .txt, .jsonl or .parquet file.")
]
TextField = Annotated[str | None, typer.Option(help="Field of the text in .jsonl and .parquet.")]
Samples = Annotated[int | None, typer.Option(help="Calibration sequences.")]
SequenceLength = Annotated[int | None, typer.Option(help="Tokens in each calibration sequence.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the choice of calibration sequences.")]
Formats = Annotated[
    str | None,
    typer.Option(
        "--format", help="golden-stick, compressed-tensors, ascend, or several with commas between them."
    ),
]
Device = Annotated[str, typer.Option(help="cpu or ascend.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show golden-stick's own log.")]
MemoryBudget = Annotated[
    str, typer.Option(help="Hidden states beyond this are kept on disk, for example 4GB.")
]

MEMORY_BUDGET = "1GB"


def default_output(model: str, algorithm: str) -> Path:
    """MODEL-ALGO in the current folder; only a recipe file's suffix is left out: `qwen2.5-7b` stays whole."""
    path = Path(model)
    name = path.stem if path.suffix in (".yaml", ".yml") else path.resolve().name
    return Path(f"{name}-{algorithm}")
