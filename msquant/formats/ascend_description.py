"""`quant_model_description.json`, read: what msModelSlim, or msquant, says of every tensor of a folder."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.reader import Checkpoint
from msquant.errors import CheckpointError
from msquant.formats.ascend_schemes import CACHE_ENTRIES, DESCRIBED, DESCRIPTION_NAME, FLOAT
from msquant.formats.format import Finding
from msquant.formats.stored import stored_scheme
from msquant.schemes import Scheme

_SCHEMES: dict[str, Scheme] = {word: scheme for scheme, word in DESCRIBED.items()}


@dataclass(frozen=True)
class Description:
    """What is said of a folder's tensors.

    Attributes:
        tensors: a word such as `W8A8` or `FLOAT` by tensor name.
        entries: everything else, such as `version` and `group_size`.
    """

    tensors: Mapping[str, str]
    entries: Mapping[str, Any]

    def scheme(self, module: str) -> Scheme | None:
        """The scheme of a layer by its weight's word, floating point if there is none; None if unknown."""
        return _SCHEMES.get(self.tensors.get(f"{module}.weight", FLOAT))


def read_description(folder: Path) -> Description:
    """Read a folder's description.

    Raises:
        CheckpointError: it is missing or damaged; or it describes a quantized cache or an online rotation,
            which msquant does not compute.
    """
    path = folder / DESCRIPTION_NAME
    content = read_json(path)
    tensors, entries = {}, {}
    for name, value in content.items():
        if "." not in name or not isinstance(value, str):
            entries[name] = value
        else:
            tensors[name] = value
    for key in CACHE_ENTRIES:
        if entries.get(key):
            raise _refused(path, f"{key} is {entries[key]!r}: a quantized cache or attention")
    metadata = entries.get("metadata")
    if entries.get("optional") or (isinstance(metadata, dict) and "quarot" in metadata):
        raise _refused(path, "it describes activations that are rotated while the model runs")
    return Description(tensors, entries)


def stored_schemes(checkpoint: Checkpoint, modules: Iterable[str]) -> dict[str, Scheme]:
    """The schemes of some modules of a folder, by their tensors, and the description where those are alike.

    A description that cannot be read is left to the rules.
    """
    try:
        described = read_description(checkpoint.folder)
    except CheckpointError:
        described = Description({}, {})
    schemes = {module: stored_scheme(checkpoint, module) for module in modules}
    for module, scheme in schemes.items():
        said = described.scheme(module)
        if scheme.is_dynamic and said is not None and said.is_weight_only:
            schemes[module] = said
    return schemes


def check_words(description: Description, stored: Mapping[str, str]) -> Iterator[Finding]:
    """Check that every tensor is described, by a word that vllm-ascend and msquant know.

    Args:
        description: of the folder.
        stored: its tensors; only the names count.
    """
    for name in stored:
        if name not in description.tensors:
            yield Finding(name, "stored, but not described")
    for name, word in description.tensors.items():
        module, _, part = name.rpartition(".")
        # msModelSlim describes an output head that shares the embedding's weight too.
        if name not in stored and name != "lm_head.weight":
            yield Finding(name, "described, but not stored")
        if word not in _SCHEMES:
            *most, last = DESCRIBED.values()
            yield Finding(name, f"described as {word!r}: only {', '.join(most)} and {last} are known")
        elif part != "bias" and word != description.tensors.get(f"{module}.weight", word):
            yield Finding(
                name,
                f"described as {word}, but the layer's weight as {description.tensors[f'{module}.weight']}",
            )


def _refused(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        what, where=path, remedy="msquant reads layers in int8 with a floating-point cache"
    )
