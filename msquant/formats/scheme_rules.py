"""The rules on schemes that vLLM and vllm-ascend have in common."""

from collections.abc import Collection, Iterator, Mapping

from msquant.checkpoint.weights import Scheme
from msquant.formats.format import Finding
from msquant.formats.fused_layers import check_fused_schemes, experts_parent

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
            known = ", ".join(accepted)
            yield Finding(module, f"is {scheme}: in this format msquant writes {known} for {consumer}")
        elif scheme != "float" and (what := float_only(module, names)):
            yield Finding(module, f"is {scheme}: {consumer} takes {what} in floating point only")
        if scheme in ("static", "weight_only") and experts_parent(module):
            problem = f"{consumer} runs routed experts in int8 with per-token activations (dynamic) only"
            yield Finding(module, f"is {scheme}: {problem}")
    yield from check_fused_schemes(linears)
