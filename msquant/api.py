"""What `import msquant` offers: each command's work as a function, with the command's defaults.

Nothing is printed; what a person would be shown goes to the callbacks of `Progress` and `HubProgress`.
MindSpore and the other heavy packages are loaded when a function needs them. Every function raises
`MsquantError`, with what is wrong, where, and what to do.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msquant.checkpoint.memory import MEMORY_BUDGET
from msquant.errors import MsquantError
from msquant.hub.transfer_events import HubProgress
from msquant.progress import Progress
from msquant.schemes import Scheme, parse_scheme

if TYPE_CHECKING:
    from msquant.flows.analysis import Analysis
    from msquant.flows.comparison import Comparison
    from msquant.flows.conversion import ExportProgress, ExportResult
    from msquant.flows.frontier import Frontier
    from msquant.flows.generation import LoadedModel
    from msquant.flows.pipeline import QuantizeResult
    from msquant.flows.promise import PromiseResult
    from msquant.formats.summary import Summary
    from msquant.hub.folder_download import DownloadResult
    from msquant.planning.model_free_plan import ModelFreePlan
    from msquant.planning.quantization_plan import Plan
    from msquant.recipe.recipe import Recipe as Recipe

__all__ = [
    "HubProgress",
    "MsquantError",
    "Progress",
    "Recipe",
    "Scheme",
    "analyze",
    "compare",
    "download",
    "evaluate",
    "export",
    "find_recipe",
    "frontier",
    "inspect",
    "load",
    "parse_scheme",
    "plan",
    "promise",
    "quantize",
]


def __getattr__(name: str) -> Any:
    """`Recipe`, which brings pydantic and the formats, when it is asked for."""
    if name == "Recipe":
        from msquant.recipe.recipe import Recipe

        return Recipe
    raise AttributeError(f"module 'msquant.api' has no attribute {name!r}")


def find_recipe(model: "str | Path | Recipe", formats: str | Sequence[str] | None = None) -> "Recipe":
    """The recipe of a model.

    Args:
        model: a recipe's name (`deepseek-r1`) or file (`.yaml`), the hub id of a model that has one, or a
            model's folder, for which a default recipe is made; or a recipe, which is returned.
        formats: in place of its formats. A recipe that comes with msquant, or that is made for a folder, is
            then for them: all activations per token where the servers of all of them run that.

    Raises:
        RecipeError: there is none of that name, or it is not valid.

    Examples:
        >>> import msquant
        >>> recipe = msquant.find_recipe("deepseek-r1", formats="ascend").adjusted(samples=32)
        >>> recipe.calibration.samples
        32
    """
    from msquant.recipe.recipe import Recipe
    from msquant.recipe.recipe import find_recipe as find

    return model.adjusted(formats=formats) if isinstance(model, Recipe) else find(str(model), formats)


def quantize(
    model: "str | Path | Recipe",
    output: str | Path | None = None,
    *,
    algo: str | None = None,
    scheme: str | Scheme | None = None,
    group_size: int | None = None,
    rotation: str | None = None,
    cache: str | None = None,
    calibration: str | Sequence[str] | None = None,
    samples: int | None = None,
    sequence_length: int | None = None,
    formats: str | Sequence[str] | None = None,
    evaluate: bool = True,
    source: str | Path | None = None,
    device: str = "cpu",
    memory_budget: int = MEMORY_BUDGET,
    overwrite: bool = False,
    restart: bool = False,
    offline: bool = False,
    verbose: bool = False,
    workers: int | None = None,
    ray_address: str | None = None,
    allow_different_arithmetic: bool = False,
    progress: Progress | None = None,
    transfer: Callable[[], AbstractContextManager[HubProgress]] | None = None,
) -> "QuantizeResult":
    """Quantize a model into a new folder, as `msquant quantize` does.

    One decoder layer is in memory at a time. What an interrupted call has finished is kept, and the same call
    continues with it and ends with the same bytes.

    Args:
        model: as `find_recipe` takes it.
        output: the folder to make; it appears when it is complete. MODEL-ALGO in the current folder if None.
        algo: in place of the recipe's algorithm.
        scheme: of all linears but those that the recipe keeps in floating point: `W4A16`, `W8A8_DYNAMIC`.
        group_size: columns that share a scale of the weights, in that scheme.
        rotation: none or hadamard.
        cache: none or int8, how keys and values are kept.
        calibration: in place of its sources: `builtin`, a file, `hf:ORG/NAME`, `gsm8k=25%`, or several.
        samples: calibration sequences.
        sequence_length: tokens in each.
        formats: in place of its formats: `golden-stick`, `compressed-tensors`, `ascend`. The first is written
            to `output`, each other one to `<output>-<format>`.
        evaluate: compare the result with the float model on a little held-out text.
        source: folder of the weights, in place of the recipe's model.
        device: `cpu` or `ascend`.
        memory_budget: bytes of hidden states held in memory.
        overwrite: replace an earlier result.
        restart: forget what an interrupted call has finished.
        offline: ask no hub; `HF_HUB_OFFLINE=1` does the same.
        verbose: show golden-stick's own log.
        workers: processes that share the work on decoder layers, or on shards without calibration; None is
            this one alone, or with `ray_address` as many as the nodes have work for.
        ray_address: `HOST:PORT` of a Ray cluster to join.
        allow_different_arithmetic: use nodes that round differently, so that bytes vary.
        progress: callbacks.
        transfer: makes a context, entered while weights are fetched from a hub, of callbacks for that.

    Raises:
        MsquantError: the input is bad, or the output cannot be written. Nothing that looks finished is left.

    Examples:
        >>> import msquant
        >>> result = msquant.quantize("smollm2-135m", "smollm2-w8a8", algo="osl")  # doctest: +SKIP
        >>> result.evaluation["overall"]["kl"]  # doctest: +SKIP
        0.0435
    """
    from msquant.checkpoint.cache import cache_folder
    from msquant.flows.pipeline import quantize as run
    from msquant.flows.workers import Workers, require_workers
    from msquant.hub.choose import is_offline
    from msquant.recipe.recipe import default_folder

    recipe = find_recipe(model, formats).adjusted(
        algo=algo,
        scheme=scheme,
        group_size=group_size,
        rotation=rotation,
        cache=cache,
        calibration=calibration,
        samples=samples,
        sequence_length=sequence_length,
        formats=formats,
        evaluate=evaluate,
    )
    if output is None:
        output = default_folder(recipe.model if model is recipe else str(model), recipe)
    target, weights = Path(output), None if source is None else str(source)

    def fetch(hub_id: str) -> Path:
        from msquant.planning.model_free_plan import make_model_free_plan
        from msquant.planning.quantization_plan import make_plan, require_room

        planner = make_model_free_plan if recipe.calibration.is_none else make_plan
        require_room(recipe, target, weights, cache_folder(), planner)
        return _fetched(hub_id, transfer)

    alone = offline or is_offline()
    require_workers(workers, ray_address, device)
    team = Workers(workers, ray_address, allow_different_arithmetic=allow_different_arithmetic)
    if recipe.calibration.is_none:
        from msquant.flows.model_free import quantize_model_free

        return quantize_model_free(
            recipe,
            target,
            source=weights,
            overwrite=overwrite,
            restart=restart,
            device=device,
            memory_budget=memory_budget,
            fetch=None if alone else fetch,
            progress=progress,
            workers=team,
        )
    if not team.in_process:
        from msquant.planning.quantization_plan import worker_memory

        team = replace(team, memory=worker_memory(recipe, target, weights, memory_budget))
    return run(
        recipe,
        target,
        source=weights,
        overwrite=overwrite,
        restart=restart,
        device=device,
        memory_budget=memory_budget,
        verbose=verbose,
        fetch=None if alone else fetch,
        offline=alone,
        progress=progress,
        workers=team,
    )


def promise(
    model: "str | Path | Recipe",
    output: str | Path | None = None,
    *,
    max_kl: float | None = None,
    max_size: int | None = None,
    max_perplexity_increase: float | None = None,
    server: str | None = None,
    schemes: Sequence[str | Scheme] = (),
    verdict_texts: Sequence[str] = (),
    source: str | Path | None = None,
    overwrite: bool = False,
    restart: bool = False,
    device: str = "cpu",
    memory_budget: int = MEMORY_BUDGET,
    verbose: bool = False,
    offline: bool = False,
    progress: Progress | None = None,
    transfer: Callable[[], AbstractContextManager[HubProgress]] | None = None,
) -> "PromiseResult":
    """Quantize a model into the smallest folder that keeps a promise, as `msquant quantize --max-kl` does.

    The schemes of all linears are chosen. What an interrupted call has finished is kept beside the output,
    and the same call continues with it.

    Args:
        model: as `find_recipe` takes it; a recipe's calibration, algorithm and format stay.
        output: the folder to make; it appears when the promise is kept. MODEL-ALGO in the current folder if
            None.
        max_kl: KL from the float model in nats, on the verdict text on which it is greatest.
        max_size: bytes of the folder's safetensors files.
        max_perplexity_increase: over the float model's, as a part of it (0.02 is 2 %), on the verdict text on
            which it is greatest. One of the three at least.
        server: `vllm-mindspore`, `vllm-ascend` or `vllm`, whose format takes the place of the recipe's.
        schemes: to choose from beside floating point; if empty the most accurate of 8 and of 4 bits that the
            server takes.
        verdict_texts: files or folders in place of the builtin verdict texts.
        source: folder of the weights, in place of the recipe's model.
        overwrite: replace an earlier result.
        restart: forget what an interrupted call has finished.
        device: `cpu` or `ascend`.
        memory_budget: bytes of hidden states held in memory.
        verbose: show golden-stick's own log.
        offline: ask no hub.
        progress: callbacks.
        transfer: as for `quantize`.

    Returns:
        What was measured, also where the promise cannot be kept: then `kept` is false, `reason` says why, and
        there is no output.

    Raises:
        MsquantError: the input is bad, or the output cannot be written.

    Examples:
        >>> import msquant
        >>> msquant.promise("smollm2-135m", "small", max_kl=0.02, server="vllm").kept  # doctest: +SKIP
        True
    """
    from msquant.flows.frontier import format_for
    from msquant.flows.promise import Bounds, keep_promise
    from msquant.hub.choose import is_offline
    from msquant.recipe.recipe import default_folder

    recipe = find_recipe(model, None if server is None else format_for(server))
    if output is None:
        output = default_folder(recipe.model if model is recipe else str(model), recipe)

    alone = offline or is_offline()
    return keep_promise(
        recipe,
        Path(output),
        Bounds(max_kl, max_size, max_perplexity_increase),
        schemes=_parsed(schemes),
        verdict_texts=verdict_texts,
        source=None if source is None else str(source),
        overwrite=overwrite,
        restart=restart,
        device=device,
        memory_budget=memory_budget,
        verbose=verbose,
        fetch=None if alone else lambda hub_id: _fetched(hub_id, transfer),
        offline=alone,
        progress=progress,
    )


def _parsed(schemes: Sequence[str | Scheme]) -> list[Scheme]:
    return [parse_scheme(each) if isinstance(each, str) else each for each in schemes]


def _fetched(hub_id: str, transfer: Callable[[], AbstractContextManager[HubProgress]] | None) -> Path:
    """The folder of a model that is downloaded now, with the callbacks of `quantize`'s `transfer`."""
    from msquant.hub.fetch import fetch_model

    with nullcontext(HubProgress()) if transfer is None else transfer() as callbacks:
        return fetch_model(hub_id, callbacks)


