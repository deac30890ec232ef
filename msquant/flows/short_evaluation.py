"""The short evaluation at the end of `msquant quantize`: what was written, beside the float model."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.results import MANIFEST_NAME
from msquant.checkpoint.tokenizer import load_tokenizer
from msquant.checkpoint.writer import write_json
from msquant.evaluation.inputs import Text
from msquant.evaluation.predictions import predictions
from msquant.evaluation.settings import EvaluationSettings
from msquant.flows.comparison import builtin_texts, score_folders
from msquant.models.config import ModelConfig
from msquant.progress import Progress


def short_texts(settings: EvaluationSettings, source: Path, config: ModelConfig) -> list[Text]:
    """The tokens to evaluate on, none if the settings want none. Raises CalibrationError.

    Args:
        settings: the recipe's.
        source: the float model's folder, for its tokenizer.
        config: its shape.
    """
    if not settings.sequences:
        return []
    length = min(settings.sequence_length, config.longest)
    return builtin_texts(source, settings.sequences, length)


def evaluate_result(
    settings: EvaluationSettings,
    texts: Sequence[Text],
    source: Path,
    folder: Path,
    *,
    device: str,
    memory_budget: int,
    progress: Progress,
) -> dict[str, Any] | None:
    """Measure a complete folder and write what was found into its `msquant.json`, as `evaluation`.

    It is read back from the disk, so what is measured is what was written. The record holds
    `ModelScore.as_dict()`, the shape of the texts, the limits that it breaks as `beyond`, and next tokens of
    both models as `predictions`.

    Args:
        settings: the recipe's.
        texts: from `short_texts`.
        source: the float model's folder.
        folder: the written one, with its manifest.
        device: `cpu` or `ascend`.
        memory_budget: bytes of hidden states held in memory.
        progress: callbacks, of which `stage`, `step` and `lap` are used.

    Returns:
        The record; None without texts.

    Raises:
        MsquantError: the folder cannot be read back, or computes NaN; or the manifest cannot be written.
    """
    if not texts:
        return None
    progress.stage("comparing the result with the float model on held-out text")

    def on_layer(record: dict[str, Any]) -> None:
        progress.lap("evaluated layer")
        progress.step(f"evaluated decoder layer {record['index']}")

    within = Progress(layer=on_layer)
    expected, score = score_folders([source, folder], texts, device, memory_budget, within)
    progress.lap("head")
    tokenizer = load_tokenizer(source)

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    shown = predictions(texts, expected.next_tokens, score.next_tokens, decode)
    sequences, length = texts[0].tokens.shape
    shape = {"sequences": sequences, "sequence_length": length}
    record = {
        **shape,
        **score.as_dict(),
        "beyond": settings.beyond(score),
        "predictions": [asdict(prediction) for prediction in shown],
    }
    write_json(folder / MANIFEST_NAME, read_json(folder / MANIFEST_NAME) | {"evaluation": record})
    return record
