"""How large the numbers of a `config.json` may be: shapes are enumerated from them before any weight."""

from collections.abc import Mapping
from typing import Any

from msquant.errors import CheckpointError

MAX_SIZE = 2**24
"""Of a size in elements that has no limit of its own; the largest vocabularies have some 300,000 entries."""

MAX_ROUTED_EXPERTS = 100_000
"""Of all decoder layers together; DeepSeek-R1 has 14,848."""

_LIMITS = {
    # The largest published models have 126 layers, 512 experts a layer and 128 heads.
    "num_hidden_layers": 1_000,
    "num_nextn_predict_layers": 100,
    "num_experts": 4_096,
    "n_routed_experts": 4_096,
    "n_shared_experts": 1_024,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "qk_nope_head_dim": 2**16,
    "qk_rope_head_dim": 2**16,
    "v_head_dim": 2**16,
    # transformers makes a name for each label.
    "num_labels": 100_000,
}


def check_number(key: str, value: int, where: object = "config.json", *, most: int = MAX_SIZE) -> None:
    """Check one number; `most` is for a key without a limit of its own.

    Raises:
        CheckpointError: it is larger; names the limit.
    """
    limit = _LIMITS.get(key, most)
    if value > limit:
        shown = str(value) if value < 10**20 else f"a number of {len(str(value))} digits"
        raise CheckpointError(
            f"{key} is {shown}, at most {limit} is read",
            where=str(where),
            remedy="copy config.json of the original model again",
        )


def check_numbers(config: Mapping[str, Any], where: object = "config.json") -> None:
    """Check all that is counted or allocated by a reader of `config.json`, transformers included.

    Raises:
        CheckpointError: a number is larger than its limit, or there are too many experts in all.
    """
    for key, value in config.items():
        if type(value) is int:
            check_number(key, value, where, most=2**53)
    layers = config.get("num_hidden_layers")
    for key in ("num_experts", "n_routed_experts"):
        experts = config.get(key)
        if type(layers) is int and type(experts) is int and layers * experts > MAX_ROUTED_EXPERTS:
            raise CheckpointError(
                f"num_hidden_layers {layers} times {key} {experts} is more than {MAX_ROUTED_EXPERTS} experts",
                where=str(where),
                remedy="copy config.json of the original model again",
            )
