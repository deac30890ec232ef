"""A model's shape, read from its Hugging Face `config.json`."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msquant.errors import CheckpointError, ModelError
from msquant.models.families import FAMILIES, Family


@dataclass(frozen=True)
class ModelConfig:
    """What the decoder layers and the two ends of a model need to know; sizes are in elements.

    Attributes:
        family: the names and options that its architecture implies.
        rope_scaling: the `rope_scaling` section of `config.json`; empty for plain rotary embedding.
        dtype: storage dtype of the floating-point tensors: `bfloat16`, `float16` or `float32`.
        eos_token_ids: tokens that end a generation.
    """

    family: Family
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: str
    attention_bias: bool
    mlp_bias: bool
    rope_scaling: dict[str, Any] = field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()

    @property
    def query_size(self) -> int:
        """Output channels of `q_proj`."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Output channels of `k_proj`, and of `v_proj`."""
        return self.num_key_value_heads * self.head_dim

    def linear_shape(self, module: str) -> tuple[int, int]:
        """`(N, K)` of a decoder layer's linear, by its last name, for example `q_proj`."""
        return {
            "q_proj": (self.query_size, self.hidden_size),
            "k_proj": (self.key_value_size, self.hidden_size),
            "v_proj": (self.key_value_size, self.hidden_size),
            "o_proj": (self.hidden_size, self.query_size),
            "gate_proj": (self.intermediate_size, self.hidden_size),
            "up_proj": (self.intermediate_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.intermediate_size),
        }[module]

    def has_bias(self, module: str) -> bool:
        """Whether a decoder layer's linear carries a bias, by its last name."""
        if module in ("gate_proj", "up_proj", "down_proj"):
            return self.mlp_bias
        return self.attention_bias

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Read `folder/config.json`, with the defaults of transformers' own config class.

        Raises:
            CheckpointError: the file is missing, is not JSON or contradicts itself.
            ModelError: the architecture, or an option of it, is not supported.
        """
        path = Path(folder) / "config.json"
        raw = _read_json(path)
        family = FAMILIES.get(str(raw.get("model_type")))
        if family is None:
            raise ModelError(
                f"model_type {raw.get('model_type')!r} is not supported",
                where=path,
                remedy=f"use a model of one of these types: {', '.join(sorted(FAMILIES))}",
            )
        return _from_raw(raw, family, path)


def _from_raw(raw: dict[str, Any], family: Family, path: Path) -> ModelConfig:
    from transformers import AutoConfig

    try:
        config = AutoConfig.for_model(**raw)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"not a valid config: {error}", where=path) from error
    _refuse_options(raw, path)
    heads = config.num_attention_heads
    if heads % config.num_key_value_heads or (not raw.get("head_dim") and config.hidden_size % heads):
        raise CheckpointError(
            f"{heads} attention heads do not go with hidden_size {config.hidden_size} "
            f"and {config.num_key_value_heads} key-value heads",
            where=path,
            remedy="check the file against the published one",
        )
    rope_scaling = dict(config.rope_scaling or {})
    eos = config.eos_token_id
    return ModelConfig(
        family=family,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=config.vocab_size,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=float(config.rope_theta),
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        attention_bias=bool(getattr(config, "attention_bias", False)),
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        rope_scaling=rope_scaling,
        eos_token_ids=tuple(eos if isinstance(eos, list) else [] if eos is None else [eos]),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            "the file is missing", where=path, remedy="give a folder in the Hugging Face layout"
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"cannot be read as JSON: {error}", where=path) from error
    if not isinstance(raw, dict):
        raise CheckpointError("holds no JSON object", where=path)
    return raw


def _refuse_options(raw: dict[str, Any], path: Path) -> None:
    """Refuse what would silently change the arithmetic of the decoder layers."""
    unsupported = {
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
        "pretraining_tp": raw.get("pretraining_tp", 1) not in (None, 1),
        "quantization_config": bool(raw.get("quantization_config")),
        "partial_rotary_factor": raw.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0),
    }
    for option, refused in unsupported.items():
        if refused:
            raise ModelError(
                f"{option} = {raw[option]!r} is not supported",
                where=path,
                remedy="start from the unquantized checkpoint" if option == "quantization_config" else None,
            )
