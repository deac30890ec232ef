"""The published configs: the whole tensor list of each, against transformers and the published counts.

No weights are needed: transformers builds its own model on torch's meta device.
"""

import re
from collections import defaultdict
from math import ceil, prod
from typing import Any

import pytest

from msquant.families import expected_shapes, extra_shapes, find_family
from msquant.formats.registry import find_format
from msquant.hub.published import (
    HUB_IDS,
    configs_folder,
    is_published_in_fp8,
    published_bytes,
    published_config,
    published_name,
)
from msquant.models.config_json import parse_config
from msquant.recipe.recipe import find_recipe, shipped_recipes
from msquant.schemes import FLOAT, W8A8, W8A8_DYNAMIC
from tests.fixtures.tiny_families import transformers_config

Shapes = dict[str, tuple[int, ...]]

# Parameters of the published weights, multi-token-prediction layers left out.
PARAMETERS = {
    "deepseek-r1": 671_026_419_200,
    "deepseek-r1-0528": 671_026_419_200,
    "deepseek-r1-distill-llama-70b": 70_553_706_496,
    "deepseek-r1-distill-llama-8b": 8_030_261_248,
    "deepseek-r1-distill-qwen-1.5b": 1_777_088_000,
    "deepseek-r1-distill-qwen-14b": 14_770_033_664,
    "deepseek-r1-distill-qwen-32b": 32_763_876_352,
    "deepseek-r1-distill-qwen-7b": 7_615_616_512,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v3": 671_026_419_200,
    "deepseek-v3-0324": 671_026_419_200,
    "deepseek-v3.1": 671_026_419_200,
    "deepseek-v3.1-terminus": 671_026_419_200,
    "deepseek-v3.2": 671_877_944_064,
    "deepseek-v3.2-exp": 671_877_944_064,
    "glm-4-32b-0414": 32_566_081_536,
    "glm-4-9b-0414": 9_400_279_040,
    "glm-4.5": 352_797_829_024,
    "glm-4.5-air": 106_852_251_264,
    "glm-4.6": 352_797_829_024,
    "glm-4.7": 352_797_829_024,
    "glm-5": 743_911_218_432,
    "kimi-k2-instruct": 1_026_408_232_448,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-8b-instruct": 8_030_261_248,
    "mistral-7b-instruct-v0.3": 7_248_023_552,
    "qwen2-7b": 7_615_616_512,
    "qwen2.5-0.5b-instruct": 494_032_768,
    "qwen2.5-7b-instruct": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-14b": 14_768_307_200,
    "qwen3-235b-a22b": 235_093_634_560,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-30b-a3b-instruct-2507": 30_532_122_624,
    "qwen3-coder-30b-a3b-instruct": 30_532_122_624,
    "qwen3-32b": 32_762_123_264,
    "qwen3-8b": 8_190_735_360,
    "qwq-32b": 32_763_876_352,
    "qwen3-next-80b-a3b-instruct": 79_674_391_296,
}
LARGE = [name for name in PARAMETERS if re.match("deepseek-(r1|v3)(?!-distill|.2)", name)]

# What the hub counts of the published weights, multi-token-prediction layers and scales of FP8 included.
STORED = {
    "deepseek-v3.2": 685_396_921_376,
    "glm-4.5": 358_337_791_296,
    "glm-4.5-air": 110_468_824_832,
    "glm-4.6": 356_785_898_816,
    "glm-5": 753_864_139_008,
}
# In these the last layer has the embedding and the output head of the model.
SHARING = ("glm-4.6", "glm-5")
# Models that msquant has no family for: test_published_table.py has their tensors.
WITHOUT_FAMILY = ("minimax-m2", "qwen2-vl-7b-instruct", "qwen3-vl-8b-instruct")

# Of the checkpoint of DeepSeek-V3 and R1: the entries of its index, and its parameters with the FP8 scales.
R1_TENSORS = 91_991
R1_STORED = 684_531_386_000


