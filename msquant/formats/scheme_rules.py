"""The rules on schemes that vLLM and vllm-ascend have in common."""

from collections.abc import Collection, Iterator, Mapping

from msquant.formats.format import Finding
from msquant.formats.fused_layers import check_fused_schemes, experts_parent
from msquant.schemes import Scheme

FLOAT_ONLY: Mapping[str, str] = {
    "lm_head": "the output head",
    "embed_tokens": "embeddings",
    "mlp.gate": "the router",
}
"""The ends of modules that no engine quantizes: tables, and the router, which is built without a method."""


def float_only(module: str, names: Mapping[str, str] = FLOAT_ONLY) -> str | None:
    """What a module is that has to stay in floating point; None for another.

    Args:
        module: its name.
        names: what it is, by the last parts of its name.
    """
    return next((what for end, what in names.items() if module == end or module.endswith(f".{end}")), None)


def check_linear_schemes(
    linears: Mapping[str, Scheme], consumer: str, accepted: Collection[Scheme], names: Mapping[str, str]
) -> Iterator[Finding]:
    """Check that a consumer can run the layers of a model in the given schemes together.

    Args:
        linears: the scheme of each linear layer by module.
        consumer: what runs them.
        accepted: the schemes that a format has for it.
        names: see `float_only`.
    """
    for module, scheme in linears.items():
        if scheme not in accepted:
            known = ", ".join(map(str, accepted))
            yield Finding(module, f"is {scheme}: in this format msquant writes {known} for {consumer}")
        elif not scheme.is_float and (what := float_only(module, names)):
            yield Finding(module, f"is {scheme}: {consumer} takes {what} in floating point only")
        if not (scheme.is_float or scheme.is_dynamic) and experts_parent(module):
            problem = f"{consumer} runs routed experts with per-token activations (W8A8_DYNAMIC) only"
            yield Finding(module, f"is {scheme}: {problem}")
    yield from check_fused_schemes({module: str(scheme) for module, scheme in linears.items()})
