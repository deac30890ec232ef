"""The options that several commands share, and what they stand for."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from msquant.algorithms import algorithm_names, find_algorithm
from msquant.errors import RecipeError
from msquant.schemes import FLOAT, PRESETS


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


def _complete(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


def complete_models(incomplete: str) -> list[str]:
    """Names of models and recipes for the shell; where none fits, it completes files itself."""
    from msquant.recipe.recipe import shipped_recipes

    return _complete(shipped_recipes(), incomplete)


def complete_algorithms(incomplete: str) -> list[str]:
    """Names of algorithms for the shell."""
    return _complete(algorithm_names(), incomplete)


def complete_schemes(incomplete: str) -> list[str]:
    """Schemes with a word of their own, for the shell."""
    return _complete(PRESETS, incomplete)


def complete_formats(incomplete: str) -> list[str]:
    """Names of formats for the shell, also behind a comma."""
    from msquant.formats.registry import format_names

    before, comma, last = incomplete.rpartition(",")
    given = before.split(",")
    rest = [name for name in format_names() if name not in given]
    return [f"{before}{comma}{name}" for name in _complete(rest, last)]


def complete_devices(incomplete: str) -> list[str]:
    """Names of devices for the shell."""
    from msquant.models.device import DEVICES

    return _complete(DEVICES, incomplete)


def complete_engines(incomplete: str) -> list[str]:
    """What `--engine` takes, for the shell."""
    from msquant.flows.engines import engine_names

    return _complete(engine_names(), incomplete)


def complete_servers(incomplete: str) -> list[str]:
    """Names of servers for the shell."""
    from msquant.formats.servers import SERVER_NAMES

    return _complete(SERVER_NAMES, incomplete)


def complete_stored(incomplete: str) -> list[str]:
    """Names of what `msquant list` shows, for the shell."""
    from msquant.flows.storage import stored_items

    return _complete([item.name for item in stored_items()], incomplete)


def refuse(given: Mapping[str, object], what: str | Mapping[str, str], remedy: str) -> None:
    """Raise RecipeError for the first option that is given.

    Args:
        given: what options have been given, by their names; None, False and an empty list are nothing.
        what: the problem, or that of each option.
        remedy: what to do, with the option as `{}`.
    """
    for option, value in given.items():
        if value is not None and value is not False and value != []:
            problem = what if isinstance(what, str) else what[option]
            raise RecipeError(problem, where=option, remedy=remedy.format(option))


def formats_of(server: str | None, formats: str | None) -> str | None:
    """The formats that `--for` or `--format` names; None if neither does. Raises RecipeError if both do."""
    if server is None:
        return formats
    if formats is not None:
        raise RecipeError(
            f"is {server}, and --format is {formats}",
            where="--for",
            remedy="give one of them: each server reads one format",
        )
    from msquant.flows.frontier import format_for

    return format_for(server)


def complete_folders(incomplete: str) -> list[str]:
    """Folders of models and results that msquant made, for the shell; from here if they are below."""
    from msquant.flows.storage import stored_items

    here = Path.cwd()
    folders = [item.folder for item in stored_items() if item.kind in ("model", "result")]
    shown = [folder.relative_to(here) if here in folder.parents else folder for folder in folders]
    return _complete(map(str, shown), incomplete)


Model = Annotated[
    str,
    typer.Argument(
        help="A recipe's name or file (.yaml), or a model's folder (Hugging Face).",
        autocompletion=complete_models,
    ),
]
Source = Annotated[str | None, typer.Option(help="Folder of the weights, in place of the recipe's model.")]
Algo = Annotated[
    str | None,
    typer.Option(
        help=f"Algorithm: {', '.join(algorithm_names())}.",
        callback=_known_algorithm,
        autocompletion=complete_algorithms,
    ),
]
SchemeWord = Annotated[
    str | None,
    typer.Option(
        "--scheme",
        help="How linears are computed that the recipe does not keep in floating point: "
        f"{', '.join(word for word in PRESETS if word != str(FLOAT))}, or as in W4A16_G64_ASYM.",
        autocompletion=complete_schemes,
        show_default=False,
    ),
]
GroupSize = Annotated[
    int | None,
    typer.Option(help="Columns that share a scale of the weights, in that scheme.", show_default=False),
]
Rotation = Annotated[
    str | None,
    typer.Option(
        help="none or hadamard: outliers spread over all channels, folded into the weights; for int4 weights "
        "with one scale a channel.",
        show_default="as the recipe says",
    ),
]
Cache = Annotated[
    str | None,
    typer.Option(
        help="none or int8: how the server keeps keys and values, or the latent state that both are made of; "
        "int8 is for the ascend format.",
        show_default="as the recipe says",
    ),
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
        "--format",
        help="golden-stick, compressed-tensors, ascend, or several with commas between them.",
        autocompletion=complete_formats,
    ),
]
ServerFor = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="SERVER",
        help="vllm-mindspore, vllm-ascend or vllm: the format that it reads, in place of --format.",
        autocompletion=complete_servers,
        show_default=False,
    ),
]
SchemeWords = Annotated[
    str | None,
    typer.Option(
        "--schemes",
        help="Schemes to choose from beside floating point, with commas between them: W8A8_DYNAMIC,W4A16.  "
        "[default: the most accurate of 8 and of 4 bits that the server takes]",
        show_default=False,
    ),
]
Device = Annotated[
    str, typer.Option(help="cpu or ascend.", callback=_known_device, autocompletion=complete_devices)
]
EngineDevice = Annotated[
    str,
    typer.Option(
        help="Where the embedded engine computes: cpu or ascend.",
        callback=_known_device,
        autocompletion=complete_devices,
    ),
]
EngineName = Annotated[
    str,
    typer.Option(
        help="auto, embedded, vllm or vllm-mindspore; auto takes vllm-mindspore where it and an NPU are "
        "there, else embedded.",
        autocompletion=complete_engines,
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show golden-stick's own log.")]
MemoryBudget = Annotated[
    str, typer.Option(help="Hidden states beyond this are kept on disk, for example 4GB.")
]

WorkerCount = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Processes that share the work on decoder layers, or on shards without calibration; the bytes "
        "are the same.  [default: 1; with --ray-address as many as the nodes have work for]",
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Ray cluster to join. Keep its ports on a private network: who reaches them can run programs.",
    ),
]
DifferentArithmetic = Annotated[
    bool,
    typer.Option("--allow-different-arithmetic", help="Use nodes that round differently: results then vary."),
]

MEMORY_BUDGET = "1GB"
