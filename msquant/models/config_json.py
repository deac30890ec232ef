"""From the content of a `config.json` to a `ModelConfig`; what is not computed here is refused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from msquant.checkpoint.config_limits import check_numbers
from msquant.checkpoint.folder_files import require_own_files
from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.rope_settings import with_rope_scaling
from msquant.checkpoint.transformers_import import import_transformers
from msquant.errors import CheckpointError, ModelError
from msquant.families import find_family, model_types
from msquant.models.config import ModelConfig
from msquant.models.rope import rotary_tables

Where = Path | str
_CHECK = "check the file against the published one"
# The integers of a finished folder, which no computation starts from: a reader of `formats` has them.
_FINISHED = (
    "compressed-tensors",
    "golden-stick",
    "gptq",
    "awq",
    "auto-round",
    "auto_round",
    "intel/auto-round",
)


def read_config(folder: Path) -> ModelConfig:
    """Read `folder/config.json`, with the defaults of transformers' own config class.

    Raises:
        CheckpointError: the file is missing, is not JSON or contradicts itself; or as `require_own_files`.
        ModelError: the architecture, or an option of it, is not supported.
    """
    require_own_files(Path(folder))
    path = Path(folder) / "config.json"
    return parse_config(read_json(path), path)


def parse_config(raw: dict[str, Any], where: Where = "config.json") -> ModelConfig:
    """Build a `ModelConfig` from the content of a `config.json`; `where` is what errors name.

    Raises:
        CheckpointError: the values contradict one another.
        ModelError: the architecture, or an option of it, is not supported.
    """
    family = find_family(raw.get("model_type"))
    if family is None:
        raise ModelError(
            f"model_type {raw.get('model_type')!r} is not supported",
            where=where,
            remedy=f"use a model of one of these types: {', '.join(model_types())}",
        )
    check_numbers(raw, where)
    family.refuse_options(with_rope_scaling(raw), where)
    fp8_block = fp8_block_size(raw, where)
    original = raw
    raw = {key: value for key, value in raw.items() if key != "quantization_config"}
    raw = with_rope_scaling(raw)
    if not isinstance(raw.get("rope_scaling"), dict | None):
        raise CheckpointError(f"rope_scaling is {raw['rope_scaling']!r}", where=where, remedy=_CHECK)
    try:
        shapes, extra = family.shapes(raw), family.extra_shapes(raw)
        # A copy, because transformers adds entries to nested sections.
        config = import_transformers().AutoConfig.for_model(
            **{
                **raw,
                "model_type": family.read_as or family.model_type,
                "rope_scaling": dict(raw.get("rope_scaling") or {}) or None,
            }
        )
        family.refuse_windows(config, where)
        heads = config.num_attention_heads
        eos = config.eos_token_id
        latent = family.latent_sizes(config)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        head_dim = latent.qk_rope_head_dim if latent else head_dim
        built = ModelConfig(
            family=family,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=config.num_key_value_heads or heads,
            head_dim=head_dim,
            rotary_dim=head_dim if latent else _rotary_dim(config, head_dim),
            vocab_size=config.vocab_size,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_theta,
            max_position_embeddings=config.max_position_embeddings,
            tie_word_embeddings=config.tie_word_embeddings,
            dtype=raw.get("dtype") or raw.get("torch_dtype") or "float32",
            shapes=shapes,
            extra_shapes=extra,
            raw=original,
            rope_scaling=getattr(config, "rope_scaling", None) or {},
            eos_token_ids=tuple(eos if isinstance(eos, list) else [] if eos is None else [eos]),
            latent=latent,
            experts=family.expert_sizes(config),
            delta=family.delta_sizes(config),
            num_nextn_predict_layers=raw.get("num_nextn_predict_layers") or 0,
            fp8_block=fp8_block,
        )
    except CheckpointError as error:
        raise CheckpointError(error.what, where=where, remedy=_CHECK) from error
    except ValidationError as error:
        details = [
            f"{'.'.join(map(str, e['loc']))}: {e['msg']} (it is {e['input']!r})" for e in error.errors()
        ]
        raise CheckpointError("; ".join(details), where=where, remedy=_CHECK) from error
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"not a valid config: {error}", where=where, remedy=_CHECK) from error
    _check_heads(built, "head_dim" in raw, where)
    _check_experts(built, where)
    # Refuses an unknown scaling variant now, and not at the first layer.
    rotary_tables(built, 0, 1)
    return built


def _rotary_dim(config: Any, head_dim: int) -> int:
    """Channels of a head that are rotated, as transformers 4.57.1 rounds them (`modeling_rope_utils.py`).

    Raises:
        CheckpointError: the share of them is no number, or the channels do not make pairs.
    """
    factor = getattr(config, "partial_rotary_factor", None)
    factor = 1 if factor is None else factor
    dim = int(head_dim * factor) if isinstance(factor, int | float) and 0 < factor <= 1 else 0
    if dim < 1 or (dim % 2 and dim != head_dim):
        raise CheckpointError(
            f"partial_rotary_factor is {factor!r}, a share of head_dim {head_dim} that is an even number of "
            "channels is expected"
        )
    return dim


def _check_heads(config: ModelConfig, explicit_head_dim: bool, where: Where) -> None:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size = config.hidden_size
    if config.latent is not None:
        wrong = config.head_dim % 2 or heads != kv_heads
    else:
        wrong = heads % kv_heads or config.head_dim % 2 or (size % heads and not explicit_head_dim)
    if wrong:
        raise CheckpointError(
            f"{heads} attention heads do not go with hidden_size {size}, "
            f"head_dim {config.head_dim} and {kv_heads} key-value heads",
            where=where,
            remedy=_CHECK,
        )


def _check_experts(config: ModelConfig, where: Where) -> None:
    experts = config.experts
    if experts is None:
        return
    count, groups = experts.count, experts.groups
    if count % groups or (groups > 1 and count // groups < experts.group_score):
        raise ModelError(
            f"{count} experts do not divide into {groups} groups of at least {experts.group_score}",
            where=where,
            remedy=_CHECK,
        )
    if experts.groups_per_token > groups:
        raise ModelError(
            f"{experts.groups_per_token} groups of experts a token are asked for (topk_group), "
            f"there are {groups} (n_group)",
            where=where,
            remedy=_CHECK,
        )
    available = count // groups * experts.groups_per_token
    if experts.per_token > available:
        raise ModelError(
            f"{experts.per_token} experts a token are asked for (num_experts_per_tok), "
            f"the router can choose among {available}",
            where=where,
            remedy=_CHECK,
        )


def fp8_block_size(raw: Mapping[str, Any], where: Where) -> tuple[int, int] | None:
    """Rows and columns of a block of FP8 weights, the one quantization that can be started from.

    Raises:
        ModelError: the weights are quantized in another way.
    """
    section = raw.get("quantization_config")
    if not section or (isinstance(section, dict) and section.get("quant_method") in _FINISHED):
        return None
    block = section.get("weight_block_size") if isinstance(section, dict) else None
    if (
        not isinstance(section, dict)
        or section.get("quant_method") != "fp8"
        or section.get("fmt", "e4m3") != "e4m3"
        or not isinstance(block, list)
        or len(block) != 2
        or any(type(size) is not int or size <= 0 for size in block)
    ):
        raise ModelError(
            f"quantization_config = {section!r} is not supported",
            where=where,
            remedy="start from the unquantized checkpoint, or from one with FP8 weights in blocks",
        )
    return block[0], block[1]
