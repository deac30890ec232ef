"""Which tensors a decoder must have, and their shapes, from its `config.json`, without any weights."""

import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from msquant.checkpoint.config_limits import check_number, check_numbers
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
"""The linear layers of a decoder layer of the Llama kind, below `model.layers.<i>`."""

LATENT_TYPES = ("deepseek_v2", "deepseek_v3")
"""Values of `model_type` with multi-head latent attention."""
EXPERT_COUNT = {
    "qwen3_moe": "num_experts",
    "deepseek_v2": "n_routed_experts",
    "deepseek_v3": "n_routed_experts",
}
"""The entry of `config.json` that counts the routed experts of a layer, by `model_type`."""
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", *EXPERT_COUNT)

# What transformers 4.57.1 takes for an entry that is left out, where it is not derived from the others.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "qwen3_moe": {"num_key_value_heads": 4},
    "deepseek_v2": {"q_lora_rank": 1536},
    "deepseek_v3": {"q_lora_rank": 1536, "first_k_dense_replace": 3},
}

Shapes = dict[str, tuple[int, ...]]
# A linear's name, output channels, input channels and whether it has a bias.
_Linear = tuple[str, int, int, bool]


def expected_shapes(config: dict[str, Any]) -> Shapes | None:
    """Shapes of all tensors of the unquantized model, by name; None for a `model_type` not known here.

    Experts are listed one by one. Scales of a block-quantized checkpoint and multi-token-prediction layers
    (`extra_shapes`) are left out.

    Raises:
        CheckpointError: `config.json` lacks a size, or holds something else than a positive integer for it.
    """
    if config.get("model_type") not in MODEL_TYPES:
        return None
    check_numbers(config)
    config = _with_defaults(config)
    hidden, vocabulary = positive(config, "hidden_size"), positive(config, "vocab_size")
    shapes: Shapes = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocabulary, hidden)
    for index in range(positive(config, "num_hidden_layers")):
        shapes |= _layer(config, index)
    return shapes


def extra_shapes(config: dict[str, Any]) -> Shapes:
    """Shapes of the tensors of multi-token-prediction layers, which follow the decoder layers by number.

    DeepSeek-V3 names them `model.layers.<num_hidden_layers + i>`; each is a decoder layer with an embedding,
    norms and a head of its own. Many conversions drop them, though `config.json` still counts them.

    Raises:
        CheckpointError: as for `expected_shapes`.
    """
    count = config.get("num_nextn_predict_layers") or 0
    if config.get("model_type") != "deepseek_v3" or count == 0:
        return {}
    check_numbers(config)
    config = _with_defaults(config)
    hidden, vocabulary = positive(config, "hidden_size"), positive(config, "vocab_size")
    first = positive(config, "num_hidden_layers")
    shapes: Shapes = {}
    for index in range(first, first + positive(config, "num_nextn_predict_layers")):
        name = f"model.layers.{index}"
        shapes |= {
            f"{name}.embed_tokens.weight": (vocabulary, hidden),
            f"{name}.enorm.weight": (hidden,),
            f"{name}.hnorm.weight": (hidden,),
            f"{name}.eh_proj.weight": (hidden, 2 * hidden),
            f"{name}.shared_head.norm.weight": (hidden,),
            f"{name}.shared_head.head.weight": (vocabulary, hidden),
        }
        shapes |= _layer(config, index)
    return shapes


def _with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    return _DEFAULTS.get(config["model_type"], {}) | config


def _layer(config: dict[str, Any], index: int) -> Shapes:
    prefix, hidden = f"model.layers.{index}", positive(config, "hidden_size")
    latent = config["model_type"] in LATENT_TYPES
    shapes: Shapes = {
        f"{prefix}.input_layernorm.weight": (hidden,),
        f"{prefix}.post_attention_layernorm.weight": (hidden,),
    }
    for linear, rows, columns, bias in (_latent_attention if latent else _attention)(config, hidden):
        shapes |= _linear(f"{prefix}.self_attn.{linear}", rows, columns, bias)
    for norm, size in _attention_norms(config, hidden):
        shapes[f"{prefix}.self_attn.{norm}.weight"] = (size,)
    if not _has_experts(config, index):
        return shapes | _feed_forward(config, f"{prefix}.mlp", hidden, positive(config, "intermediate_size"))
    inner, count = (
        positive(config, "moe_intermediate_size"),
        positive(config, EXPERT_COUNT[config["model_type"]]),
    )
    shapes[f"{prefix}.mlp.gate.weight"] = (count, hidden)
    if config["model_type"] == "deepseek_v3":
        shapes[f"{prefix}.mlp.gate.e_score_correction_bias"] = (count,)
    if latent:
        shared = inner * positive(config, "n_shared_experts")
        shapes |= _feed_forward(config, f"{prefix}.mlp.shared_experts", hidden, shared)
    for expert in range(count):
        shapes |= _feed_forward(config, f"{prefix}.mlp.experts.{expert}", hidden, inner)
    return shapes


