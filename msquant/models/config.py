"""A model's shape, read from its Hugging Face `config.json`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msquant.checkpoint.decoder_layout import expected_shapes
from msquant.checkpoint.json_file import read_json
from msquant.errors import CheckpointError, ModelError
from msquant.models.families import EMBEDDING, FAMILIES, FINAL_NORM, HEAD, Family


@dataclass(frozen=True)
class ModelConfig:
    """What the decoder layers and the two ends of a model need to know; sizes are in elements.

    Attributes:
        family: the names and options that its architecture implies.
        shapes: of every tensor of the unquantized model, by name.
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
    shapes: dict[str, tuple[int, ...]]
    rope_scaling: dict[str, Any] = field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()

    @property
    def end_names(self) -> tuple[str, ...]:
        """The tensors outside of the decoder layers."""
        return tuple(name for name in (EMBEDDING, FINAL_NORM, HEAD) if name in self.shapes)

    @classmethod
    def from_folder(cls, folder: Path) -> "ModelConfig":
        """Read `folder/config.json`, with the defaults of transformers' own config class.

        Raises:
            CheckpointError: the file is missing, is not JSON or contradicts itself.
            ModelError: the architecture, or an option of it, is not supported.
        """
        path = Path(folder) / "config.json"
        raw = read_json(path)
        family = FAMILIES.get(str(raw.get("model_type")))
        if family is None:
            raise ModelError(
                f"model_type {raw.get('model_type')!r} is not supported",
                where=path,
                remedy=f"use a model of one of these types: {', '.join(sorted(FAMILIES))}",
            )
        return _from_raw(raw, family, path)


def check_shape(config: ModelConfig, name: str, shape: tuple[int, ...]) -> None:
    """Check a tensor that was read against `config.json`.

    Raises:
        CheckpointError: the shapes differ; names the tensor and both.
    """
    if shape != config.shapes[name]:
        raise CheckpointError(
            f"{name} has shape {list(shape)}, config.json says {list(config.shapes[name])}",
            remedy="use the config.json that belongs to these weights",
        )


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
        shapes=expected_shapes(raw) or {},
        rope_scaling=rope_scaling,
        eos_token_ids=tuple(eos if isinstance(eos, list) else [] if eos is None else [eos]),
    )


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
