"""Which tensors a dense decoder must have, and their shapes, from its `config.json`."""

from collections.abc import Iterator
from typing import Any

from msquant.errors import CheckpointError

PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""The linear layers of a decoder layer, below `model.layers.<i>`."""

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """Shapes of all tensors of the unquantized model, by name; None for a `model_type` not known here.

    Raises:
        CheckpointError: `config.json` lacks a size, or holds something else than a positive integer for it.
    """
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        return None
    hidden = _size(config, "hidden_size")
    vocabulary = _size(config, "vocab_size")
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocabulary, hidden)
    layer = dict(_layer_shapes(config, hidden, str(model_type)))
    for index in range(_size(config, "num_hidden_layers")):
        shapes.update({f"model.layers.{index}.{name}": shape for name, shape in layer.items()})
    return shapes


def _layer_shapes(
    config: dict[str, Any], hidden: int, model_type: str
) -> Iterator[tuple[str, tuple[int, ...]]]:
    heads = _size(config, "num_attention_heads")
    kv_heads = _size(config, "num_key_value_heads", heads)
    head_size = _size(config, "head_dim", hidden // heads)
    inner = _size(config, "intermediate_size")
    rows_columns = dict(
        zip(
            PROJECTIONS,
            (
                (heads * head_size, hidden),
                (kv_heads * head_size, hidden),
                (kv_heads * head_size, hidden),
                (hidden, heads * head_size),
                (inner, hidden),
                (inner, hidden),
                (hidden, inner),
            ),
            strict=True,
        )
    )
    with_bias: set[str] = set()
    if model_type == "qwen2" or config.get("attention_bias"):
        with_bias.update(PROJECTIONS[:3])
    if model_type != "qwen2" and config.get("attention_bias"):
        with_bias.add(PROJECTIONS[3])
    if config.get("mlp_bias"):
        with_bias.update(PROJECTIONS[4:])
    for name, shape in rows_columns.items():
        yield f"{name}.weight", shape
        if name in with_bias:
            yield f"{name}.bias", shape[:1]
    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)
    if model_type == "qwen3":
        yield "self_attn.q_norm.weight", (head_size,)
        yield "self_attn.k_norm.weight", (head_size,)


def _size(config: dict[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or value <= 0:
        raise CheckpointError(
            f"{key} is {value!r}, a positive integer is expected",
            where="config.json",
            remedy="copy config.json of the original model again",
        )
    return value
