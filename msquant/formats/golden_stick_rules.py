"""The rules a golden-stick folder must keep for vLLM-MindSpore 0.5.1 to load and compute it correctly.

Each rule is taken from what the engine does: vllm 0.11.0 (`get_quant_config`, `_get_quantization_config`),
vllm_mindspore 0.5.1 (`GoldenStickConfig`, `A8W8LinearMethod`, `load_weights`, the loaders in linear.py) and
mindformers 1.7.0 (parallel_core/inference: quantization, tensor_parallel, model_utils.py).
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.reader import INDEX_NAME, Checkpoint
from msquant.checkpoint.results import MANIFEST_NAME
from msquant.errors import CheckpointError
from msquant.formats.dtypes import model_dtype
from msquant.formats.folder_rules import attempt, open_folder
from msquant.formats.format import Finding
from msquant.formats.golden_stick_layout import DESCRIPTION_NAME, SECTION, SERVED_DTYPES
from msquant.formats.golden_stick_schemes import (
    ACCEPTED,
    FLOAT,
    W8A8,
    Variant,
    check_schemes,
    folder_variant,
    variant_of,
)
from msquant.formats.golden_stick_tensors import check_tensors

DESCRIPTION_NAMES = (DESCRIPTION_NAME, "quant_model_description.json")


def description_files(folder: Path) -> list[Path]:
    """The files vLLM takes for descriptions: any whose name *ends* with one of the two known names."""
    return sorted(path for path in folder.glob("*.json") if path.name.endswith(DESCRIPTION_NAMES))


def read_description(folder: Path) -> dict[str, str]:
    """`W8A8`, `W8A8_DYNAMIC` or `FLOAT` by tensor name.

    Raises:
        CheckpointError: there is not exactly one description, or it does not map names to strings.
    """
    files = description_files(folder)
    if len(files) != 1:
        found = ", ".join(path.name for path in files) or "none"
        raise CheckpointError(
            f"exactly one of {' and '.join(DESCRIPTION_NAMES)} is expected, found {found}",
            where=folder,
            remedy="quantize the model again, or remove the file that does not belong here",
        )
    description = read_json(files[0])
    for name, value in description.items():
        if not isinstance(value, str):
            raise CheckpointError(f"{name} is {value!r}, {W8A8} or {FLOAT} is expected", where=files[0])
    # The engine, too, takes only dotted names for tensors.
    return {name: value for name, value in description.items() if "." in name}


def read_variant(folder: Path, config: Mapping[str, Any]) -> Variant:
    """The backend a folder is for: what its manifest records, else that of its architecture.

    Args:
        folder: the checkpoint, with or without a manifest.
        config: the content of its `config.json`.

    Raises:
        CheckpointError: the manifest records an unknown variant.
    """
    try:
        manifest = read_json(folder / MANIFEST_NAME)
    except CheckpointError:
        manifest = {}
    return folder_variant(config, manifest)


def validate(folder: Path | str, *, verify_hashes: bool = False) -> list[Finding]:
    """Check a folder against every rule, reading each tensor once and holding one module at a time.

    Args:
        folder: the checkpoint.
        verify_hashes: also compare every file's sha256 with the manifest, which reads everything twice.

    Returns:
        The broken rules; none for a folder that is correct.
    """
    folder = Path(folder)
    findings: list[Finding] = []
    config, checkpoint = open_folder(folder, findings, verify_hashes=verify_hashes)
    description = attempt(findings, lambda: read_description(folder))
    variant = attempt(findings, lambda: read_variant(folder, config or {})) or variant_of(config or {})
    if config is not None:
        findings.extend(_check_config(config, variant))
    if checkpoint is not None and description is not None:
        findings.extend(_check_names(checkpoint, description, variant))
        findings.extend(_check_schemes(description, variant, config or {}))
        findings.extend(check_tensors(checkpoint, description, model_dtype(config or {})))
    if checkpoint is not None and variant == "mindformers":
        findings.extend(_check_stray_files(folder, checkpoint))
    return findings


def _check_config(config: dict[str, Any], variant: Variant) -> Iterator[Finding]:
    text_config = config.get("text_config")
    nested = text_config if isinstance(text_config, dict) else {}
    section = config.get("quantization_config")
    if variant == "mindformers" and section != SECTION:
        yield Finding(
            "config.json",
            f"quantization_config is {section!r}: below TP16 MindFormers builds the attention of a quantized "
            f"model only if it is {json.dumps(SECTION)}",
        )
    elif variant == "native" and section is not None:
        yield Finding(
            "config.json",
            "quantization_config is there: vLLM reads it in place of the description, and all is float",
        )
    if nested.get("quantization_config") is not None:
        yield Finding("config.json", "quantization_config is there: vLLM reads it instead of the description")
    if config.get("compression_config") is not None:
        yield Finding("config.json", "compression_config is there: vLLM reads it instead of the description")
    if (dtype := model_dtype(config)) not in SERVED_DTYPES:
        yield Finding(
            "config.json",
            f"dtype is {dtype}: vLLM-MindSpore runs golden-stick in {' or '.join(SERVED_DTYPES)}",
        )


def _check_names(checkpoint: Checkpoint, description: dict[str, str], variant: Variant) -> Iterator[Finding]:
    for name in checkpoint.names():
        if name not in description:
            yield Finding(name, "stored, but not described")
    for name, value in description.items():
        if name not in checkpoint:
            yield Finding(name, "described, but not stored")
        if value not in ACCEPTED[variant]:
            *most, last = ACCEPTED[variant]
            known = f"{', '.join(most)} and {last}"
            yield Finding(name, f"described as {value!r}: only {known} are known")


def _check_schemes(
    description: dict[str, str], variant: Variant, config: Mapping[str, Any]
) -> Iterator[Finding]:
    schemes: dict[str, str] = {}
    for name, value in description.items():
        module = name.rpartition(".")[0]
        if schemes.setdefault(module, value) != value:
            yield Finding(name, f"described as {value}, but another tensor of the layer as {schemes[module]}")
    # An unknown word was reported with its tensor.
    known = {module: value for module, value in schemes.items() if value in ACCEPTED[variant]}
    yield from check_schemes(known, variant, config)


def _check_stray_files(folder: Path, checkpoint: Checkpoint) -> Iterator[Finding]:
    """MindFormers loads every shard in the folder, and takes a description by a part of its path."""
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in checkpoint.shards:
            yield Finding(path.name, f"{INDEX_NAME} does not name it, but MindFormers would load it")
    for path in sorted(folder.glob("*.json")):
        stems = [name for name in DESCRIPTION_NAMES if Path(name).stem in path.name]
        if stems and not path.name.endswith(DESCRIPTION_NAMES):
            yield Finding(path.name, "MindFormers takes it for a description because of its name")
