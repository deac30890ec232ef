"""The flow of `msquant evaluate` and `msquant compare`: models beside their float model, on the same texts.

The float model and the others go layer by layer in lockstep, see `evaluation/lockstep.py`; nothing is written
but hidden states, into a temporary folder.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from msquant.calibration.domains import Domain
from msquant.calibration.evaluation import evaluation_domains
from msquant.calibration.rows import Template
from msquant.calibration.sources import Reading, load_texts
from msquant.calibration.tokens import spread_windows
from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.disk import shard_file_bytes
from msquant.checkpoint.hidden_states import HiddenStateStore
from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.memory import MEMORY_BUDGET, peak_memory
from msquant.checkpoint.results import MANIFEST_NAME
from msquant.checkpoint.tokenizer import has_tokenizer, load_tokenizer
from msquant.errors import CalibrationError, ModelError, MsquantError
from msquant.evaluation.domain_scores import LayerScore, ModelScore
from msquant.evaluation.inputs import Model, Text, require_alike
from msquant.flows.engines import open_prefill, open_weights
from msquant.flows.evaluation_work import EvaluationJob, evaluate_shared
from msquant.flows.generation import find_named_model
from msquant.flows.workers import Workers, scratch_folder
from msquant.formats.registry import folder_format
from msquant.hub.choose import is_offline
from msquant.hub.models import resolve_model
from msquant.interrupts import deferred_interrupts
from msquant.models.config_json import read_config
from msquant.models.device import require_device, use_device
from msquant.progress import Progress

if TYPE_CHECKING:
    from msquant.models.rotation import Rotation

SEQUENCES, SEQUENCE_LENGTH = 4, 512

DECODE, PREFILL = "decode", "prefill"
"""What engines do apart that serve W8A8_MIX: one reads prompts, another one writes answers."""

# Of each text, from its beginning: more is not looked at.
MAX_CHARACTERS = 1_000_000

# On the average of a text, by any tokenizer.
MOST_CHARACTERS_A_TOKEN = 32


@dataclass(frozen=True)
class ComparedModel:
    """A model and its scores.

    Attributes:
        folder: the model's.
        nbytes: of its safetensors files.
        score: what was measured.
        phase: `decode` or `prefill` of a folder that servers compute in two ways, else empty.
    """

    folder: Path
    nbytes: int
    score: ModelScore
    phase: str = ""


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured.

    Attributes:
        baseline: the float model; None if there is none, and perplexity alone was measured.
        models: the others, in the order in which they were given; one that is computed in two ways (W8A8_MIX)
            twice, as answers are written and then as prompts are read.
        texts: shape `[sequences, tokens]` of each text by its name.
        notes: what the reader should know about the baseline and the tokenizers.
        seconds: wall time.
        peak_memory: greatest resident set of this process so far, in bytes.
    """

    baseline: ComparedModel | None
    models: list[ComparedModel]
    texts: dict[str, tuple[int, int]]
    notes: list[str]
    seconds: float
    peak_memory: int

    @property
    def score(self) -> ModelScore:
        """That of the first model, which is the only one of an evaluation."""
        return self.models[0].score


