"""Small folders, planned and streamed without a model: DeepSeek-V3, Qwen3-MoE or any other family."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from msquant.checkpoint.weights import CacheScale, FloatLinear, Linear, QuantizedLinear, with_cache
from msquant.checkpoint.writer import write_json
from msquant.families import expected_shapes, extra_shapes
from msquant.formats.folder_plan import FolderPlan, plan_folder
from msquant.formats.folder_stream import FolderStream, GroupWriter
from msquant.formats.golden_stick.layout import variant_of
from msquant.formats.registry import FormatName
from msquant.schemes import FLOAT, W4A8_DYNAMIC, W8A8, W8A8_DYNAMIC, Scheme

DEEPSEEK: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "n_routed_experts": 3,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "vocab_size": 20,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}

QWEN: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "num_experts": 3,
    "vocab_size": 20,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

_FLOAT_SUFFIXES = ("kv_b_proj", "mlp.gate", "lm_head", "embed_tokens", "norm", "eh_proj", ".head")


def groups_of(config: Mapping[str, Any]) -> list[dict[str, tuple[int, ...]]]:
    """The shapes of a model's tensors: one mapping a layer, prediction layers too, and one for the rest."""
    shapes = {**(expected_shapes(dict(config)) or {}), **extra_shapes(dict(config))}
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    ends: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        (layers.setdefault(parts[2], {}) if parts[1] == "layers" else ends)[name] = shape
    return [*layers.values(), ends]


def schemes_of(config: Mapping[str, Any]) -> dict[str, Scheme]:
    """DeepSeek's policy: attention static, feed-forward per token, the rest and prediction layers float.

    Static throughout where the backend knows nothing else.
    """
    schemes: dict[str, Scheme] = {}
    feed_forward: Scheme = W8A8_DYNAMIC if variant_of(config) == "mindformers" else W8A8
    for group in groups_of(config):
        for name, shape in group.items():
            module, _, part = name.rpartition(".")
            if part != "weight" or len(shape) != 2 or module.endswith(_FLOAT_SUFFIXES):
                continue
            predicts = int(module.split(".")[2]) >= config["num_hidden_layers"]
            schemes[module] = FLOAT if predicts else feed_forward if ".mlp." in module else W8A8
    return schemes


def four_bit_experts(config: Mapping[str, Any], scheme: Scheme = W4A8_DYNAMIC) -> dict[str, Scheme]:
    """Routed experts in int4, all else as ever."""
    schemes = schemes_of(config)
    own = f".layers.{config['num_hidden_layers']}."
    experts = [module for module in schemes if ".experts." in module and own not in module]
    return schemes | dict.fromkeys(experts, scheme)


def random_linear(module: str, shape: tuple[int, ...], scheme: Scheme, *, bias: bool = False) -> Linear:
    """A layer, the same for the same name; layers that read one input have one input scale."""
    rng = np.random.default_rng(sum(map(ord, module)))
    if scheme.cache is not None:
        latent = module.endswith("kv_a_proj_with_mqa")
        scales = rng.uniform(1e-3, 1, 1 if latent else shape[0]).astype(np.float32)
        queries = rng.uniform(1e-3, 1, DEEPSEEK["num_attention_heads"]).astype(np.float32) if latent else None
        keys = module.endswith("k_proj")
        offset = rng.integers(-300, 300, shape[0]).astype(np.float32) if keys else None
        return with_cache(
            random_linear(module, shape, scheme.without_cache, bias=bias),
            CacheScale.of(scales, queries, offset),
        )
    stored_bias = rng.normal(size=shape[0]).astype(np.float32) if bias else None
    if scheme == FLOAT:
        return FloatLinear(rng.normal(size=shape).astype(np.float32), stored_bias)
    quant = scheme.weights
    assert quant is not None
    weight = rng.integers(quant.low, quant.high + 1, shape, dtype=np.int8)
    grouped = () if quant.group_size is None else (shape[1] // quant.group_size,)
    scales = rng.uniform(1e-4, 1e-2, (shape[0], *grouped)).astype(np.float32)
    if scheme != W8A8:
        # Servers keep these in the model's dtype.
        scales = scales.astype(ml_dtypes.bfloat16).astype(np.float32)
    if not scheme.is_static:
        return QuantizedLinear(weight, scales, scheme, stored_bias)
    own = module.endswith(("o_proj", "b_proj"))
    scale, offset = np.full(1, 0.03 if own else 0.07, np.float32), np.full(1, 5 if own else -3, np.int32)
    return QuantizedLinear(weight, scales, scheme, stored_bias, scale, offset)


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A floating-point tensor that bfloat16 holds exactly, the same for the same name."""
    rng = np.random.default_rng(sum(map(ord, name)))
    return rng.integers(-100, 100, shape).astype(np.float32) / 16


def write_group(writer: GroupWriter, shapes: Mapping[str, tuple[int, ...]], plan: FolderPlan) -> None:
    """Write all of a group's tensors."""
    for name, shape in shapes.items():
        module, _, part = name.rpartition(".")
        if module in plan.linears:
            if part == "weight":
                bias = f"{module}.bias" in shapes
                writer.linear(module, random_linear(module, shape, plan.linears[module], bias=bias))
        else:
            writer.tensor(name, random_tensor(name, shape))


def write_source(folder: Path, config: Mapping[str, Any]) -> Path:
    """The files of a source that are not weights."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", dict(config))
    write_json(folder / "tokenizer.json", {"version": "1.0"})
    return folder


def write_experts(
    folder: Path,
    config: Mapping[str, Any],
    *,
    schemes: Mapping[str, Scheme] | None = None,
    max_shard_bytes: int = 10**9,
    format_name: FormatName = "golden-stick",
) -> FolderPlan:
    """Write a complete folder for a config; its source lies beside it."""
    groups = groups_of(config)
    schemes = schemes_of(config) if schemes is None else schemes
    plan = plan_folder(groups, schemes, config, config["torch_dtype"], max_shard_bytes, format_name)
    folder.mkdir(parents=True)
    stream = FolderStream(folder, plan)
    for index, shapes in enumerate(groups):
        with stream.group(index) as writer:
            write_group(writer, shapes, plan)
    stream.finish(write_source(folder.with_name(folder.name + "-source"), config), {"msquant": "0"})
    return plan