def plan(
    model: "str | Path | Recipe",
    output: str | Path | None = None,
    *,
    scheme: str | Scheme | None = None,
    group_size: int | None = None,
    rotation: str | None = None,
    cache: str | None = None,
    source: str | Path | None = None,
    memory_budget: int = MEMORY_BUDGET,
    workers: int | None = None,
    node_cores: int | None = None,
) -> "Plan | ModelFreePlan":
    """What quantizing a model would make, read, write and need, from its headers alone.

    Args:
        model: as `find_recipe` takes it; a published model needs no weights here.
        output: the folder that would be made; MODEL-ALGO in the current folder if None.
        scheme: as for `quantize`.
        group_size: likewise.
        rotation: likewise.
        cache: likewise.
        source: folder of the weights, in place of the recipe's model.
        memory_budget: bytes of hidden states held in memory.
        workers: processes that would share the decoder layers; memory is that of each.
        node_cores: cores of a machine that each of them would have for itself; None for this machine.

    Returns:
        Bytes by decoder layer and in all, memory, and as `problems` what does not fit. No time is estimated:
        `msquant plan` measures this machine for that. Of a recipe whose calibration has source `none`, all
        tensors by name, shape and what becomes of them.

    Raises:
        MsquantError: the model is unknown, incomplete or not supported.

    Examples:
        >>> import msquant
        >>> made = msquant.plan("deepseek-r1")
        >>> f"{made.source_bytes / 1e9:.0f} GB become {made.output_bytes / 1e9:.0f} GB"
        '689 GB become 702 GB'
    """
    from msquant.planning.quantization_plan import make_plan
    from msquant.recipe.recipe import Recipe, default_folder

    recipe = find_recipe(model).adjusted(scheme=scheme, group_size=group_size, rotation=rotation, cache=cache)
    target = default_folder(recipe.model if isinstance(model, Recipe) else str(model), recipe)
    if recipe.calibration.is_none:
        from msquant.planning.model_free_plan import make_model_free_plan

        return make_model_free_plan(
            recipe,
            target if output is None else Path(output),
            source=None if source is None else str(source),
            workers=workers or 1,
        )
    return make_plan(
        recipe,
        target if output is None else Path(output),
        source=None if source is None else str(source),
        memory_budget=memory_budget,
        workers=workers or 1,
        node_cores=node_cores,
    )