def compare(
    models: Sequence[str],
    *,
    baseline: str | None = None,
    texts: Sequence[str] = (),
    builtin: bool = True,
    template: str | None = None,
    sequences: int = SEQUENCES,
    sequence_length: int | None = None,
    device: str = "cpu",
    memory_budget: int = MEMORY_BUDGET,
    progress: Progress | None = None,
    workers: Workers | None = None,
) -> Comparison:
    """Score models on texts, against their float model if there is one.

    Args:
        models: at least one: folders, quantized or not; recipes or names of float models, as `resolve_model`
            takes them.
        baseline: the float model, as `resolve_model` takes it, or a recipe's name. If None, the one that the
            first of the models was made from by its `msquant.json`, if it is on this machine.
        texts: sources of the user's own, as `parse_source` takes them.
        builtin: evaluate on the builtin texts too.
        template: how a row of theirs becomes text, with columns in braces.
        sequences: windows of each text, evenly spread; fewer of a text that is too short.
        sequence_length: tokens in each; if None 512, or as many as the model takes.
        device: `cpu` or `ascend`.
        memory_budget: bytes of hidden states held in memory.
        progress: callbacks; a layer's record holds its `index` and, as `layers`, a `LayerScore` a model.
        workers: who does the work; this process alone if None. The numbers are the same.

    Raises:
        MsquantError: a model is missing, incomplete, damaged or of another architecture or tokenizer than the
            float model; a text is missing or too short; a model computes NaN; several models are to be
            compared and there is no float model.
    """
    started = time.monotonic()
    progress = progress or Progress()
    require_device(device)
    folders = [find_named_model(model) for model in models]
    notes: list[str] = []
    float_folder = find_named_model(baseline) if baseline is not None else _made_from(folders, notes)
    if float_folder is None and folders[1:]:
        raise ModelError(
            f"there is no float model to compare with: {notes[-1]}", remedy="name it with --baseline"
        )
    all_folders = [*([float_folder] if float_folder else []), *folders]
    progress.stage("reading texts")
    config = read_config(all_folders[0])
    length = sequence_length or min(SEQUENCE_LENGTH, config.longest)
    domains = _domains(texts, builtin, template, progress)
    tokens = _tokens(all_folders, domains, sequences, length, notes)
    progress.stage("loading MindSpore")
    with deferred_interrupts():
        phases = [(folder, phase) for folder in all_folders for phase in _phases(folder)]
        prefill = [phase == PREFILL for _, phase in phases]
        named = [folder for folder, _ in phases]
        scores = score_folders(named, tokens, device, memory_budget, progress, prefill, workers)
    compared = [
        ComparedModel(folder, shard_file_bytes(folder), score, phase)
        for (folder, phase), score in zip(phases, scores, strict=True)
    ]
    return Comparison(
        baseline=compared[0] if float_folder else None,
        models=compared[1:] if float_folder else compared,
        texts={text.name: (text.tokens.shape[0], text.tokens.shape[1]) for text in tokens},
        notes=notes,
        seconds=time.monotonic() - started,
        peak_memory=peak_memory(),
    )


def score_folders(
    folders: Sequence[Path],
    texts: Sequence[Text],
    device: str,
    memory_budget: int = MEMORY_BUDGET,
    progress: Progress | None = None,
    prefill: Sequence[bool] = (),
    workers: Workers | None = None,
) -> list[ModelScore]:
    """Score model folders; the first is the baseline of the others. Raises as `lockstep.evaluate`.

    Args:
        folders: the models'.
        texts: what they are scored on.
        device: `cpu` or `ascend`.
        memory_budget: bytes of hidden states held in memory.
        progress: callbacks.
        prefill: for each, whether it is scored as prompts are read with it; none of them if empty.
        workers: who does the work; this process alone if None. The numbers are the same.
    """
    from msquant.evaluation.lockstep import evaluate

    progress, workers = progress or Progress(), workers or Workers()
    asked = tuple(prefill or [False] * len(folders))
    models = [opened_model(folder, each) for folder, each in zip(folders, asked, strict=True)]
    progress.layers(models[0].config.num_hidden_layers, 0)

    def on_layer(index: int, layers: list[LayerScore]) -> None:
        progress.layer({"index": index, "layers": layers})

    with scratch_folder(workers, folders[-1]) as scratch:
        if workers.in_process:
            store = HiddenStateStore(scratch, memory_budget)
            return evaluate(models, texts, use_device(device), store, on_layer, progress.stage)
        from msquant.flows.worker_pool import WorkerPool

        require_alike(models, texts)
        with WorkerPool(workers, progress) as pool:
            named = tuple(map(Path.absolute, folders))
            job = EvaluationJob(named, asked, tuple(texts), device, memory_budget, pool.count)
            pool.prepare(job, named[0], Checkpoint.open(named[0]).fingerprint()["sha256"], scratch)
            store = HiddenStateStore(scratch, memory_budget, shared=True)
            return evaluate_shared(job, pool, store, on_layer)


def opened_model(folder: Path, prefill: bool) -> Model:
    """A model to evaluate.

    Args:
        folder: the model's.
        prefill: whether it is computed as prompts are read with it.
    """
    config, source = read_config(folder), (open_prefill(folder) if prefill else None) or open_weights(folder)
    return Model(str(folder), config, source, _rotation(folder, config.hidden_size))


def _phases(folder: Path) -> tuple[str, ...]:
    """The ways that a folder is computed in: one, or that of answers and that of prompts."""
    return ("",) if open_prefill(folder) is None else (DECODE, PREFILL)


