"""The rules a folder must keep for vllm-ascend to load and compute it correctly.

Each rule is taken from what vllm-ascend does (quantization/modelslim_config.py, method_adapters.py, methods),
and from vLLM, whose loader calls it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from msquant.formats.ascend_description import Description, check_words, read_description
from msquant.formats.ascend_layout import SERVED_DTYPES
from msquant.formats.ascend_schemes import DESCRIPTION_NAME, check_schemes
from msquant.formats.ascend_tensors import check_tensors
from msquant.formats.dtypes import model_dtype
from msquant.formats.folder_rules import attempt, open_folder
from msquant.formats.format import Finding
from msquant.schemes import Scheme


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
    if config is not None:
        findings.extend(_check_config(config))
    if checkpoint is not None and description is not None:
        findings.extend(check_words(description, checkpoint.weight_map))
        findings.extend(_check_head(description))
        findings.extend(check_schemes(_known(description)))
        findings.extend(check_tensors(checkpoint, description, model_dtype(config or {})))
    return findings


def _check_config(config: Mapping[str, Any]) -> Iterator[Finding]:
    for key in ("quantization_config", "compression_config"):
        if config.get(key) is not None:
            yield Finding("config.json", f"{key} is there: vLLM reads it instead of the description")
    if (dtype := model_dtype(config)) not in SERVED_DTYPES:
        yield Finding(
            "config.json", f"dtype is {dtype}: vllm-ascend runs this format in {' or '.join(SERVED_DTYPES)}"
        )


def _check_head(description: Description) -> Iterator[Finding]:
    """vLLM's Llama makes an output head before it ties it to the embedding, and vllm-ascend looks it up."""
    if "lm_head.weight" not in description.tensors:
        yield Finding(
            DESCRIPTION_NAME,
            "does not describe lm_head.weight: vllm-ascend asks for it even if it is not stored",
        )


def _known(description: Description) -> dict[str, Scheme]:
    """The scheme of each layer by module; one that is unknown was reported with its tensor."""
    schemes: dict[str, Scheme] = {}
    for name in description.tensors:
        module = name.removesuffix(".weight")
        if module != name and (scheme := description.scheme(module)) is not None:
            schemes[module] = scheme
    return schemes
