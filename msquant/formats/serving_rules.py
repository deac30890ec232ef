"""What each server puts to a folder, one object a rule.

docs/servers.md says which of the servers' code was executed for it, tests/formats/test_serving_rules.py has a
case of each by its name.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from msquant.families import expected_shapes, find_family
from msquant.formats.ascend import four_bits
from msquant.formats.compressed_tensors.packed_kernels import int4_problems, kernel_problems
from msquant.formats.dtypes import model_dtype
from msquant.formats.fused_layers import experts_parent
from msquant.formats.golden_stick import int4_experts
from msquant.formats.golden_stick.layout import SECTION
from msquant.formats.golden_stick.mindformers_config import MODEL_TYPES, refused_keys, rope_problems
from msquant.formats.registry import find_format, format_names
from msquant.formats.servers import Parallelism, ServedModel, Server
from msquant.schemes import FLOAT

Reason = tuple[str, str, str]
"""The key, layer or format; what is wrong with it; what to do."""

Check = Callable[[Server, ServedModel, Parallelism], Iterator[Reason]]


@dataclass(frozen=True)
class Rule:
    """One thing that a server asks for.

    Attributes:
        name: of the rule, as tests and documentation have it.
        check: gives the reasons against serving a model.
        decides: where it speaks against a server, no other rule needs to.
    """

    name: str
    check: Check
    decides: bool = False


# vllm_mindspore/model_executor/models/registry.py of 0.5.1, `_NATIVE_MODELS`, as far as msquant knows them.
_NATIVE = ("llama", "qwen2", "qwen3", "qwen3_moe")
# What a backend has, but not quantized.
_FLOAT_IN = {
    "Native": {"qwen3_moe": "its quantized experts fail an assertion"},
    "MindFormers": {"qwen3_moe": "it builds Qwen3-MoE without quantization"},
}
# What the native backend of 0.6.0rc1 reorders itself.
_REORDERED = ("deepseek_v3",)
_OTHER_FORMATS = "msquant export FOLDER --format ascend, or compressed-tensors; of quantize: --format"
_FUSED_ATTENTION = ("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.self_attn\.(\w+)$")
# The attention whose caches are split, from which on there is one cache (`is_use_ringmla`).
_ONE_CACHE = 16
_VOCABULARY_PADDING = 64
# What DeepSeek-V3 sums of each group's scores to choose its groups.
_GROUP_BEST = 2


def _is_mindformers(server: Server) -> bool:
    return server.backend == "MindFormers"


def _format(server: Server, model: ServedModel, parallelism: Parallelism) -> Iterator[Reason]:
    if find_format(model.format).server != server.name:
        wanted = next(name for name in format_names() if find_format(name).server == server.name)
        yield (
            model.format,
            f"is in the {model.format} format, which {server.name} cannot read",
            f"msquant export FOLDER --format {wanted}",
        )


def _rope_rows(server: Server, model: ServedModel, parallelism: Parallelism) -> Iterator[Reason]:
    if server.version == "0.6.0rc1" and model.model_type in _REORDERED and model.variant == "mindformers":
        yield (
            "self_attn.q_b_proj",
            "has its rotary rows in MindFormers' order, and the native DeepSeek-V3 reorders them once more",
            "serve it with vllm-mindspore 0.5.1 and MindFormers",
        )


def _backend(server: Server, model: ServedModel, parallelism: Parallelism) -> Iterator[Reason]:
    if server.backend and model.variant != server.backend.lower():
        yield (
            "VLLM_MS_MODEL_BACKEND",
            f"{server.backend} is not the backend that the folder is written for, which is {model.variant}",
            "leave VLLM_MS_MODEL_BACKEND and model_backend to msquant",
        )


def _architecture(server: Server, model: ServedModel, parallelism: Parallelism) -> Iterator[Reason]:
    kind = model.model_type
    if server.backend == "Native" and server.version == "0.5.1" and kind not in _NATIVE:
        yield (
            "model_type",
            f"{kind} is not in its registry of models, {', '.join(_NATIVE)} are",
            _OTHER_FORMATS,
        )
    elif problem := _FLOAT_IN.get(server.backend, {}).get(kind):
        yield "model_type", problem, _OTHER_FORMATS
    elif server.name == "vllm-ascend" and (family := find_family(kind)) and family.names.gate_up:
        parts, whole = f"{family.names.gate} and {family.names.up}", family.names.gate_up
        yield (
            "model_type",
            f"vLLM's {kind} asks for a description of {parts}, which are one tensor, {whole}, in this model",
            "msquant export FOLDER --format compressed-tensors; of quantize: --format",
        )
    elif _is_mindformers(server) and kind not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        yield "model_type", f"it has no quantized {kind}, of msquant's only {known}", _OTHER_FORMATS
    elif _is_mindformers(server) and model.config.get("q_lora_rank", 0) is None:
        yield "q_lora_rank", "is null, and it does not load the q_proj of DeepSeek-V3", _OTHER_FORMATS


def _config_keys(server: Server, model: ServedModel, parallelism: Parallelism) -> Iterator[Reason]:
    keys = refused_keys(model.config, server.backend_version) if _is_mindformers(server) else []
    if keys:
        renamed = ", and call dtype torch_dtype" if "dtype" in keys else ""
        yield (
            f"config.json: {', '.join(keys)}",
            "it refuses keys that it does not know",
            f"remove them from config.json: they follow from the others{renamed}; or quantize again",
        )


def _rope_scaling(server: Server, model: ServedModel, parallelism: Parallelism) -> Iterator[Reason]:
    for key, problem in rope_problems(model.config) if _is_mindformers(server) else ():
        yield (
            f"config.json: {key}",
            problem,
            "quantize again, which writes YaRN with factor 1 where nothing is scaled; for other scalings "
            "than YaRN take another server: msquant export FOLDER --format ascend",
        )


def _parameter_dtype(server: Server, model: ServedModel, parallelism: Parallelism) -> Iterator[Reason]:
    if _is_mindformers(server) and (dtype := model_dtype(model.config)) == "float16":
        yield (
            f"config.json: {'dtype' if 'dtype' in model.config else 'torch_dtype'}",
            f"is {dtype}, and its parameters are in bfloat16 there, whatever --dtype is",
            "quantize a model in bfloat16",
        )


def _fused_section(server: Server, model: ServedModel, parallelism: Parallelism) -> Iterator[Reason]:
    if not _is_mindformers(server) or parallelism.tensor >= _ONE_CACHE:
        return
    if model.config.get("quantization_config") is None:
        yield (
            "config.json: quantization_config",
            "is missing, and below TP16 the attention built without it does not fit the engine's caches",
            f'put "quantization_config": {json.dumps(SECTION)} into config.json',
        )


def _fused_attention(server: Server, model: ServedModel, parallelism: Parallelism) -> Iterator[Reason]:
    if not _is_mindformers(server) or parallelism.tensor >= _ONE_CACHE:
        return
    layers = model.config.get("num_hidden_layers")
    for module, scheme in model.linears.items():
        found = _LAYER.match(module)
        if not found or found[2] not in _FUSED_ATTENTION or scheme.is_static:
            continue
        if not isinstance(layers, int) or int(found[1]) < layers:
            yield (
                module,
                f"is {scheme}: below TP16 its fused attention takes {', '.join(_FUSED_ATTENTION)} "
                "with static activations alone",
                "serve it with tensor_parallel_size 16, or quantize these layers static: leave them out of "
                "skip and dynamic",
            )
            return


def _is_latent(model: ServedModel) -> bool:
    family = find_family(model.model_type)
    return family is not None and family.attention == "latent"


def _value_heads(server: Server, model: ServedModel, parallelism: Parallelism) -> Iterator[Reason]:
    value, key = model.config.get("v_head_dim"), model.config.get("qk_nope_head_dim")
    if _is_mindformers(server) and parallelism.tensor >= _ONE_CACHE and value != key:
        yield (
            "config.json: v_head_dim",
            f"is {value}, and the attention from TP16 on takes values as wide as qk_nope_head_dim, {key}",
            "serve it below tensor_parallel_size 16",
        )


def _expert_groups(server: Server, model: ServedModel, parallelism: Parallelism) -> Iterator[Reason]:
    groups, chosen, experts = (
        _whole(model.config.get(key)) for key in ("n_group", "topk_group", "num_experts_per_tok")
    )
    if not _is_mindformers(server) or not groups or not chosen or not experts:
        return
    problem = ""
    if experts % chosen:
        problem = f"is {experts}, which an assertion wants divided by topk_group, {chosen}"
    elif chosen < groups and experts != _GROUP_BEST * chosen:
        problem = (
            f"is {experts}: it ranks groups by their {experts // chosen} best experts, num_experts_per_tok / "
            f"topk_group, and the model by their {_GROUP_BEST} best"
        )
    if problem:
        yield "config.json: num_experts_per_tok", problem, _OTHER_FORMATS


def _whole(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def _shared_out(
    server: Server, model: ServedModel, parallelism: Parallelism
) -> Iterator[tuple[str, int, int]]:
    """What is shared out evenly: the key of `config.json`, its value, and by how many."""
    config, tensor = model.config, parallelism.tensor
    yield "num_attention_heads", config.get("num_attention_heads", 0), tensor
    yield "intermediate_size", config.get("intermediate_size", 0), tensor
    vocabulary = _whole(config.get("vocab_size"))
    if vocabulary and not _is_mindformers(server):
        vocabulary += -vocabulary % _VOCABULARY_PADDING
    yield "vocab_size", vocabulary or 0, tensor
    inner = _whole(config.get("moe_intermediate_size"))
    family = find_family(model.model_type)
    if inner and family and family.expert_count:
        count = family.expert_count
        whole = parallelism.expert or 1
        yield count, config.get(count, 0), whole
        yield "moe_intermediate_size", inner, max(1, tensor * parallelism.data // whole)


def _divisible(server: Server, model: ServedModel, parallelism: Parallelism) -> Iterator[Reason]:
    for key, value, parts in _shared_out(server, model, parallelism):
        if (_whole(value) or 0) % parts:
            yield (
                f"config.json: {key}",
                f"is {value}, which its NPUs cannot share evenly",
                "choose a tensor_parallel_size that divides it",
            )
            return


def _key_value_heads(server: Server, model: ServedModel, parallelism: Parallelism) -> Iterator[Reason]:
    heads = _whole(model.config.get("num_key_value_heads"))
    if heads is None or _is_latent(model):
        return
    # Where there are more NPUs than heads, each head is held by several.
    more, fewer = max(heads, parallelism.tensor), min(heads, parallelism.tensor)
    if more % fewer:
        yield (
            "config.json: num_key_value_heads",
            f"is {heads}, which its NPUs neither share nor repeat evenly",
            "choose a tensor_parallel_size that divides it, or is a multiple of it",
        )


def _kernels(problems: Callable[..., Iterable[tuple[str, str]]], remedy: str) -> Check:
    """That vLLM has a kernel for every linear of a kind; the first without one is named."""

    def check(server: Server, model: ServedModel, parallelism: Parallelism) -> Iterator[Reason]:
        if server.name != "vllm":
            return
        for module, problem in problems(server.version, model.linears, model.config, parallelism.tensor):
            yield module, f"is {model.linears[module]}: {problem}", remedy
            return

    return check


_packed_weights = _kernels(
    kernel_problems,
    "choose other groups or a smaller tensor_parallel_size, or keep the layer in floating point",
)
_int4_kernels = _kernels(
    int4_problems,
    "serve it with vLLM on a CPU, choose other groups or a smaller tensor_parallel_size, or quantize it as "
    "W8A8_DYNAMIC",
)


def _int4_experts(server: Server, model: ServedModel, parallelism: Parallelism) -> Iterator[Reason]:
    found = [module for module, scheme in model.linears.items() if scheme.is_int4]
    # Experts that are shared out whole are not split.
    if _is_mindformers(server):
        processors = max(1, parallelism.tensor * parallelism.data // (parallelism.expert or 1))
    else:
        processors = 1 if parallelism.expert else parallelism.tensor
    if not found or processors == 1 or not (_is_mindformers(server) or server.name == "vllm-ascend"):
        return
    remedy = "choose a smaller tensor_parallel_size or smaller groups, or share the experts out whole: "
    remedy += "expert_parallel_size"
    if not _is_mindformers(server) and four_bits.MOST_PROCESSORS % processors:
        parts = f"the {four_bits.MOST_PROCESSORS} parts of scale_bias are not shared evenly"
        yield found[0], f"is {model.linears[found[0]]}: {parts} by {processors} NPUs", remedy
        return
    shapes = expected_shapes(dict(model.config)) or {}
    for module in found:
        scheme, shape = model.linears[module], shapes.get(f"{module}.weight")
        if shape is None:
            continue
        if _is_mindformers(server):
            size = scheme.group_size or int4_experts.row_groups(model.config)
            problem = int4_experts.shape_problem(module, shape, size, processors) if size else None
        else:
            problem = four_bits.shape_problem(module, shape, scheme, processors)
        if problem:
            yield module, f"is {scheme}: on each of {processors} NPUs {problem}", remedy
            return


def _int4_groups(server: Server, model: ServedModel, parallelism: Parallelism) -> Iterator[Reason]:
    if (server.name, server.version) != ("vllm-ascend", "main"):
        return
    for module, scheme in model.linears.items():
        if scheme.is_int4 and scheme.group_size is not None:
            yield (
                module,
                f"is {scheme}: since August 2026 it refuses int4 weights in groups",
                "quantize with one scale a row, W4A8_DYNAMIC, or serve it with a release: vllm-ascend 0.23.0",
            )
            return


def _expert_kernels(server: Server, model: ServedModel, parallelism: Parallelism) -> Iterator[Reason]:
    if server.name != "vllm":
        return
    experts = {scheme for module, scheme in model.linears.items() if experts_parent(module)}
    if server.version == "0.32.0" and _is_latent(model) and experts - {FLOAT}:
        yield (
            "mlp.experts",
            "its CPU build has no kernel for these experts (No Int8 MoE backend)",
            "serve it on GPUs, or keep the experts in floating point: skip: [mlp.experts]",
        )
    quantized = any(not scheme.is_float for scheme in model.linears.values())
    if server.version == "0.11.0" and experts == {FLOAT} and quantized:
        yield (
            "mlp.experts",
            "are in floating point, which it does not know in a quantized model",
            "use vLLM 0.32, or quantize the experts too",
        )


RULES = (
    Rule("format", _format, decides=True),
    Rule("rope-rows", _rope_rows, decides=True),
    Rule("backend", _backend, decides=True),
    Rule("architecture", _architecture, decides=True),
    Rule("config-keys", _config_keys),
    Rule("rope-scaling", _rope_scaling),
    Rule("parameter-dtype", _parameter_dtype),
    Rule("fused-section", _fused_section),
    Rule("fused-attention", _fused_attention),
    Rule("value-heads", _value_heads),
    Rule("expert-groups", _expert_groups),
    Rule("divisible", _divisible),
    Rule("key-value-heads", _key_value_heads),
    Rule("expert-kernels", _expert_kernels),
    Rule("packed-weights", _packed_weights),
    Rule("int4-kernels", _int4_kernels),
    Rule("int4-experts", _int4_experts),
    Rule("int4-groups", _int4_groups),
)
"""All of them, those that decide first."""