def builtin_texts(folder: Path, sequences: int, sequence_length: int) -> list[Text]:
    """Windows of the beginnings of the builtin texts, by a model's own tokenizer. Raises CalibrationError."""
    characters = MOST_CHARACTERS_A_TOKEN * sequences * sequence_length
    domains = [_shortened(domain, characters) for domain in evaluation_domains()]
    return text_windows(domains, load_tokenizer(folder), sequences, sequence_length)


def text_windows(domains: Sequence[Domain], tokenizer: Any, sequences: int, length: int) -> list[Text]:
    """Windows of so many tokens, evenly spread over each text; fewer of one that is short."""
    return [
        Text(
            domain.name,
            spread_windows(domain, tokenizer, sequences=sequences, sequence_length=length, fewer=True),
        )
        for domain in domains
    ]


def _rotation(folder: Path, hidden_size: int) -> "Rotation | None":
    """The rotation that a folder's residual stream is in, by its manifest or its format; None without one."""
    from msquant.models.rotation import ROTATIONS, StoredRotation

    policy = (_manifest(folder).get("recipe") or {}).get("quantization") or {}
    rotation = ROTATIONS.get(policy.get("rotation", "none"))
    if rotation is not None:
        return rotation(hidden_size)
    form = folder_format(folder)
    matrix = None if form is None else form.residual_rotation(folder, hidden_size)
    return None if matrix is None else StoredRotation(matrix)


def _manifest(folder: Path) -> dict[str, Any]:
    """A folder's `msquant.json`; empty if it has none."""
    return read_json(folder / MANIFEST_NAME) if (folder / MANIFEST_NAME).is_file() else {}


def _made_from(folders: Sequence[Path], notes: list[str]) -> Path | None:
    """The float model that one of the folders says it was made from; notes what is to be said of it."""
    for folder in folders:
        manifest = _manifest(folder)
        name = (manifest.get("recipe") or {}).get("model")
        if not isinstance(name, str):
            continue
        try:
            found = resolve_model(name)
        except MsquantError as error:
            notes.append(f"{folder} was made from {name}, which cannot be taken ({error.what})")
            continue
        if Checkpoint.open(found).fingerprint()["sha256"] != (manifest.get("source") or {}).get("sha256"):
            notes.append(f"{found} is not the very checkpoint that {folder} was made from")
        return found
    if not notes:
        notes.append(
            f"no {MANIFEST_NAME} says which float model {' or '.join(map(str, folders))} was made from"
        )
    return None


def _domains(texts: Sequence[str], builtin: bool, template: str | None, progress: Progress) -> list[Domain]:
    domains = evaluation_domains() if builtin else []
    reading = Reading(
        template=Template(template) if template is not None else None,
        characters=MAX_CHARACTERS,
        offline=is_offline(),
        note=progress.stage,
    )
    for text in texts:
        domains += load_texts(text, reading)
    if not domains:
        raise CalibrationError("there is no text to evaluate on", remedy="give one with --text")
    return [_shortened(domain, MAX_CHARACTERS) for domain in domains]


def _shortened(domain: Domain, characters: int) -> Domain:
    """A domain's first so many characters."""
    kept: list[str] = []
    for text in domain.texts:
        if characters <= 0:
            break
        kept.append(text[:characters])
        characters -= len(text)
    return replace(domain, texts=kept)


def _tokens(
    folders: Sequence[Path], domains: Sequence[Domain], sequences: int, length: int, notes: list[str]
) -> list[Text]:
    """The texts by the first folder's tokenizer, which those of the others have to agree with."""
    texts = text_windows(domains, load_tokenizer(folders[0]), sequences, length)
    for folder in folders[1:]:
        if not has_tokenizer(folder):
            notes.append(f"{folder} has no tokenizer: the float model's was taken")
            continue
        for text, own in zip(
            texts, text_windows(domains, load_tokenizer(folder), sequences, length), strict=True
        ):
            if not np.array_equal(text.tokens, own.tokens):
                raise ModelError(
                    f"its tokenizer makes other tokens of the text {text.name} than that of {folders[0]}",
                    where=folder,
                    remedy="name the float model that it was quantized from with --baseline, or copy that "
                    "model's tokenizer.json and tokenizer_config.json into the folder",
                )
    return texts