def analyze(
    model: "str | Path | Recipe",
    *,
    scheme: str | Scheme | None = None,
    group_size: int | None = None,
    rotation: str | None = None,
    keep_float: int | None = None,
    keep_dynamic: int | None = None,
    max_error: float | None = None,
    max_size: int | None = None,
    source: str | Path | None = None,
    device: str = "cpu",
    memory_budget: int = MEMORY_BUDGET,
    verbose: bool = False,
    workers: int | None = None,
    ray_address: str | None = None,
    allow_different_arithmetic: bool = False,
    progress: Progress | None = None,
) -> "Analysis":
    """Rank the linears of a model by the error that quantizing only them causes, and spare the worst.

    Args:
        model: as `find_recipe` takes it.
        scheme: as for `quantize`.
        group_size: likewise.
        rotation: likewise.
        keep_float: keep at most so many matrices in floating point.
        keep_dynamic: give at most so many a scale per token.
        max_error: keep as few in floating point as bring the summed error down to this.
        max_size: keep as many as all tensors fit so many bytes. One of the four at most.
        source: folder of the weights, in place of the recipe's model.
        device: `cpu` or `ascend`.
        memory_budget: bytes of hidden states held in memory.
        verbose: show golden-stick's own log.
        workers: as for `quantize`; the numbers are the same.
        ray_address: likewise.
        allow_different_arithmetic: likewise.
        progress: callbacks.

    Returns:
        The ranking, and as `recipe` one that spares the worst, which `quantize` takes.

    Raises:
        MsquantError: the input is bad, or the budget cannot be kept.

    Examples:
        >>> import msquant
        >>> mixed = msquant.analyze("smollm2-135m", keep_float=6).recipe  # doctest: +SKIP
        >>> msquant.quantize(mixed, "smollm2-mixed")  # doctest: +SKIP
    """
    from msquant.flows.analysis import analyze as run
    from msquant.flows.workers import Workers, require_workers
    from msquant.hub.choose import is_offline
    from msquant.quantization.selection import budget_of

    require_workers(workers, ray_address, device)
    return run(
        find_recipe(model).adjusted(scheme=scheme, group_size=group_size, rotation=rotation),
        budget=budget_of(keep_float, keep_dynamic, max_error, max_size),
        source=None if source is None else str(source),
        device=device,
        memory_budget=memory_budget,
        verbose=verbose,
        offline=is_offline(),
        workers=Workers(workers, ray_address, allow_different_arithmetic=allow_different_arithmetic),
        progress=progress,
    )