def config_of(name: str) -> dict[str, Any]:
    config = published_config(name)
    assert config is not None
    return config


def shapes_of(config: dict[str, Any]) -> Shapes:
    shapes = expected_shapes(config)
    assert shapes is not None
    return shapes


def by_layer(shapes: Shapes) -> dict[int, Shapes]:
    """The tensors of each decoder layer, without its prefix."""
    layers: dict[int, Shapes] = defaultdict(dict)
    for name, shape in shapes.items():
        if name.startswith("model.layers."):
            _, _, index, rest = name.split(".", 3)
            layers[int(index)][rest] = shape
    return layers


def shapes_in_transformers(config: dict[str, Any]) -> Shapes:
    """Names and shapes of what transformers would load, of a model that takes no memory."""
    import torch
    from transformers import AutoModelForCausalLM

    raw = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(transformers_config(raw))
    tied = ("lm_head.weight",) if config["tie_word_embeddings"] else ()
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def compared_layers(config: dict[str, Any]) -> int:
    """How many layers show every kind: a mixture of experts has two, and many modules in each."""
    experts = "num_experts" in config or "n_routed_experts" in config
    if experts:
        return config.get("first_k_dense_replace", 0) + period_of(config)
    return config["num_hidden_layers"]


def period_of(config: dict[str, Any]) -> int:
    """After how many layers they are the same again."""
    return config.get("full_attention_interval", 1)


def fp8_matrices(shapes: Shapes) -> Shapes:
    """What DeepSeek stores in FP8 blocks: all matrices but embeddings, heads, routers and the MTP input."""
    plain = ("embed_tokens.weight", "head.weight", "mlp.gate.weight", "eh_proj.weight")
    return {name: shape for name, shape in shapes.items() if len(shape) == 2 and not name.endswith(plain)}


def test_every_recipe_but_the_bundled_one_has_its_published_config() -> None:
    files = {path.stem for path in (configs_folder() / "models").glob("*.json")}
    models = {published_name(find_recipe(name).model) for name in shipped_recipes()}
    assert files == set(HUB_IDS) == {*PARAMETERS, *WITHOUT_FAMILY} == models - {None}


@pytest.mark.parametrize("name", WITHOUT_FAMILY)
def test_a_model_without_a_family_has_a_recipe_without_calibration(name: str) -> None:
    recipe, config = find_recipe(name), config_of(name)
    assert find_family(config["model_type"]) is None
    assert recipe.calibration.is_none
    assert recipe.model_free.keep_float
    assert published_bytes(name) is None


@pytest.mark.parametrize("name", HUB_IDS)
def test_a_config_is_found_by_name_and_by_hub_id(name: str) -> None:
    hub_id = HUB_IDS[name]
    assert find_recipe(name).model == hub_id
    assert published_name(hub_id) == published_name(name.upper()) == name
    assert published_config(hub_id) == published_config(name) == config_of(name)


@pytest.mark.parametrize(
    "model", ["", "smollm2-135m", "someone-else/DeepSeek-R1", "DeepSeek", "../deepseek-r1"]
)
def test_there_is_no_config_for_anything_else(model: str) -> None:
    assert published_config(model) is None
    assert published_bytes(model) is None


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_parameters_are_as_many_as_published(name: str) -> None:
    assert sum(map(prod, shapes_of(config_of(name)).values())) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_transformers_has_the_same_names_and_shapes(name: str) -> None:
    config = config_of(name)
    short = config | {"num_hidden_layers": compared_layers(config)}
    found = shapes_in_transformers(short)
    # What transformers 4.57.1 does not know; test_shapes.py has it.
    assert {key: shape for key, shape in shapes_of(short).items() if ".indexer." not in key} == found


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_layers_that_were_not_compared_repeat_the_last_that_was(name: str) -> None:
    config = config_of(name)
    shapes = shapes_of(config)
    layers, last, period = by_layer(shapes), compared_layers(config) - 1, period_of(config)
    assert list(layers) == list(range(config["num_hidden_layers"]))
    assert all(layer == layers[index - period] for index, layer in layers.items() if index > last)
    outside = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    outside -= {"lm_head.weight"} if config["tie_word_embeddings"] else set()
    assert len(shapes) == sum(map(len, layers.values())) + len(outside)
    assert outside <= set(shapes)


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_config_is_accepted(name: str) -> None:
    config, raw = parse_config(config_of(name)), config_of(name)
    assert (config.hidden_size, config.num_hidden_layers) == (raw["hidden_size"], raw["num_hidden_layers"])
    assert config.dtype == "bfloat16"
    assert config.shapes == shapes_of(raw)


