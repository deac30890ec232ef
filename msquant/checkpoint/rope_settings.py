"""The rotary embedding's settings in a `config.json`, whichever version of transformers wrote them."""

from collections.abc import Mapping
from typing import Any


def with_rope_scaling(config: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` as transformers 4 has it: `rope_theta`, and `rope_scaling` or None.

    transformers 5 keeps the base, the scaling and the share of channels that are rotated in one section,
    `rope_parameters`.

    Args:
        config: its content; without that section it is returned as it is.
    """
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, dict):
        return dict(config)
    apart = ("rope_theta", "partial_rotary_factor")
    scaling = {key: value for key, value in parameters.items() if key not in apart}
    plain = scaling.get("rope_type", "default") == "default"
    return {
        **config,
        **{key: parameters[key] for key in apart if key in parameters},
        "rope_scaling": None if plain else scaling,
    }
