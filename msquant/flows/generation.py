"""Text from a model folder: find the folder, choose an engine, load it, generate."""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from msquant.checkpoint.folder_files import require_own_files
from msquant.checkpoint.results import newest_result
from msquant.checkpoint.weight_map import find_weights
from msquant.errors import ModelError
from msquant.flows.engines import AUTO, EngineKind, EngineOptions, check_options, find_engine
from msquant.flows.folder_checks import require_intact
from msquant.hub.models import resolve_model
from msquant.inference.engine_protocol import Completion, Engine, OnText, Sampling, check_prompts
from msquant.inference.launch import Launch
from msquant.recipe.recipe import SUFFIXES, find_recipe

DEFAULT_FOLDER = "DeepSeek-R1-W8A8"
"""What the vLLM-MindSpore guide calls its model folder."""

_QUANTIZE_FIRST = (
    "make one: msquant quantize smollm2-135m --algo osl; download one: msquant download "
    "MindSpore-Lab/DeepSeek-R1-W8A8; or name a folder with --model"
)


@dataclass(frozen=True)
class GenerationResult:
    """What `generate` did.

    Attributes:
        model: the folder.
        engine: the name of the engine that ran it.
        completions: one for each prompt, in their order.
        load_seconds: wall time until the model was ready.
        seconds: wall time of all completions.
    """

    model: Path
    engine: str
    completions: list[Completion]
    load_seconds: float
    seconds: float

    @property
    def tokens(self) -> int:
        """Generated tokens of all completions."""
        return sum(len(completion.token_ids) for completion in self.completions)


class LoadedModel:
    """A model folder in an engine, until it is closed.

    Attributes:
        folder: the model's.
        engine: the name of the engine that runs it.
    """

    def __init__(self, folder: Path, engine: Engine) -> None:
        self.folder = folder
        self.engine = engine.name
        self._loaded = engine

    def __enter__(self) -> "LoadedModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model, and end what was started for it."""
        self._loaded.close()

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_tokens: int = 16,
        temperature: float = 0.0,
        top_p: float = 0.95,
        seed: int = 0,
        stop: Sequence[str] = (),
        chat: bool = False,
        on_text: OnText | None = None,
    ) -> list[Completion]:
        """Continue a prompt, or several; as vLLM's `LLM.generate`, a list comes back for one, too.

        Args:
            prompts: none of them empty.
            max_tokens: at most so many are generated for each.
            temperature: 0 takes the most probable token.
            top_p: samples from the most probable tokens that together reach this probability.
            seed: of the sampling; the same seed gives the same text.
            stop: strings that end the text.
            chat: each prompt is a user's message: the tokenizer's chat template is put around it.
            on_text: called with a prompt's index and each new piece of its text.

        Returns:
            A completion for each prompt, in their order.

        Raises:
            EngineError: a prompt is empty or too long, a value is out of its range, or there is no chat
                template.
        """
        sampling = Sampling(max_tokens, temperature, top_p, seed, stop=tuple(stop))
        given = [prompts] if isinstance(prompts, str) else list(prompts)
        check_prompts(given)
        texts = _rendered(self.folder, given) if chat else given
        return _named(given, self._loaded.generate(texts, sampling, on_text))


def load(
    model: Path | None = None,
    *,
    engine: str = AUTO,
    device: str = "cpu",
    dtype: str = "auto",
    verify: bool | None = None,
    recipe: str | None = None,
) -> LoadedModel:
    """Find a model folder as `find_model` does and load it; see `generate` for the arguments and errors."""
    folder = find_model(model)
    return LoadedModel(folder, load_engine(folder, engine, device, dtype, verify, recipe))