@pytest.mark.parametrize("name", LARGE)
def test_the_fp8_checkpoint_is_counted_to_the_last_tensor_and_parameter(name: str) -> None:
    config = config_of(name)
    shapes = shapes_of(config) | extra_shapes(config)
    rows, columns = config["quantization_config"]["weight_block_size"]
    scales = {
        f"{tensor}_scale_inv": (ceil(shape[0] / rows), ceil(shape[1] / columns))
        for tensor, shape in fp8_matrices(shapes).items()
    }
    stored = shapes | scales
    assert len(stored) == R1_TENSORS
    assert sum(map(prod, stored.values())) == R1_STORED
    assert stored["model.layers.60.mlp.experts.255.down_proj.weight_scale_inv"] == (56, 16)
    assert stored["model.layers.61.eh_proj.weight"] == (7168, 14336)
    assert stored["model.layers.61.shared_head.head.weight"] == (129280, 7168)


@pytest.mark.parametrize("name", STORED)
def test_the_stored_parameters_are_as_many_as_published(name: str) -> None:
    config = config_of(name)
    shapes = shapes_of(config) | extra_shapes(config)
    ends = ("shared_head.head.weight", ".embed_tokens.weight") if name in SHARING else ()
    first = f"model.layers.{config['num_hidden_layers']}."
    shapes = {key: s for key, s in shapes.items() if not (key.startswith(first) and key.endswith(ends))}
    stored = sum(map(prod, shapes.values()))
    if block := config.get("quantization_config", {}).get("weight_block_size"):
        for key, shape in shapes.items():
            if is_published_in_fp8(key):
                stored += prod(ceil(size / step) for size, step in zip(shape, block, strict=True))
    assert stored == STORED[name]


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [
        ("deepseek-r1", 688.6),
        ("deepseek-v3.2", 689.5),
        ("glm-4.5-air", 220.9),
        ("kimi-k2-instruct", 1029.2),
        ("qwen3-8b", 16.4),
        ("deepseek-r1-distill-llama-70b", 141.1),
    ],
)
def test_the_size_of_the_weights_is_about_right(name: str, gigabytes: float) -> None:
    assert published_bytes(name) == pytest.approx(gigabytes * 1e9, rel=2e-3)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_recipe_gives_every_matrix_the_scheme_it_says(name: str) -> None:
    recipe = find_recipe(name)
    policy, everywhere = recipe.quantization, all(find_format(form).per_token for form in recipe.formats)
    config = config_of(name)
    matrices = [
        tensor.removesuffix(".weight") for tensor, shape in shapes_of(config).items() if len(shape) == 2
    ]
    linears = [m for m in matrices if not m.endswith(("embed_tokens", "mlp.gate")) and ".indexer." not in m]
    experts = "num_experts" in config or "n_routed_experts" in config
    for linear in linears:
        if linear == "lm_head" or linear.endswith("kv_b_proj"):
            expected = FLOAT
        else:
            per_token = everywhere or (experts and ".mlp." in linear)
            expected = W8A8_DYNAMIC if per_token else W8A8
        assert policy.scheme(linear) == expected, linear
    for part, _ in policy.schemes[:-1]:
        # A rotation gives a model its own head where it shares the embedding's.
        shared = part == "lm_head" and config["tie_word_embeddings"]
        assert shared or any(part in linear for linear in linears), f"{part} names no linear of {name}"