def frontier(
    model: "str | Path | Recipe",
    *,
    server: str | None = None,
    point: float | None = None,
    points: int = 12,
    schemes: Sequence[str | Scheme] = (),
    source: str | Path | None = None,
    device: str = "cpu",
    memory_budget: int = MEMORY_BUDGET,
    verbose: bool = False,
    progress: Progress | None = None,
) -> "Frontier":
    """Size against predicted KL of the best assignments of schemes, from the smallest to the float model.

    Args:
        model: as `find_recipe` takes it.
        server: as for `promise`.
        point: a predicted KL in nats; `chosen` of the result is the smallest assignment within it.
        points: how many assignments.
        schemes: as for `promise`.
        source: folder of the weights, in place of the recipe's model.
        device: `cpu` or `ascend`.
        memory_budget: bytes of hidden states held in memory.
        verbose: show golden-stick's own log.
        progress: callbacks.

    Returns:
        The points, each with its recipe, which `quantize` takes.

    Raises:
        MsquantError: the input is bad.

    Examples:
        >>> import msquant
        >>> found = msquant.frontier("smollm2-135m", server="vllm", point=0.02)  # doctest: +SKIP
        >>> msquant.quantize(found.chosen.recipe, "smollm2-small")  # doctest: +SKIP
    """
    from msquant.flows.frontier import find_frontier, format_for
    from msquant.hub.choose import is_offline

    return find_frontier(
        find_recipe(model, None if server is None else format_for(server)),
        point=point,
        points=points,
        schemes=_parsed(schemes),
        source=None if source is None else str(source),
        device=device,
        memory_budget=memory_budget,
        verbose=verbose,
        offline=is_offline(),
        progress=progress,
    )


