"""The flow of `msquant quantize`: a recipe and a source checkpoint in, a verified folder out.

One decoder layer is in memory at a time. The next layer's inputs are the unquantized layer's outputs, as in
golden-stick, so layers are independent of one another once the floating-point pass has been made.
"""

import gc
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msquant.calibration.sources import load_texts
from msquant.calibration.tokens import calibration_batches
from msquant.checkpoint.disk import require_free_space
from msquant.checkpoint.output_folder import OutputFolder
from msquant.checkpoint.reader import Checkpoint
from msquant.checkpoint.results import remember_result
from msquant.checkpoint.tokenizer import load_tokenizer
from msquant.formats.golden_stick_writer import GoldenStickWriter
from msquant.hub.models import resolve_model
from msquant.manifest import build_manifest
from msquant.models.config import ModelConfig
from msquant.quantization.policy import QuantizationPolicy
from msquant.quantization.report import LayerReport
from msquant.recipes import Recipe

# Samples are computed in batches of about this many tokens: enough for efficient matrix products, few enough
# for the search to give up a losing candidate early.
BATCH_TOKENS = 512


@dataclass(frozen=True)
class Progress:
    """Callbacks of a running quantization; each may be left out.

    Attributes:
        stage: called with a line that says what begins.
        layers: called with the number of decoder layers, before the first.
        layer: called with a decoder layer's index and report when its shard is written.
    """

    stage: Callable[[str], None] = lambda text: None
    layers: Callable[[int], None] = lambda count: None
    layer: Callable[[int, LayerReport], None] = lambda index, report: None


@dataclass(frozen=True)
class QuantizeResult:
    """A finished quantization.

    Attributes:
        folder: the written folder.
        reports: one a decoder layer.
        source_bytes: bytes of all tensors of the source.
        output_bytes: bytes of all tensors written.
        seconds: wall time.
        peak_memory: greatest resident set of this process so far, in bytes.
    """

    folder: Path
    reports: list[LayerReport]
    source_bytes: int
    output_bytes: int
    seconds: float
    peak_memory: int


def quantize(
    recipe: Recipe,
    output: Path,
    *,
    overwrite: bool = False,
    device: str = "cpu",
    verbose: bool = False,
    progress: Progress | None = None,
) -> QuantizeResult:
    """Quantize a model by a recipe into a new folder.

    Args:
        recipe: everything that affects the result.
        output: the folder to make; it appears only when it is complete.
        overwrite: replace an earlier result of msquant there.
        device: `cpu` or `ascend`.
        verbose: show golden-stick's own log.
        progress: callbacks.

    Raises:
        MsquantError: the input is bad, or the output cannot be written; nothing that looks finished is left.
    """
    started = time.monotonic()
    progress = progress or Progress()
    with OutputFolder(output, overwrite=overwrite) as target:
        progress.stage(f"reading {recipe.model}")
        source, config, checkpoint = open_source(recipe.model)
        source_bytes = sum(checkpoint.nbytes(name) for name in checkpoint.names())
        # W8A8 is smaller than any floating-point source.
        require_free_space(target.path, source_bytes)

        progress.stage(f"calibration from {recipe.calibration.source}")
        tokens = calibration_tokens(recipe, source)

        progress.stage("loading MindSpore and golden-stick")
        reports: list[LayerReport] = []
        writer = GoldenStickWriter(target.path, config.dtype, shards=config.num_hidden_layers + 1)
        layers = quantized_layers(config, checkpoint, tokens, recipe.quantization, device, verbose)
        progress.layers(config.num_hidden_layers)
        for index, result in enumerate(layers):
            writer.write_shard(result.norms, result.linears)
            reports.append(result.report)
            progress.layer(index, result.report)

        progress.stage("writing embeddings, tokenizer and manifest")
        writer.write_shard({name: checkpoint.tensor(name) for name in config.end_names}, {})
        writer.finish(source, build_manifest(recipe, checkpoint, tokens, reports))
        folder = target.finish()
    remember_result(folder)
    return QuantizeResult(
        folder=folder,
        reports=reports,
        source_bytes=source_bytes,
        output_bytes=writer.total_size,
        seconds=time.monotonic() - started,
        peak_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def open_source(model: str) -> tuple[Path, ModelConfig, Checkpoint]:
    """Find a model and check from the headers alone that it is whole and that its config describes it.

    Raises:
        MsquantError: there is no such model, or a file, tensor or shape is wrong.
    """
    folder = resolve_model(model)
    config = ModelConfig.from_folder(folder)
    checkpoint = Checkpoint.open(folder)
    for name, shape in config.shapes.items():
        checkpoint.expect(name, shape)
    return folder, config, checkpoint


def calibration_tokens(recipe: Recipe, source: Path) -> NDArray[np.int32]:
    """The recipe's calibration batches, `[samples, sequence_length]`, by the source's tokenizer.

    Raises:
        CalibrationError: the text is missing, unreadable or too short.
    """
    settings = recipe.calibration
    return calibration_batches(
        load_texts(settings.source, text_field=settings.text_field),
        load_tokenizer(source),
        samples=settings.samples,
        sequence_length=settings.sequence_length,
        seed=settings.seed,
    )


def quantized_layers(
    config: ModelConfig,
    checkpoint: Checkpoint,
    tokens: NDArray[np.int32],
    policy: QuantizationPolicy,
    device: str = "cpu",
    verbose: bool = False,
) -> Iterator[Any]:
    """Quantize the decoder layers one after another; yields a `LayerResult` each, with its error measured.

    Raises:
        MsquantError: the device is not there, a tensor holds NaN, or the search finds nothing.
    """
    from msquant.models.device import use_device
    from msquant.models.layers import DecoderLayer, positions
    from msquant.models.network import Embedding
    from msquant.quantization import golden_stick
    from msquant.quantization.layer_pass import output_error, quantize_layer

    dtype = use_device(device)
    golden_stick.set_log_level(verbose)
    # golden-stick collects garbage many times a layer; what is loaded by now is not worth looking at again.
    gc.freeze()
    samples, length = tokens.shape
    places = positions(config, length, dtype)
    step = max(1, BATCH_TOKENS // length)
    embedding = Embedding(config, checkpoint, dtype)
    hidden = [embedding(tokens[start : start + step]) for start in range(0, samples, step)]
    del embedding
    for index in range(config.num_hidden_layers):
        name = config.family.layer_name(index)
        layer = DecoderLayer(config, checkpoint, name, dtype)
        outputs = [layer(batch, places) for batch in hidden]
        result = quantize_layer(config, name, layer, hidden, places, policy)
        layer = DecoderLayer(config, result, name, dtype)
        # A sample of the calibration tokens: enough for a figure to compare layers by.
        result.report.error = output_error(hidden[:1], outputs[:1], layer, places)
        yield result
        hidden = outputs