def generate(
    model: Path | None,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    engine: str = AUTO,
    device: str = "cpu",
    dtype: str = "auto",
    verify: bool | None = None,
    recipe: str | None = None,
    chat: bool = False,
    on_ready: Callable[[Path, str], None] | None = None,
    on_text: OnText | None = None,
) -> GenerationResult:
    """Continue prompts with the model in a folder.

    Args:
        model: the folder, or None for the one that `find_model` finds.
        prompts: at least one, none of them empty.
        sampling: how tokens are chosen.
        engine: one of `engine_names()`; `auto` takes vLLM-MindSpore where it and an NPU are there.
        device: where the embedded engine computes, `cpu` or `ascend`.
        dtype: of vLLM's activations, `auto`, `float32`, `bfloat16` or `float16`; for that engine alone.
        verify: compare the sha256 of the folder's shards with its manifest; None where that is quick.
        recipe: whose serving section vLLM-MindSpore takes, in place of the folder's own.
        chat: each prompt is a user's message: the tokenizer's chat template is put around it.
        on_ready: called with the folder and the engine's name when the model is loaded.
        on_text: called with a prompt's index and each new piece of its text.

    Raises:
        ModelError: there is no model, or its folder is not complete, or its tokenizer cannot be loaded.
        CheckpointError: a file of the folder is damaged, or is not what was written.
        EngineError: the engine is unknown or not available here, cannot run this model, or has no memory for
            it; or a prompt is empty or too long; or there is no chat template.
        RecipeError: the serving section is not valid.
    """
    check_prompts(prompts)
    chosen = _choice(engine, EngineOptions(device, dtype, recipe))
    folder = find_model(model)
    texts = _rendered(folder, prompts) if chat else prompts
    start = time.perf_counter()
    loaded = _load(folder, *chosen, verify)
    load_seconds = time.perf_counter() - start
    if on_ready is not None:
        on_ready(folder, loaded.name)
    start = time.perf_counter()
    with closing(loaded):
        completions = loaded.generate(texts, sampling, on_text)
    seconds = time.perf_counter() - start
    return GenerationResult(folder, loaded.name, _named(prompts, completions), load_seconds, seconds)


def _named(prompts: Sequence[str], completions: Sequence[Completion]) -> list[Completion]:
    """The completions with the prompts as they were given, before any chat template."""
    return [replace(one, prompt=prompt) for one, prompt in zip(completions, prompts, strict=True)]


def _rendered(folder: Path, prompts: Sequence[str]) -> list[str]:
    from msquant.checkpoint.tokenizer import load_tokenizer
    from msquant.inference.chat_template import chat_prompt

    tokenizer = load_tokenizer(folder)
    return [chat_prompt(tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]


def find_model(explicit: Path | None = None) -> Path:
    """Return the folder to run: the given one, else the newest result, else `DeepSeek-R1-W8A8` here.

    Raises:
        ModelError: there is none, or the folder is not a complete model.
        CheckpointError: it has no weights.
    """
    if explicit is not None:
        return _complete(explicit.expanduser())
    if (newest := newest_result()) is not None:
        return _complete(newest)
    here = Path(DEFAULT_FOLDER)
    if here.is_dir():
        return _complete(here)
    raise ModelError(
        f"no model has been quantized or downloaded yet, and {DEFAULT_FOLDER} is not in this folder",
        where="--model",
        remedy=_QUANTIZE_FIRST,
    )


def find_named_model(name: str) -> Path:
    """Return the complete folder of a model: what `resolve_model` takes, or a recipe, for its float model.

    Raises:
        MsquantError: there is none, or the recipe is not valid.
    """
    return find_model(resolve_model(find_recipe(name).model if Path(name).suffix in SUFFIXES else name))


def load_engine(
    folder: Path,
    engine: str = AUTO,
    device: str = "cpu",
    dtype: str = "auto",
    verify: bool | None = None,
    recipe: str | None = None,
) -> Engine:
    """Load a model folder into an engine; see `generate` for the arguments and the errors."""
    return _load(folder, *_choice(engine, EngineOptions(device, dtype, recipe)), verify)


def _choice(engine: str, options: EngineOptions) -> tuple[EngineKind, EngineOptions]:
    kind = find_engine(engine)
    check_options(kind, options)
    return kind, options


def _load(folder: Path, kind: EngineKind, options: EngineOptions, verify: bool | None) -> Engine:
    require_intact(folder, verify)
    kind.require_served(folder, options)
    return kind.load(folder, options)


def dry_run(
    model: Path | None, *, engine: str = AUTO, dtype: str = "auto", recipe: str | None = None
) -> Launch | None:
    """What `generate` would start, with the same arguments and errors; it is not started.

    Returns:
        The worker of the engine; None for the embedded engine, which runs in this process.
    """
    kind, options = _choice(engine, EngineOptions(dtype=dtype, recipe=recipe))
    folder = find_model(model)
    kind.require_served(folder, options)
    return kind.launch(folder, options)


def _complete(folder: Path) -> Path:
    """Refuse a folder that is still being written, or of which the essential files are not there."""
    if not folder.is_dir():
        raise ModelError("there is no such model folder", where=folder, remedy=_QUANTIZE_FIRST)
    if folder.resolve().name.endswith(".partial"):
        raise ModelError(
            "is an unfinished result",
            where=folder,
            remedy="run the same `msquant quantize` again to finish it",
        )
    require_own_files(folder)
    if not (folder / "config.json").is_file():
        raise ModelError(
            "is not a complete model folder: config.json is missing",
            where=folder,
            remedy="copy or download the whole folder, or quantize again",
        )
    find_weights(folder)
    return folder
