"""Linear layers that engines run as one, and what those must have in common."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.families import fused_linears
from msquant.formats.folder_rules import Finding

_EXPERT = re.compile(r"^(.*\.experts)\.\d+\.")


def fused_layers(modules: Iterable[str]) -> dict[str, list[str]]:
    """Of the given layers, those that run as one, by the name of the layer that vLLM makes of them."""
    parents: dict[str, set[str]] = defaultdict(set)
    for module in modules:
        parent, _, name = module.rpartition(".")
        parents[parent].add(name)
    return {
        f"{parent}.{fused}": [f"{parent}.{name}" for name in members]
        for parent, names in sorted(parents.items())
        for fused, members in fused_linears().items()
        if names.issuperset(members)
    }


def experts_parent(module: str) -> str | None:
    """What all routed experts of a layer begin with, `model.layers.3.mlp.experts`; None for another layer."""
    found = _EXPERT.match(module)
    return found[1] if found else None


def check_fused_schemes(schemes: Mapping[str, str], verb: str = "is") -> Iterator[Finding]:
    """Check that layers which run as one have one scheme, and so all matrices of a layer's routed experts.

    Args:
        schemes: the scheme of each layer by module, or a format's word for it.
        verb: what is said of them.
    """

    def unlike(module: str, first: str) -> Finding:
        problem = f"{verb} {schemes[module]}, unlike {first} ({schemes[first]}): they run as one layer"
        return Finding(module, problem)

    experts: dict[str, str] = {}
    for module in schemes:
        if parent := experts_parent(module):
            first = experts.setdefault(parent, module)
            if schemes[module] != schemes[first]:
                yield unlike(module, first)
    for members in fused_layers(module for module in schemes if not experts_parent(module)).values():
        for other in members[1:]:
            if schemes[other] != schemes[members[0]]:
                yield unlike(other, members[0])


def check_fused_inputs(checkpoint: Checkpoint, parts: tuple[str, ...]) -> Iterator[Finding]:
    """Check that layers which run as one have equal tensors for their common input, and all or none a bias.

    Args:
        checkpoint: the opened folder.
        parts: the tensors that describe the input, such as `input_scale`.
    """
    modules = {name.rpartition(".")[0] for name in checkpoint.names()}
    for members in fused_layers(modules).values():
        first = members[0]
        for other in members[1:]:
            for part in parts:
                names = f"{first}.{part}", f"{other}.{part}"
                # A tensor that only one of them has was reported as another scheme.
                if all(name in checkpoint for name in names):
                    mine, theirs = (checkpoint.raw(name).astype(np.float32) for name in names)
                    if not np.array_equal(mine, theirs):
                        yield Finding(names[1], f"differs from {names[0]}: they run as one layer")
            if (f"{first}.bias" in checkpoint) != (f"{other}.bias" in checkpoint):
                yield Finding(
                    f"{other}.bias", f"{other} and {first} run as one layer, but one of them has no bias"
                )