def evaluate(
    model: str | Path,
    baseline: str | Path | None = None,
    *,
    texts: Sequence[str] = (),
    builtin: bool = True,
    template: str | None = None,
    sequences: int = 4,
    sequence_length: int | None = None,
    device: str = "cpu",
    memory_budget: int = MEMORY_BUDGET,
    workers: int | None = None,
    ray_address: str | None = None,
    allow_different_arithmetic: bool = False,
    progress: Progress | None = None,
) -> "Comparison":
    """What quantization cost one model: perplexity, and how far its predictions are from the float model's.

    Args:
        model: a folder, quantized or not, or the name of a float model.
        baseline: the float model; if None the one that the folder's `msquant.json` says it was made from.
            Without any, perplexity alone is measured, and the result's `notes` say so.
        texts: the user's own: files, folders, `hf:ORG/NAME`.
        builtin: evaluate on the builtin texts, six domains, too.
        template: how a row of `texts` becomes text, with columns in braces.
        sequences: windows of each text.
        sequence_length: tokens in each; if None 512, or as many as the model takes.
        device: `cpu` or `ascend`.
        memory_budget: bytes of hidden states held in memory.
        workers: processes that share the models and the texts; None is this one alone, or with `ray_address`
            one a node. The numbers are the same.
        ray_address: `HOST:PORT` of a Ray cluster to join.
        allow_different_arithmetic: use nodes that round differently.
        progress: callbacks.

    Returns:
        A comparison of one model; its `score` is that model's.

    Raises:
        MsquantError: a model or a text is missing or damaged, or they do not belong together.

    Examples:
        >>> import msquant
        >>> msquant.evaluate("smollm2-w8a8").score.overall.kl  # doctest: +SKIP
        0.0435
    """
    return compare(
        [model],
        baseline,
        texts=texts,
        builtin=builtin,
        template=template,
        sequences=sequences,
        sequence_length=sequence_length,
        device=device,
        memory_budget=memory_budget,
        workers=workers,
        ray_address=ray_address,
        allow_different_arithmetic=allow_different_arithmetic,
        progress=progress,
    )


