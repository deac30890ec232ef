"""Names a set of layers by few patterns, as `targets` and `ignore` of compressed-tensors take them.

A name that begins with `re:` is a regular expression for the beginning of a layer's name; any other is the
whole name, or the class of a layer (vllm 0.11.0, compressed_tensors/utils.py: `find_matched_target`).
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable

from msquant.families import fused_linears
from msquant.formats.fused_layers import experts_parent, fused_layers

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


def patterns(chosen: Iterable[str], others: Collection[str], *, fused: bool) -> list[str]:
    """Patterns that match the chosen layers, and none of the others.

    A layer is named by its kind where all of that kind are chosen, `re:.*\\.mlp\\.down_proj$`; else by its
    decoder layer where all in that are, `re:model\\.layers\\.61\\..*`; and else by its own name.

    Args:
        chosen: names of layers.
        others: names of all other linear layers.
        fused: whether to name the layers too that vLLM makes of the chosen ones. It looks for a fused layer's
            own name and class before it looks for its parts: with a target for `q_proj` alone, `qkv_proj`
            would go to a group for the class `Linear`.
    """
    modules = set(chosen)
    if fused:
        modules.update(fused_layers(module for module in modules if not experts_parent(module)))
    other_kinds, other_layers = {_kind(module) for module in others}, {_layer(module) for module in others}
    mixed = {module for module in modules if _kind(_unfused(module)) in other_kinds}
    whole = {_layer(module) for module in mixed} - other_layers - {""}
    names = {module for module in modules if _layer(module) not in whole}
    kinds: dict[str, set[str]] = defaultdict(set)
    for module in names - mixed:
        parent, name = _kind(module)
        kinds[parent].add(name)
    found = [f"re:model\\.layers\\.{layer}\\..*" for layer in sorted(whole, key=int)]
    for parent, parts in sorted(kinds.items()):
        alternatives = f"({'|'.join(sorted(parts))})" if len(parts) > 1 else "".join(parts)
        # A name outside of the decoder layers, such as lm_head, is no pattern.
        found += [f"re:.*\\.{parent}{alternatives}$"] if parent else sorted(parts)
    return found + sorted({_name(module) for module in names & mixed}, key=_natural)


def _layer(module: str) -> str:
    found = _LAYER.match(module)
    return found[1] if found else ""


def _kind(module: str) -> tuple[str, str]:
    """The pattern of what a layer's name has between its decoder layer and its last part, and that part."""
    parent, _, name = module.rpartition(".")
    if not _LAYER.match(module):
        return "", module
    parts = _LAYER.sub("", f"{parent}.").split(".")
    return r"\.".join(r"\d+" if part.isdecimal() else part for part in parts), name


def _unfused(module: str) -> str:
    """A part of a fused layer; all have one scheme. Any other layer as it is."""
    parent, _, name = module.rpartition(".")
    parts = fused_linears().get(name)
    return f"{parent}.{parts[0]}" if parts else module


def _name(module: str) -> str:
    """A layer's own name; all experts of a layer, which have one scheme, by one pattern."""
    parent = experts_parent(module)
    if parent is None:
        return module
    rest = module.removeprefix(f"{parent}.").partition(".")[2]
    return "re:" + f"{parent}.".replace(".", r"\.") + r"\d+\." + rest.replace(".", r"\.") + "$"


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