def _attention(config: dict[str, Any], hidden: int) -> Iterator[_Linear]:
    heads = positive(config, "num_attention_heads")
    kv_heads = positive(config, "num_key_value_heads", heads)
    head_size = positive(config, "head_dim", hidden // heads)
    model_type, asked = config["model_type"], bool(config.get("attention_bias"))
    inputs = {"qwen2": True, "mistral": False}.get(model_type, asked)
    yield "q_proj", heads * head_size, hidden, inputs
    yield "k_proj", kv_heads * head_size, hidden, inputs
    yield "v_proj", kv_heads * head_size, hidden, inputs
    yield "o_proj", hidden, heads * head_size, asked and model_type not in ("qwen2", "mistral")


def _latent_attention(config: dict[str, Any], hidden: int) -> Iterator[_Linear]:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""
    heads, bias = positive(config, "num_attention_heads"), bool(config.get("attention_bias"))
    rope, nope = positive(config, "qk_rope_head_dim"), positive(config, "qk_nope_head_dim")
    value, kv_rank = positive(config, "v_head_dim"), positive(config, "kv_lora_rank")
    if config["q_lora_rank"] is None:
        yield "q_proj", heads * (nope + rope), hidden, False
    else:
        q_rank = positive(config, "q_lora_rank")
        yield "q_a_proj", q_rank, hidden, bias
        yield "q_b_proj", heads * (nope + rope), q_rank, False
    yield "kv_a_proj_with_mqa", kv_rank + rope, hidden, bias
    yield "kv_b_proj", heads * (nope + value), kv_rank, False
    yield "o_proj", hidden, heads * value, bias


def _attention_norms(config: dict[str, Any], hidden: int) -> Iterator[tuple[str, int]]:
    if config["model_type"] in LATENT_TYPES:
        if config["q_lora_rank"] is not None:
            yield "q_a_layernorm", positive(config, "q_lora_rank")
        yield "kv_a_layernorm", positive(config, "kv_lora_rank")
    elif config["model_type"] in ("qwen3", "qwen3_moe"):
        head_size = positive(config, "head_dim", hidden // positive(config, "num_attention_heads"))
        yield "q_norm", head_size
        yield "k_norm", head_size


def _feed_forward(config: dict[str, Any], name: str, hidden: int, inner: int) -> Shapes:
    bias = bool(config.get("mlp_bias")) and config["model_type"] in ("llama", "deepseek_v2")
    return {
        **_linear(f"{name}.gate_proj", inner, hidden, bias),
        **_linear(f"{name}.up_proj", inner, hidden, bias),
        **_linear(f"{name}.down_proj", hidden, inner, bias),
    }


def _linear(name: str, rows: int, columns: int, bias: bool) -> Shapes:
    weight: Shapes = {f"{name}.weight": (rows, columns)}
    return weight | {f"{name}.bias": (rows,)} if bias else weight


def _has_experts(config: dict[str, Any], index: int) -> bool:
    if config["model_type"] in LATENT_TYPES:
        return index >= _count(config, "first_k_dense_replace")
    if config["model_type"] not in EXPERT_COUNT:
        return False
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(layer) is not int for layer in dense):
        raise _wrong("mlp_only_layers", dense, "a list of layer numbers")
    if len(dense) > (most := positive(config, "num_hidden_layers")):
        raise _wrong("mlp_only_layers", dense, f"a list of at most {most} numbers")
    return index not in dense and (index + 1) % positive(config, "decoder_sparse_step", 1) == 0


def positive(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """An entry of `config.json`. Raises CheckpointError if it is no positive integer, or beyond its limit."""
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or value <= 0:
        raise _wrong(key, value, "a positive integer")
    check_number(key, value)
    return value


def _count(config: dict[str, Any], key: str) -> int:
    value = config.get(key, 0)
    if type(value) is not int or value < 0:
        raise _wrong(key, value, "a number of layers")
    return value


def _wrong(key: str, value: Any, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{key} is {reprlib.repr(value)}, {expected} is expected",
        where="config.json",
        remedy="copy config.json of the original model again",
    )
