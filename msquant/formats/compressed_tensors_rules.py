"""The rules a compressed-tensors folder must keep for vLLM to load and compute it correctly.

Each rule is taken from what vllm 0.11.0 and 0.32.0 do: compressed_tensors.py, compressed_tensors/utils.py
(`find_matched_target`, `should_ignore_layer`), its schemes, and model_executor/parameter.py.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from msquant.checkpoint.reader import Checkpoint
from msquant.errors import CheckpointError
from msquant.formats.compressed_tensors_layout import SERVED_DTYPES
from msquant.formats.compressed_tensors_schemes import check_schemes
from msquant.formats.compressed_tensors_section import Section, read_section
from msquant.formats.compressed_tensors_tensors import check_tensors, is_linear
from msquant.formats.dtypes import model_dtype
from msquant.formats.folder_rules import attempt, open_folder
from msquant.formats.format import Finding
from msquant.formats.fused_layers import experts_parent, fused_layers
from msquant.schemes import FLOAT, Scheme


def validate(folder: Path | str, *, verify_hashes: bool = False) -> list[Finding]:
    """Check a folder against every rule, reading each tensor once and holding one at a time.

    Args:
        folder: the checkpoint.
        verify_hashes: also compare every file's sha256 with the manifest, which reads everything twice.

    Returns:
        The broken rules; none for a folder that is correct.
    """
    folder = Path(folder)
    findings: list[Finding] = []
    config, checkpoint = open_folder(folder, findings, verify_hashes=verify_hashes)
    section = None
    if config is not None:
        section = attempt(findings, lambda: read_section(config))
        if (dtype := model_dtype(config)) not in SERVED_DTYPES:
            findings.append(
                Finding("config.json", f"dtype is {dtype}, one of {', '.join(SERVED_DTYPES)} is expected")
            )
    if checkpoint is not None and section is not None:
        schemes = stored_schemes(checkpoint, section)
        findings.extend(check_schemes(schemes))
        findings.extend(_check_fused_targets(section, schemes))
        findings.extend(check_tensors(checkpoint, section))
    return findings


def stored_schemes(checkpoint: Checkpoint, section: Section) -> dict[str, Scheme]:
    """The scheme of every stored linear layer by module, as `config.json` says it."""
    schemes: dict[str, Scheme] = {}
    for name in checkpoint.names():
        module = name.removesuffix(".weight")
        if module != name and is_linear(checkpoint, module):
            group = section.group(module)
            schemes[module] = group.scheme if group else FLOAT
    return schemes


def notes(config: Mapping[str, Any]) -> list[str]:
    """What to know of serving a correct folder of this `config.json`; often nothing."""
    try:
        section = read_section(config)
    except CheckpointError:
        # The rules report it.
        return []
    found = []
    if any(group.scheme.is_static and group.symmetric for group in section.groups):
        found.append(
            "vLLM on a CPU with AMX computes symmetric static activations as per-token ones: msquant export "
            "writes them with a zero point, which it keeps"
        )
    return found


def _check_fused_targets(section: Section, schemes: Mapping[str, Scheme]) -> Iterator[Finding]:
    """A layer that vLLM fuses is looked for by its own name and class before its parts are."""
    for fused, members in fused_layers(module for module in schemes if not experts_parent(module)).items():
        mine = section.group(members[0])
        # Ignored layers are looked for by their parts.
        if mine is None:
            continue
        found = section.group(fused) or mine
        if found != mine:
            yield Finding(
                "config.json",
                f"vLLM takes {fused} for a layer of {found.name}, its part {members[0]} is in {mine.name}: "
                f"name the fused layer in the targets of {mine.name} too",
            )
