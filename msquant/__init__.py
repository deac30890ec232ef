"""msquant: end-to-end quantization of large language models for MindSpore and Ascend.

Examples:
    >>> import msquant
    >>> result = msquant.quantize("smollm2-135m", algo="osl")  # doctest: +SKIP
    >>> with msquant.load(result.folder) as model:  # doctest: +SKIP
    ...     print(model.generate("I am")[0].text)
"""

from typing import TYPE_CHECKING, Any

from msquant.kernels.blas import choose_core

if TYPE_CHECKING:
    from msquant.api import (
        HubProgress,
        MsquantError,
        Progress,
        Recipe,
        Scheme,
        analyze,
        compare,
        download,
        evaluate,
        export,
        find_recipe,
        frontier,
        inspect,
        load,
        parse_scheme,
        plan,
        promise,
        quantize,
    )

__version__ = "0.1.0"

# Before anything of this package loads NumPy, which chooses once.
choose_core()

__all__ = [
    "HubProgress",
    "MsquantError",
    "Progress",
    "Recipe",
    "Scheme",
    "__version__",
    "analyze",
    "compare",
    "download",
    "evaluate",
    "export",
    "find_recipe",
    "frontier",
    "inspect",
    "load",
    "parse_scheme",
    "plan",
    "promise",
    "quantize",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: `import msquant` alone takes a few milliseconds."""
    if name in __all__:
        from msquant import api

        return getattr(api, name)
    raise AttributeError(f"module 'msquant' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