def compare(
    models: Sequence[str | Path],
    baseline: str | Path | None = None,
    *,
    texts: Sequence[str] = (),
    builtin: bool = True,
    template: str | None = None,
    sequences: int = 4,
    sequence_length: int | None = None,
    device: str = "cpu",
    memory_budget: int = MEMORY_BUDGET,
    workers: int | None = None,
    ray_address: str | None = None,
    allow_different_arithmetic: bool = False,
    progress: Progress | None = None,
) -> "Comparison":
    """Quantized folders of one float model side by side, whoever made them; the arguments are `evaluate`'s.

    Raises:
        MsquantError: as `evaluate`; or there are several models and no float model.

    Examples:
        >>> import msquant
        >>> result = msquant.compare(["ours", "theirs"], "Llama-3.1-8B")  # doctest: +SKIP
        >>> [model.score.overall.kl for model in result.models]  # doctest: +SKIP
        [0.0435, 0.0691]
    """
    from msquant.flows.comparison import compare as run
    from msquant.flows.workers import Workers, require_workers

    require_workers(workers, ray_address, device)
    return run(
        [str(model) for model in models],
        baseline=None if baseline is None else str(baseline),
        texts=texts,
        builtin=builtin,
        template=template,
        sequences=sequences,
        sequence_length=sequence_length,
        device=device,
        memory_budget=memory_budget,
        workers=Workers(workers, ray_address, allow_different_arithmetic=allow_different_arithmetic),
        progress=progress,
    )


def inspect(folder: str | Path, *, verify: bool = False) -> "Summary":
    """What a checkpoint holds, what of it breaks its format's rules, and which servers can serve it.

    Args:
        folder: quantized, by whatever tool, or not.
        verify: compare every file's sha256 with `msquant.json`, too.

    Raises:
        CheckpointError: there is no checkpoint there; what is wrong with one is in `findings`.

    Examples:
        >>> import msquant
        >>> [str(one.server) for one in msquant.inspect("w8a8").served if one.served]  # doctest: +SKIP
        ['vllm-mindspore 0.5.0']
    """
    from msquant.formats.summary import summarize

    return summarize(folder, verify_hashes=verify)


def export(
    folder: str | Path,
    formats: str | Sequence[str],
    output: str | Path | None = None,
    *,
    cache: str | None = None,
    overwrite: bool = False,
    progress: "ExportProgress | None" = None,
) -> "list[ExportResult]":
    """Write a quantized folder in other formats, without quantizing again.

    Args:
        folder: quantized, in any format that msquant reads.
        formats: what to write; a name, names with commas between them, or several.
        output: the folder to make, with several formats that of the first; `<folder>-<format>` if None.
        cache: none to leave out the scales of an int8 key-value cache, which most formats refuse.
        overwrite: replace earlier results.
        progress: callbacks.

    Raises:
        MsquantError: a format cannot express the folder, or the folder was changed since it was written.

    Examples:
        >>> import msquant
        >>> msquant.export("smollm2-w8a8", "ascend")[0].folder  # doctest: +SKIP
        PosixPath('smollm2-w8a8-ascend')
    """
    from msquant.flows.conversion import export as run
    from msquant.formats.registry import names_of, parse_formats

    names = names_of(parse_formats(formats if isinstance(formats, str) else ",".join(formats)))
    target = None if output is None else Path(output)
    return run(Path(folder), names, output=target, cache=cache, overwrite=overwrite, progress=progress)


