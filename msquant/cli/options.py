"""The options that several commands share, and what they stand for."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from msquant.algorithms import algorithm_names, find_algorithm
from msquant.errors import RecipeError

if TYPE_CHECKING:
    from msquant.recipe.recipe import Recipe


def _known_algorithm(name: str | None) -> str | None:
    if name is not None:
        try:
            find_algorithm(name)
        except RecipeError as error:
            raise RecipeError(error.what, where="--algo", remedy=error.remedy) from None
    return name


def _known_device(name: str) -> str:
    from msquant.models.device import mindspore_target

    mindspore_target(name)
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
    list[str] | None,
    typer.Option(
        help="Text to calibrate on: builtin, self, a file or folder, hf:ORG/NAME, modelers:ORG/NAME, or a "
        "known dataset (gsm8k); =8 or =25% behind it for a mix. Repeat it for more."
    ),
]
Template = Annotated[
    str | None, typer.Option(help="How a row becomes text: '{question}\\n{answer}'.", show_default=False)
]
ChatTemplate = Annotated[
    bool | None,
    typer.Option(
        "--chat-template/--no-chat-template",
        help="Put conversations through the tokenizer's chat template.  [default: as the recipe says]",
        show_default=False,
    ),
]
Pack = Annotated[
    bool | None,
    typer.Option(
        "--pack/--no-pack",
        help="Fill a sequence with several documents, or take one each.  [default: as the recipe says]",
        show_default=False,
    ),
]
Samples = Annotated[int | None, typer.Option(help="Calibration sequences.")]
MaxSamples = Annotated[
    int | None,
    typer.Option(
        help="For a mixture of experts: go on up to so many sequences, to feed the experts.",
        show_default=False,
    ),
]
SequenceLength = Annotated[int | None, typer.Option(help="Tokens in each calibration sequence.")]
Seed = Annotated[int | None, typer.Option(help="Seed of the choice of calibration sequences.")]
Formats = Annotated[
    str | None,
    typer.Option(
        "--format", help="golden-stick, compressed-tensors, ascend, or several with commas between them."
    ),
]
Device = Annotated[str, typer.Option(help="cpu or ascend.", callback=_known_device)]
EngineDevice = Annotated[
    str, typer.Option(help="Where the embedded engine computes: cpu or ascend.", callback=_known_device)
]
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


def with_calibration(
    recipe: "Recipe",
    calibration: list[str] | None = None,
    template: str | None = None,
    chat_template: bool | None = None,
    pack: bool | None = None,
    samples: int | None = None,
    max_samples: int | None = None,
    sequence_length: int | None = None,
    seed: int | None = None,
) -> "Recipe":
    """A recipe with the options of calibration that are given. Raises RecipeError."""
    return recipe.replace(
        "calibration",
        source=calibration or None,
        template=template,
        chat_template=chat_template,
        pack=pack,
        samples=samples,
        max_samples=max_samples,
        sequence_length=sequence_length,
        seed=seed,
    )
