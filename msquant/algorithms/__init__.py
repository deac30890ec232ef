"""The algorithms by name: one file each, imported by one registry when it is asked for."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from msquant.errors import RecipeError, choices

if TYPE_CHECKING:
    from msquant.algorithms.base import Algorithm

_SHIPPED = ("osl", "osl-golden-stick", "gptq", "awq", "smoothquant", "rtn")

DEFAULT = _SHIPPED[0]
"""The algorithm of a recipe that names none."""

_REGISTERED: "dict[str, type[Algorithm]]" = {}


def register(algorithm: "type[Algorithm]") -> "type[Algorithm]":
    """Make an algorithm known by its name; a decorator of its class."""
    _REGISTERED[algorithm.model_fields["algorithm"].default] = algorithm
    return algorithm


def algorithm_names() -> tuple[str, ...]:
    """The names of all algorithms, the default one first."""
    return tuple(dict.fromkeys((*_SHIPPED, *_REGISTERED)))


def find_algorithm(name: Any) -> "type[Algorithm]":
    """The algorithm of that name.

    Raises:
        RecipeError: there is none; names the nearest.
    """
    if name in _SHIPPED:
        import_module(f"msquant.algorithms.{name.replace('-', '_')}")
    if isinstance(name, str) and name in _REGISTERED:
        return _REGISTERED[name]
    # What is the default now was called so while `osl` stood for golden-stick's own arithmetic.
    meant = DEFAULT if name == "osl-robust" else name
    raise RecipeError(
        f"{name!r} is not an algorithm", where="algorithm", remedy=choices(meant, algorithm_names())
    )


def make_algorithm(**options: Any) -> "Algorithm":
    """An algorithm with its options, as a recipe's `quantization` section gives them.

    Args:
        options: `algorithm`, its name, and the fields of its class; what is left out has its default.

    Raises:
        RecipeError: there is no such algorithm.
        pydantic.ValidationError: it has no such option, or the value is not valid.
    """
    return find_algorithm(options.get("algorithm", DEFAULT)).model_validate(options)


def options_in_common(policy: "Algorithm", name: str) -> dict[str, Any]:
    """The options of a policy that another algorithm has too, under that one's name.

    Raises:
        RecipeError: there is no algorithm of that name.
    """
    known = find_algorithm(name).model_fields
    return {key: value for key, value in policy.model_dump().items() if key in known} | {"algorithm": name}