def download(
    repository: str,
    output: str | Path | None = None,
    *,
    hub: str = "auto",
    dataset: bool = False,
    revision: str = "main",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    workers: int = 8,
    verify: bool = False,
    token_file: str | Path | None = None,
    progress: HubProgress | None = None,
) -> "DownloadResult":
    """Download a model or a dataset from Modelers or the Hugging Face Hub, and verify every file.

    Args:
        repository: `organisation/name`.
        output: folder to download into; the repository's name in the current folder if None.
        hub: `modelers`, `huggingface`, or `auto`: where the organisation lives, then the other.
        dataset: whether it holds a dataset.
        revision: a branch, a tag or a commit.
        include: only files like one of these patterns.
        exclude: no files like one of these.
        workers: connections at once.
        verify: hash also what an earlier call has verified.
        token_file: holds the token of the hub, which `hub` names then.
        progress: callbacks.

    Raises:
        HubError: the hub refuses or does not answer, or has no such repository or file.
        OutputError: there is not enough disk, or the folder holds something else.

    Examples:
        >>> import msquant
        >>> msquant.download("MindSpore-Lab/DeepSeek-R1-W8A8").folder  # doctest: +SKIP
        PosixPath('DeepSeek-R1-W8A8')
    """
    from msquant.checkpoint.disk import shown_sizes
    from msquant.hub.choose import select_snapshot
    from msquant.hub.folder_download import download as run

    progress = progress or HubProgress()
    snapshot, files = select_snapshot(
        repository,
        revision,
        hub,
        include,
        exclude,
        token_file=None if token_file is None else Path(token_file),
        kind="dataset" if dataset else "model",
        note=progress.stage,
    )
    (size,) = shown_sizes(sum(file.size for file in files))
    progress.stage(f"{len(files)} files, {size}, of commit {snapshot.commit[:10]} on {snapshot.hub.title}")
    target = Path(repository.split("/")[1] if output is None else output)
    return run(snapshot, files, target, workers=workers, verify=verify, progress=progress)


def load(
    folder: str | Path | None = None,
    *,
    engine: str = "auto",
    device: str = "cpu",
    dtype: str = "auto",
    verify: bool | None = None,
    recipe: str | None = None,
) -> "LoadedModel":
    """Load a model folder into an engine; close what is returned, or use it in a `with` statement.

    Args:
        folder: quantized or not; if None the newest result of `quantize`.
        engine: `auto`, `embedded`, `vllm` or `vllm-mindspore`.
        device: where the embedded engine computes, `cpu` or `ascend`.
        dtype: of vLLM's activations; for that engine alone.
        verify: compare the sha256 of the shards with `msquant.json`; None where that is quick.
        recipe: whose serving section vLLM-MindSpore takes.

    Raises:
        MsquantError: there is no model, it is damaged, or the engine cannot run it.

    Examples:
        >>> import msquant
        >>> with msquant.load("smollm2-w8a8") as model:  # doctest: +SKIP
        ...     print(model.generate("I am", max_tokens=8)[0].text)
        a student and I am writing a paper
    """
    from msquant.flows.generation import load as run

    return run(
        None if folder is None else Path(folder),
        engine=engine,
        device=device,
        dtype=dtype,
        verify=verify,
        recipe=recipe,
    )
