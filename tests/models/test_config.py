"""Reading `config.json`."""

import json
from pathlib import Path
from typing import Any

import pytest

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.errors import CheckpointError, ModelError, MsquantError
from msquant.families import find_family, model_types
from msquant.models.config import ModelConfig
from msquant.models.config_json import read_config
from tests.fixtures.tiny_model import write_tiny_llama
from tests.models.folders import with_config

MINIMAL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}


def read(folder: Path, **settings: Any) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(MINIMAL | settings))
    return read_config(folder)


def test_what_the_file_says_is_read(tiny_llama: Path) -> None:
    config = read_config(tiny_llama)
    assert config.family is find_family("llama")
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (64, 128, 2)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 16)
    assert (config.vocab_size, config.max_position_embeddings, config.dtype) == (512, 256, "float32")
    assert config.tie_word_embeddings is True
    assert config.rms_norm_eps == 1e-5


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert config.num_key_value_heads == config.num_attention_heads == 4
    assert config.head_dim == 16
    assert (config.rope_theta, config.rope_scaling, config.rms_norm_eps) == (10000.0, {}, 1e-6)
    assert config.tie_word_embeddings is False
    assert config.end_names == ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    assert not any(name.endswith(".bias") for name in config.shapes)
    assert (config.max_position_embeddings, config.dtype, config.eos_token_ids) == (2048, "float32", (2,))


@pytest.mark.parametrize(("stored", "expected"), [(7, (7,)), ([7, 9], (7, 9)), (None, ())])
def test_end_tokens_may_be_one_many_or_none(stored: Any, expected: tuple[int, ...], tmp_path: Path) -> None:
    assert read(tmp_path, eos_token_id=stored).eos_token_ids == expected


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_storage_dtype_has_two_names(key: str, tmp_path: Path) -> None:
    assert read(tmp_path, **{key: "bfloat16"}).dtype == "bfloat16"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"tie_word_embeddings": False},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 32},
    ],
)
def test_the_shapes_are_those_that_transformers_writes(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path, **changes)
    config, checkpoint = read_config(folder), Checkpoint.open(folder)
    assert config.shapes == {name: checkpoint.shape(name) for name in checkpoint.names()}


def test_the_family_names_every_tensor_of_a_checkpoint(tiny_llama: Path) -> None:
    config, checkpoint = read_config(tiny_llama), Checkpoint.open(tiny_llama)
    expected, norms = set(config.end_names), ("input_layernorm", "post_attention_layernorm")
    for index in range(config.num_hidden_layers):
        layer = config.family.layer_name(index)
        expected |= {f"{layer}.{name}.weight" for name in (*norms, *config.linears(0))}
    assert set(checkpoint.names()) == expected


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_oss", None, 3])
def test_an_unsupported_architecture_names_the_supported_ones(
    model_type: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = with_config(tiny_llama, tmp_path / "model", model_type=model_type)
    with pytest.raises(ModelError, match=f"model_type {model_type!r} is not supported") as caught:
        read_config(folder)
    assert caught.value.where == str(folder / "config.json")
    assert caught.value.remedy is not None
    for name in model_types():
        assert name in caught.value.remedy


def test_a_quantized_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="quantization_config") as caught:
        read(tmp_path, quantization_config={"quant_method": "quip", "bits": 4})
    assert "start from the unquantized checkpoint" in str(caught.value.remedy)


@pytest.mark.parametrize(
    "changes", [{"hidden_act": "gelu"}, {"pretraining_tp": 2}, {"partial_rotary_factor": 0.5}]
)
def test_options_that_change_the_arithmetic_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    (option,) = changes
    with pytest.raises(ModelError, match=f"{option} = .* is not supported"):
        read(tmp_path, **changes)


@pytest.mark.parametrize(
    "changes",
    [{"num_attention_heads": 5}, {"num_attention_heads": 4, "num_key_value_heads": 3}, {"hidden_size": 66}],
)
def test_heads_that_contradict_each_other(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="attention heads do not go with hidden_size") as caught:
        read(tmp_path, **changes)
    assert caught.value.where == str(tmp_path / "config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "64"},
        {"hidden_size": None},
        {"rope_scaling": {"rope_type": "yarn"}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    ],
)
def test_values_that_make_no_sense(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a valid config|a positive integer is expected"):
        read(tmp_path, **changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "the file is missing"),
        (b"", "cannot be read as JSON"),
        (b'{"model_type": "llama",', "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[]", "holds a list where an object is expected"),
    ],
)
def test_a_file_that_cannot_be_read(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_config(tmp_path)
    assert caught.value.where == str(path)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"rope_theta": "fast"}, "rope_theta"),
        ({"rope_scaling": "x"}, "rope_scaling"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"dtype": "float8_e4m3fn", "torch_dtype": "float8_e4m3fn"}, "dtype"),
        ({"head_dim": 15}, "head_dim 15"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "two"}}, "two"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(
    tiny_llama: Path, tmp_path: Path, changes: dict[str, Any], word: str
) -> None:
    folder = with_config(tiny_llama, tmp_path / "model", **changes)
    with pytest.raises(MsquantError) as caught:
        read_config(folder)
    assert word in str(caught.value)
    assert "config.json" in str(caught.value)


def test_the_rope_section_of_transformers_5_is_read(tiny_llama: Path, tmp_path: Path) -> None:
    parameters = {"rope_theta": 500000.0, "rope_type": "linear", "factor": 4.0}
    folder = with_config(tiny_llama, tmp_path / "model", rope_parameters=parameters, rope_theta=None)
    config = read_config(folder)
    assert config.rope_theta == 500000.0
    assert config.rope_scaling["factor"] == 4.0
