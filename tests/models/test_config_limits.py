"""Numbers of `config.json` that no model has: refused before shapes are enumerated from them."""

from typing import Any

import pytest

from msquant.checkpoint.config_limits import MAX_ROUTED_EXPERTS, MAX_SIZE
from msquant.checkpoint.json_file import read_json
from msquant.errors import CheckpointError
from msquant.families import expected_shapes, find_family
from msquant.hub.published import configs_folder
from msquant.models.config_json import parse_config, read_config
from tests.fixtures.fuzzing import documents, fuzz, within_limits

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "eos_token_id": [1, 2],
}
EXPERTS = {
    **LLAMA,
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 8,
}
DEEPSEEK = read_json(configs_folder() / "models" / "deepseek-r1.json") | {
    "num_hidden_layers": 4,
    "n_routed_experts": 16,
}


@pytest.mark.parametrize(
    ("key", "value", "limit"),
    [
        ("num_hidden_layers", 10**9, 1_000),
        ("num_experts", 10**9, 4_096),
        ("num_labels", 10**9, 100_000),
        ("hidden_size", 2**40, MAX_SIZE),
        ("vocab_size", 2**40, MAX_SIZE),
        ("head_dim", 2**40, 2**16),
        ("something_else", 10**99, 2**53),
    ],
)
def test_a_number_beyond_its_limit_is_refused_by_it(key: str, value: int, limit: int) -> None:
    config = EXPERTS | {key: value}
    with within_limits(), pytest.raises(CheckpointError, match=f"{key} is .*at most {limit} is read"):
        parse_config(config)


def test_experts_are_counted_over_all_layers() -> None:
    config = EXPERTS | {"num_hidden_layers": 1_000, "num_experts": 4_096}
    for read in (parse_config, expected_shapes):
        with (
            within_limits(),
            pytest.raises(CheckpointError, match=f"is more than {MAX_ROUTED_EXPERTS} experts"),
        ):
            read(config)


def test_a_list_of_layers_is_no_longer_than_they_are_many() -> None:
    config = EXPERTS | {"mlp_only_layers": list(range(3))}
    with pytest.raises(CheckpointError, match=r"mlp_only_layers is .*at most 2 numbers"):
        parse_config(config)


@pytest.mark.parametrize("path", sorted((configs_folder() / "models").glob("*.json")), ids=lambda p: p.stem)
def test_published_models_are_within_the_limits(path: Any) -> None:
    config = read_json(path)
    # Models without a family have no names that msquant knows: they are quantized without calibration.
    assert bool(expected_shapes(config)) == (find_family(config["model_type"]) is not None)


@pytest.fixture(scope="module")
def imported() -> None:
    """What parsing imports is there: transformers takes more than the limits, once, for any config."""
    for config in (LLAMA, EXPERTS, DEEPSEEK):
        parse_config(config)


@fuzz(documents(LLAMA) | documents(EXPERTS) | documents(DEEPSEEK))
def test_a_config(imported: None, tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "config.json").write_bytes(data)
    with within_limits():
        read_config(folder)
