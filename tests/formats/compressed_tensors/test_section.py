"""`quantization_config`: few patterns for many layers, and what of other tools' sections is read."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from msquant.errors import CheckpointError
from msquant.formats.compressed_tensors.section import make_section, patterns, read_section
from msquant.schemes import FLOAT, W8A8, W8A8_DYNAMIC, Scheme
from tests.formats.expert_folders import DEEPSEEK, QWEN, groups_of, schemes_of
from tests.formats.folders import CONFIG


def section_of(config: dict[str, Any], schemes: dict[str, Scheme]) -> dict[str, Any]:
    return make_section(schemes, [name for group in groups_of(config) for name in group])


def targets(section: dict[str, Any]) -> list[list[str]]:
    return [group["targets"] for group in section["config_groups"].values()]


def test_layers_that_are_all_alike_are_one_group() -> None:
    section = section_of(CONFIG, schemes_of(CONFIG))
    assert targets(section) == [["Linear"]]
    assert section["ignore"] == ["lm_head"]
    group = section["config_groups"]["group_0"]
    assert group["weights"] == {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "channel",
        "dynamic": False,
    }
    assert group["input_activations"] == {
        "num_bits": 8,
        "type": "int",
        "symmetric": False,
        "strategy": "tensor",
        "dynamic": False,
    }


def test_a_kind_of_layer_is_one_pattern() -> None:
    schemes = schemes_of(CONFIG)
    schemes.update({module: W8A8_DYNAMIC for module in schemes if module.endswith("down_proj")})
    section = section_of(CONFIG, schemes)
    assert targets(section) == [["Linear"], [r"re:.*\.mlp\.down_proj$"]]
    assert section["config_groups"]["group_1"]["input_activations"] == {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }


def test_single_layers_are_named_with_the_layer_they_are_fused_into() -> None:
    schemes = schemes_of(CONFIG)
    schemes.update({f"model.layers.1.mlp.{name}_proj": W8A8_DYNAMIC for name in ("gate", "up")})
    schemes["model.layers.0.mlp.down_proj"] = FLOAT
    section = section_of(CONFIG, schemes)
    names = [f"model.layers.1.mlp.{name}_proj" for name in ("gate", "gate_up", "up")]
    assert targets(section) == [["Linear"], names]
    assert section["ignore"] == ["lm_head", "model.layers.0.mlp.down_proj"]


@pytest.mark.parametrize(
    ("config", "attention", "ignored"),
    [
        (QWEN, "(k_proj|o_proj|q_proj|qkv_proj|v_proj)", ["lm_head", r"re:.*\.mlp\.gate$"]),
        (
            DEEPSEEK,
            "(fused_qkv_a_proj|kv_a_proj_with_mqa|o_proj|q_a_proj|q_b_proj)",
            [
                r"re:model\.layers\.2\..*",
                "lm_head",
                r"re:.*\.mlp\.gate$",
                r"re:.*\.self_attn\.kv_b_proj$",
            ],
        ),
    ],
    ids=["qwen3-moe", "deepseek"],
)
def test_experts_are_the_group_of_all_linear_layers(
    config: dict[str, Any], attention: str, ignored: list[str]
) -> None:
    schemes = dict.fromkeys(schemes_of(config), W8A8) | schemes_of(config)
    section = section_of(config, schemes)
    assert targets(section) == [["Linear"], [rf"re:.*\.self_attn\.{attention}$"]]
    assert section["config_groups"]["group_0"]["input_activations"]["dynamic"]
    assert section["ignore"] == ignored


@pytest.mark.parametrize("config", [CONFIG, QWEN, DEEPSEEK], ids=["llama", "qwen3-moe", "deepseek"])
@pytest.mark.parametrize("seed", range(8))
def test_every_layer_is_read_in_the_scheme_it_was_written_in(config: dict[str, Any], seed: int) -> None:
    choices: list[Scheme] = [FLOAT, W8A8, W8A8_DYNAMIC]
    modules = schemes_of(config)
    # Experts of a layer are alike, and so are layers that run as one; all else is as it comes.
    key = [module.replace("k_proj", "q_proj").replace("v_proj", "q_proj") for module in modules]
    key = [k.replace("up_proj", "gate_proj").replace("kv_a_proj_with_mqa", "q_a_proj") for k in key]
    key = [k.partition("experts.")[0] if ".experts." in k else k for k in key]
    rng = np.random.default_rng(seed)
    chosen = {k: choices[rng.integers(3)] for k in dict.fromkeys(key)}
    schemes = {module: chosen[k] for module, k in zip(modules, key, strict=True)}
    read = read_section({"quantization_config": section_of(config, schemes)})
    for module, scheme in schemes.items():
        group = read.group(module)
        assert (group.scheme if group else FLOAT) == scheme, module
    assert read.group("lm_head") is None


def test_a_pattern_names_no_other_layer_with_the_same_beginning() -> None:
    others = ["model.layers.1.mlp.down_proj", "model.layers.10.mlp.down_proj", "model.layers.11.mlp.up_proj"]
    found = patterns(["model.layers.11.mlp.down_proj"], others, fused=False)
    assert found == ["model.layers.11.mlp.down_proj"]
    layer = patterns(["model.layers.1.mlp.down_proj"], others[1:], fused=False)
    assert layer == [r"re:model\.layers\.1\..*"]


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def apply(section: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        for name in parents:
            section = section[name]
        section[last] = value

    return apply


GROUP = "config_groups/group_0"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", "pack-quantized", "group_0 is pack-quantized, which is read with weights alone"),
        ("format", "marlin-24", "its format is 'marlin-24', only int-quantized and pack-quantized are read"),
        ("format", "float-quantized", "float-quantized"),
        ("quantization_status", "frozen", "it is not compressed"),
        ("kv_cache_scheme", {"num_bits": 8, "type": "float"}, "kv_cache_scheme is there: a quantized cache"),
        ("transform_config", {"config_groups": {"u": {}}}, "rotated weights"),
        ("sparsity_config", {"format": "sparse-24-bitmask"}, "sparse weights"),
        ("config_groups", {}, "config_groups is missing or empty"),
        ("ignore", "lm_head", "ignore is not a list of names"),
        ("ignore", ["re:("], "is not a regular expression"),
        (f"{GROUP}/targets", None, "targets of group_0 is not a list"),
        (f"{GROUP}/weights", None, "quantizes weights or inputs alone"),
        (f"{GROUP}/input_activations", None, "quantizes weights or inputs alone"),
        (f"{GROUP}/output_activations", {"num_bits": 8}, "quantizes outputs"),
        (f"{GROUP}/format", "pack-quantized", "group_0 is pack-quantized, which is read with weights alone"),
        (f"{GROUP}/format", "float-quantized", "the format of group_0 is 'float-quantized'"),
        (f"{GROUP}/weights/num_bits", 4, "num_bits of the weights of group_0 is 4, only 8 is read"),
        (f"{GROUP}/weights/type", "float", "type of the weights of group_0 is 'float'"),
        (f"{GROUP}/weights/symmetric", False, "symmetric of the weights"),
        (f"{GROUP}/weights/strategy", "group", "strategy of the weights of group_0 is 'group'"),
        (f"{GROUP}/weights/group_size", 128, "group_size of the weights of group_0 is 128"),
        (f"{GROUP}/weights/actorder", "group", "actorder of the weights"),
        (f"{GROUP}/weights/block_structure", "128x128", "block_structure"),
        (f"{GROUP}/input_activations/num_bits", 4, "num_bits of the input_activations of group_0 is 4"),
        (f"{GROUP}/input_activations/type", "float", "type of the input_activations of group_0 is 'float'"),
        (f"{GROUP}/input_activations/strategy", "token", "only 'tensor' is read"),
        (
            f"{GROUP}/input_activations/dynamic",
            True,
            "symmetric of the input_activations of group_0 is False",
        ),
        (f"{GROUP}/input_activations/dynamic", "local", "is read"),
    ],
)
def test_what_cannot_be_computed_is_refused(path: str, value: Any, message: str) -> None:
    section = section_of(CONFIG, schemes_of(CONFIG))
    change(path, value)(section)
    with pytest.raises(CheckpointError) as caught:
        read_section({"quantization_config": section})
    assert message in str(caught.value)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("config", [{}, {"quantization_config": {"quant_method": "fp8"}}])
def test_a_config_without_the_section_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="quantization_config of compressed-tensors is missing"):
        read_section(config)


def test_the_older_names_of_section_and_format_are_read() -> None:
    section = {**section_of(CONFIG, schemes_of(CONFIG)), "format": "naive-quantized"}
    assert len(read_section({"compression_config": section}).groups) == 1


def test_the_section_of_llm_compressor_is_read() -> None:
    """As version 0.14 writes it: everything spelled out, what is not used as null."""
    unused = dict.fromkeys(("actorder", "block_structure", "group_size", "scale_dtype"))
    weights = {
        **{"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
        **{**unused, "observer": "memoryless_minmax", "observer_kwargs": {}, "zp_dtype": None},
    }
    inputs = {**weights, "symmetric": False, "strategy": "tensor", "zp_dtype": "torch.int8"}
    section = {
        **{"quant_method": "compressed-tensors", "format": "int-quantized", "version": "0.19.0"},
        **{"quantization_status": "compressed", "global_compression_ratio": None, "kv_cache_scheme": None},
        **{"ignore": ["lm_head"], "sparsity_config": {}, "transform_config": {}},
        "config_groups": {
            "group_0": {
                **{"targets": ["Linear"], "format": "int-quantized", "output_activations": None},
                **{"weights": weights, "input_activations": inputs},
            }
        },
    }
    group = read_section({"quantization_config": section}).group("model.layers.0.mlp.up_proj")
    assert group is not None
    assert group.scheme == W8A8
    assert not group.symmetric


def test_symmetric_static_activations_and_one_scale_a_weight_are_read() -> None:
    section = section_of(CONFIG, schemes_of(CONFIG))
    change(f"{GROUP}/input_activations/symmetric", True)(section)
    change(f"{GROUP}/weights/strategy", "tensor")(section)
    (group,) = read_section({"quantization_config": section}).groups
    assert group.symmetric
    assert not group.per_channel
