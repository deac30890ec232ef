"""A model's shape, read from its Hugging Face `config.json`."""

from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, PositiveFloat, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass

from msquant.checkpoint.decoder_layout import expected_shapes
from msquant.checkpoint.json_file import read_json
from msquant.errors import CheckpointError, ModelError
from msquant.models.families import EMBEDDING, FAMILIES, FINAL_NORM, HEAD, Family
from msquant.models.rope import rotary_tables


@dataclass(frozen=True, config=ConfigDict(strict=True))
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
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    vocab_size: PositiveInt
    rms_norm_eps: PositiveFloat
    rope_theta: PositiveFloat
    max_position_embeddings: PositiveInt
    tie_word_embeddings: bool
    dtype: Literal["bfloat16", "float16", "float32"]
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

    _refuse_options(raw, path)
    raw = _with_rope_of_transformers_4(raw)
    if not isinstance(raw.get("rope_scaling"), dict | None):
        raise CheckpointError(f"rope_scaling is {raw['rope_scaling']!r}", where=path, remedy=_CHECK)
    try:
        shapes = expected_shapes(raw) or {}
        config = AutoConfig.for_model(**raw)
        heads = config.num_attention_heads
        eos = config.eos_token_id
        built = ModelConfig(
            family=family,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab_size=config.vocab_size,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_theta,
            max_position_embeddings=config.max_position_embeddings,
            tie_word_embeddings=config.tie_word_embeddings,
            dtype=raw.get("dtype") or raw.get("torch_dtype") or "float32",
            shapes=shapes,
            rope_scaling=config.rope_scaling or {},
            eos_token_ids=tuple(eos if isinstance(eos, list) else [] if eos is None else [eos]),
        )
    except CheckpointError as error:
        raise CheckpointError(error.what, where=path, remedy=_CHECK) from error
    except ValidationError as error:
        details = [
            f"{'.'.join(map(str, e['loc']))}: {e['msg']} (it is {e['input']!r})" for e in error.errors()
        ]
        raise CheckpointError("; ".join(details), where=path, remedy=_CHECK) from error
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"not a valid config: {error}", where=path, remedy=_CHECK) from error
    _check_heads(built, "head_dim" in raw, path)
    return built


_CHECK = "check the file against the published one"


def _check_heads(config: ModelConfig, explicit_head_dim: bool, path: Path) -> None:
    heads, size = config.num_attention_heads, config.hidden_size
    if heads % config.num_key_value_heads or config.head_dim % 2 or (size % heads and not explicit_head_dim):
        raise CheckpointError(
            f"{heads} attention heads do not go with hidden_size {size}, "
            f"head_dim {config.head_dim} and {config.num_key_value_heads} key-value heads",
            where=path,
            remedy=_CHECK,
        )
    # Refuses an unknown scaling variant now, and not at the first layer.
    rotary_tables(config, 0, 1)


def _with_rope_of_transformers_4(raw: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 keeps the base and the scaling of the rotary embedding in one section."""
    parameters = raw.get("rope_parameters")
    if not isinstance(parameters, dict):
        return raw
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    plain = scaling.get("rope_type", "default") == "default"
    return {
        **raw,
        "rope_theta": parameters.get("rope_theta", raw.get("rope_theta")),
        "rope_scaling": None if plain else scaling,
    }


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
