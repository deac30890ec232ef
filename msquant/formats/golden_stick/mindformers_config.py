"""DeepSeek-V3's `config.json` as MindFormers takes it.

MindFormers converts every key to one of its own and refuses those that it does not know, each version its
own; all take the keys of the published files. transformers writes more when it saves such a model. Seen by
giving single keys and values to the conversion of MindFormers 1.7.0, 1.8.0 and 1.9.0.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from msquant.checkpoint.rope_settings import with_rope_scaling
from msquant.formats.dtypes import model_dtype

_PUBLISHED = """
    architectures attention_bias attention_dropout auto_map bos_token_id eos_token_id ep_size
    first_k_dense_replace hidden_act hidden_size initializer_range intermediate_size kv_lora_rank
    max_position_embeddings model_type moe_intermediate_size moe_layer_freq n_group n_routed_experts
    n_shared_experts norm_topk_prob num_attention_heads num_experts_per_tok num_hidden_layers
    num_key_value_heads num_nextn_predict_layers pad_token_id q_lora_rank qk_nope_head_dim qk_rope_head_dim
    quantization_config rms_norm_eps rope_scaling rope_theta routed_scaling_factor scoring_func
    tie_word_embeddings topk_group topk_method torch_dtype transformers_version use_cache v_head_dim
    vocab_size
"""
PUBLISHED_KEYS: Final = frozenset(_PUBLISHED.split())
"""What the `config.json` of DeepSeek-V3 and R1 hold on the hubs, and MindFormers' own `pad_token_id`."""

_ALSO_TAKEN = """
    _name_or_path do_sample head_dim is_encoder_decoder moe_aux_loss_coeff partial_rotary_factor
    repetition_penalty temperature tokenizer_class top_k top_p
"""
TAKEN_KEYS: Final = PUBLISHED_KEYS | frozenset(_ALSO_TAKEN.split())
"""These and what MindFormers ignores, or takes for what the others say."""

_YARN_KEYS = """
    beta_fast beta_slow factor mscale mscale_all_dim original_max_position_embeddings rope_type type
"""
_ROPE_KEYS = frozenset(_YARN_KEYS.split())

MODEL_TYPES: Final = ("deepseek_v3",)
"""The models of msquant that MindFormers has quantized, and whose `config.json` is described here."""

Problem = tuple[str, str]
"""A key of `config.json`, and what is wrong with its value."""


def published_form(config: Mapping[str, Any]) -> dict[str, Any]:
    """A DeepSeek-V3 `config.json` that says the same with the published keys alone.

    Without `rope_scaling` MindFormers stretches positions by YaRN's factor 40; with YaRN's factor 1 no
    library stretches them. `rope_interleave` is dropped, whatever it says: rows that MindFormers takes are
    no longer interleaved, and a reader of ours finds them so.

    Args:
        config: as transformers 4 or 5 saves it, or as it is published.
    """
    config = with_rope_scaling(config)
    kept = {key: value for key, value in config.items() if key in PUBLISHED_KEYS}
    if (dtype := model_dtype(config)) is not None:
        kept["torch_dtype"] = dtype
    scaling = config.get("rope_scaling") or {}
    variant = _rope_type(scaling)
    if variant not in ("default", "yarn"):
        # What MindFormers does not know: `rope_problems` names it.
        return kept
    positions = config.get("max_position_embeddings", 4096)
    unscaled = {"factor": 1.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
    stated = {key: value for key, value in scaling.items() if key != "rope_type" and value is not None}
    stated = {"original_max_position_embeddings": positions, **(stated if variant == "yarn" else unscaled)}
    return {**kept, "rope_scaling": {**stated, "type": "yarn"}}


def refused_keys(config: Mapping[str, Any], version: str) -> list[str]:
    """The keys that a version of MindFormers does not convert, sorted.

    Args:
        config: the content of `config.json`.
        version: `1.7.0`, `1.8.0` or `1.9.0`.
    """
    taken = TAKEN_KEYS
    if version == "1.7.0" and config.get("rope_interleave") is False:
        taken |= {"rope_interleave"}
    return sorted(key for key in config if key not in taken)


def rope_problems(config: Mapping[str, Any]) -> Iterator[Problem]:
    """What MindFormers computes otherwise than `config.json` says it; it knows YaRN alone.

    `_yarn_get_mscale(factor, mscale)` scales attention there, and `mscale_all_dim` does elsewhere: only where
    they are equal, as in the published files, do all agree.
    """
    scaling = config.get("rope_scaling")
    if not isinstance(scaling, Mapping) or not scaling:
        yield "rope_scaling", "is empty, and MindFormers takes YaRN with factor 40 for it"
        return
    if (variant := _rope_type(scaling)) != "yarn":
        yield "rope_scaling", f"is of type {variant!r}, and MindFormers takes it for YaRN"
        return
    for key in sorted(scaling.keys() - _ROPE_KEYS):
        yield f"rope_scaling.{key}", "is nothing that MindFormers looks at"
    factor = scaling.get("factor")
    if not isinstance(factor, int | float):
        yield "rope_scaling.factor", f"is {factor!r}, a number is expected"
        return
    if not scaling.get("original_max_position_embeddings"):
        yield (
            "rope_scaling.original_max_position_embeddings",
            "is missing, and MindFormers takes its own seq_length for it",
        )
    mscale = scaling.get("mscale")
    if factor > 1 and (not mscale or mscale != scaling.get("mscale_all_dim")):
        yield (
            "rope_scaling.mscale",
            f"is {mscale!r} and mscale_all_dim {scaling.get('mscale_all_dim')!r}: MindFormers scales "
            "attention by the one where others do by the other",
        )


def _rope_type(scaling: Mapping[str, Any]) -> str:
    return str(scaling.get("type") or scaling.get("rope_type") or "default")
