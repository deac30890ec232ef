"""Every quantized layer of `ascend` folders, computed by vllm-ascend's own schemes on a CPU.

Run as `python -m tests.consumers.vllm_ascend_layers FOLDER...`, with `stand_ins` and an unpacked wheel of
vllm-ascend in PYTHONPATH. Prints a JSON object for each folder: what vllm-ascend takes each layer for, and
the relative RMS difference of its output to what the folder says.
"""

import vllm_ascend_on_cpu  # isort: skip  # the first, before anything of vllm-ascend
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from vllm_ascend.ops.fused_moe.moe_comm_method import AllGatherCommImpl
from vllm_ascend.quantization import modelslim_config
from vllm_ascend.quantization.methods import w4a8, w8a8_dynamic, w8a8_pdmix, w8a8_static
from vllm_ascend.quantization.methods.registry import get_scheme_class

from msquant.checkpoint.weights import QuantizedLinear, WeightSource
from msquant.flows.engines import open_prefill, open_weights
from msquant.formats.fused_layers import experts_parent
from tests.consumers.vllm_ascend_cache import cache_difference, difference
from tests.consumers.vllm_ascend_latent import latent_difference

assert w4a8, (w8a8_dynamic, w8a8_pdmix, w8a8_static)
TOKENS = 16
# vLLM's own class of a model names what it fuses; these are Llama's and Qwen2's.
_FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class Folder:
    """One folder, and what vllm-ascend makes of its description."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.dtype = getattr(torch, self.config.get("torch_dtype") or self.config["dtype"])
        self.source: WeightSource = open_weights(folder)
        self.prefill = open_prefill(folder)
        self.tensors: dict[str, torch.Tensor] = {}
        for shard in sorted(folder.glob("*.safetensors")):
            self.tensors |= load_file(shard)
        description = json.loads((folder / "quant_model_description.json").read_text())
        self.quantization = modelslim_config.AscendModelSlimConfig(description)
        self.fused = modelslim_config.get_packed_modules_mapping(self.config["model_type"]) or _FUSED

    def layers(self) -> dict[str, list[str]]:
        """The linear layers that vLLM builds, each with the modules it is made of; without routed experts."""
        layers: dict[str, list[str]] = {}
        for name, tensor in self.tensors.items():
            module = name.removesuffix(".weight")
            if module == name or tensor.ndim != 2 or ".layers." not in name or experts_parent(module):
                continue
            prefix, _, last = module.rpartition(".")
            whole = next(
                (key for key, parts in self.fused.items() if last in parts and key != "experts"), last
            )
            if last != "gate" and not last.endswith(("eh_proj", "head", "embed_tokens")):
                layers.setdefault(f"{prefix}.{whole}", []).append(module)
        return {layer: self._in_order(layer, modules) for layer, modules in layers.items()}

    def _in_order(self, layer: str, modules: list[str]) -> list[str]:
        """A fused layer's parts as vLLM lays them out."""
        parts = self.fused.get(layer.rpartition(".")[2])
        return sorted(modules, key=lambda name: parts.index(name.rpartition(".")[2])) if parts else modules

    def linear(self, module: str, prefill: bool = False) -> QuantizedLinear:
        """A quantized layer as msquant reads it; as prompts are read with it, where that differs."""
        found = (self.prefill if prefill and self.prefill else self.source).linear(module)
        assert isinstance(found, QuantizedLinear)
        return found

    def word(self, layer: str) -> str:
        """What vllm-ascend takes a layer for."""
        if self.quantization.is_layer_skipped_ascend(layer, self.fused):
            return "FLOAT"
        return modelslim_config.get_quant_type_for_layer(
            self.quantization.quant_description, layer, "linear", self.fused
        )

    def expert_word(self, parent: str) -> str:
        """What vllm-ascend takes the routed experts of a layer for."""
        description = self.quantization.quant_description
        return modelslim_config.get_quant_type_for_layer(description, parent, "moe", self.fused)


def by_definition(linear: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
    """The layer's output in float64: per token, or static with the reciprocal that is held, if any."""
    values = x.double()
    integers, scales = torch.from_numpy(linear.weight).double(), torch.from_numpy(linear.weight_scale)
    scales = scales.double().reshape(len(integers), -1)
    weight = integers * scales.repeat_interleave(integers.shape[1] // scales.shape[1], 1)
    if linear.input_scale is None or linear.input_offset is None:
        scale = (x.float().abs().amax(-1, keepdim=True) / 127).double()
        quantized = torch.nan_to_num(torch.round((x.float() / scale.float()).double())) * scale
    else:
        step, zero = float(linear.input_scale.ravel()[0]), int(linear.input_offset.ravel()[0])
        kept = linear.input_reciprocal
        scaled = values / step if kept is None else values * float(kept.ravel()[0])
        quantized = (torch.clamp(torch.round(scaled + zero), -128, 127) - zero) * step
    made = quantized @ weight.T
    return made if linear.bias is None else made + torch.from_numpy(linear.bias).double()


def linear_difference(folder: Folder, word: str, modules: list[str], takes_cache: bool = True) -> float:
    """Make the layer as vLLM does, fill it, and compare its output with its parts' definition.

    Args:
        folder: of the layer.
        word: of its description.
        modules: that it is made of.
        takes_cache: whether the engine takes another one's cache, as one that writes answers does.
    """
    vllm_ascend_on_cpu.CONFIG.kv_transfer_config = SimpleNamespace(is_kv_consumer=takes_cache)
    scheme = get_scheme_class(word, "linear")()
    rows = [len(folder.tensors[f"{module}.weight"]) for module in modules]
    columns = folder.tensors[f"{modules[0]}.weight"].shape[1]
    layer = torch.nn.Module()
    layer.params_dtype = folder.dtype  # type: ignore[assignment]
    parameters = (
        scheme.get_weight(columns, sum(rows), folder.dtype)
        | scheme.get_pertensor_param(folder.dtype)
        | scheme.get_perchannel_param(sum(rows), folder.dtype)
    )
    for name, parameter in parameters.items():
        parts = [parameter] * len(rows) if parameter.shape == (1,) else parameter.split(rows)
        for module, part in zip(modules, parts, strict=True):
            stored = folder.tensors.get(f"{module}.{name}")
            if stored is None:  # a static layer's own scale of weights is declared, and not used
                assert word == "W8A8"
                assert name in ("weight_scale", "weight_offset")
                continue
            assert part.shape == stored.shape, f"{module}.{name}"
            part.copy_(stored)
        layer.register_parameter(name, torch.nn.Parameter(parameter, requires_grad=False))
    scheme.process_weights_after_loading(layer)
    generator = torch.Generator().manual_seed(1)
    static = word == "W8A8" or (word == "W8A8_MIX" and takes_cache)
    width = float(layer.input_scale[0]) * 40 if static else 1.0
    x = (torch.randn(TOKENS, columns, generator=generator) * width).to(folder.dtype).float()
    biases = [folder.tensors.get(f"{module}.bias") for module in modules]
    bias = None if biases[0] is None else torch.cat([part.float() for part in biases if part is not None])
    linears = [folder.linear(module, prefill=not takes_cache) for module in modules]
    expected = torch.cat([by_definition(linear, x) for linear in linears], -1)
    return difference(scheme.apply(layer, x, bias), expected)


def experts_difference(folder: Folder, parent: str) -> float:
    """The routed experts of a layer: made, filled, routed and computed by vllm-ascend."""
    config, prefix = folder.config, f"{parent}."
    count = len({name.removeprefix(prefix).partition(".")[0] for name in folder.tensors if prefix in name})
    word = folder.expert_word(parent)
    vllm_ascend_on_cpu.CONFIG.model_config.dtype = torch.float32
    vllm_ascend_on_cpu.CONFIG.quant_config = folder.quantization
    scheme = get_scheme_class(word, "moe")()
    hidden = folder.tensors[f"{parent}.0.gate_proj.weight"].shape[1]
    # Of int4 weights two rows are one.
    inner = len(folder.tensors[f"{parent}.0.gate_proj.weight_scale"])
    layer = torch.nn.Module()
    layer.swiglu_limit = 0.0  # type: ignore[assignment]
    parameters = scheme.get_weight(count, inner, hidden, folder.dtype) | scheme.get_dynamic_quant_param(
        count, inner, hidden, folder.dtype
    )
    for name, parameter in parameters.items():
        part, _, kind = name.partition("_")
        for expert in range(count):
            projections = ("gate_proj", "up_proj") if part == "w13" else ("down_proj",)
            stored = torch.cat([folder.tensors[f"{parent}.{expert}.{p}.{kind}"] for p in projections])
            assert parameter[expert].shape == stored.shape, name
            parameter[expert].copy_(stored)
        layer.register_parameter(name, torch.nn.Parameter(parameter, requires_grad=False))
    scheme.process_weights_after_loading(layer)
    top = config["num_experts_per_tok"]
    moe = SimpleNamespace(experts_per_token=top, num_experts=count, num_local_experts=count, ep_size=1)
    vllm_ascend_on_cpu.CONTEXT.moe_comm_method = AllGatherCommImpl(moe)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(TOKENS, hidden, generator=generator).to(folder.dtype).float()
    gate = parent.removesuffix(".experts") + ".gate"
    logits = x @ folder.tensors[f"{gate}.weight"].float().T
    correction = folder.tensors.get(f"{gate}.e_score_correction_bias")
    options: dict[str, Any] = {"renormalize": config["norm_topk_prob"]}
    if correction is not None:
        options |= {
            "use_grouped_topk": True,
            "num_expert_group": config["n_group"],
            "topk_group": config["topk_group"],
            "scoring_func": config["scoring_func"],
            "routed_scaling_factor": config["routed_scaling_factor"],
            "e_score_correction_bias": correction.float(),
        }
    made = scheme.apply(layer, x.clone(), logits, top_k=top, num_experts=count, **options).routed_out
    return difference(made, _routed(folder, parent, x, logits, options, top))


def _routed(
    folder: Folder, parent: str, x: torch.Tensor, logits: torch.Tensor, options: dict[str, Any], top: int
) -> torch.Tensor:
    """The same by definition, token by token."""
    made = torch.zeros(len(x), x.shape[1], dtype=torch.float64)
    for token in range(len(x)):
        correction = options.get("e_score_correction_bias")
        if correction is None:
            scores = chosen = logits[token].softmax(-1)
        else:
            scores = logits[token].sigmoid()
            chosen = scores + correction
            groups = chosen.reshape(options["num_expert_group"], -1)
            best = groups.topk(2, -1).values.sum(-1).topk(options["topk_group"]).indices
            kept = torch.full_like(groups, float("-inf"))
            kept[best] = groups[best]
            chosen = kept.reshape(-1)
        experts = chosen.topk(top).indices
        weights = scores[experts].double()
        if options["renormalize"]:
            weights = weights / weights.sum()
        weights = weights * options.get("routed_scaling_factor", 1.0)
        for weight, expert in zip(weights, experts.tolist(), strict=True):
            one = x[token : token + 1]
            gate, up = (
                by_definition(folder.linear(f"{parent}.{expert}.{part}_proj"), one) for part in ("gate", "up")
            )
            inner = torch.nn.functional.silu(gate.float()) * up.float()
            made[token] += weight * by_definition(folder.linear(f"{parent}.{expert}.down_proj"), inner)[0]
    return made


def examine(path: Path) -> dict[str, Any]:
    """Every layer of a folder."""
    folder = Folder(path)
    found: dict[str, Any] = {"words": {}, "differences": {}, "experts": {}, "expert_words": {}}
    layers = range(folder.config["num_hidden_layers"]) if folder.quantization.enable_c8_quant else ()
    found["caches"] = [cache_difference(folder, layer) for layer in layers]
    # Those of prediction layers are attended to like the others.
    found["caches"] += [
        latent_difference(folder, layer) for layer in folder.quantization.kvcache_quant_layers
    ]
    # vLLM calls the head of a multi-token-prediction layer by the layer's own name.
    predicted = [name.removesuffix(".shared_head.head.weight") for name in folder.tensors]
    predicted = [f"{layer}.head" for layer in predicted if layer not in folder.tensors]
    for layer in ("lm_head", "model.embed_tokens", *predicted):
        assert folder.word(layer) == "FLOAT"
    for layer, modules in folder.layers().items():
        word = found["words"][layer] = folder.word(layer)
        if word != "FLOAT":
            found["differences"][layer] = linear_difference(folder, word, modules)
        if word == "W8A8_MIX":
            prompts = linear_difference(folder, word, modules, takes_cache=False)
            found["differences"][f"{layer} of prompts"] = prompts
    for parent in sorted(
        {str(experts_parent(name.removesuffix(".weight"))) for name in folder.tensors} - {"None"}
    ):
        if folder.tensors.get(f"{parent}.0.gate_proj.weight", torch.zeros(0)).dtype == torch.int8:
            found["expert_words"][parent] = folder.expert_word(parent)
            found["experts"][parent] = experts_difference(folder, parent)
    return found


if __name__ == "__main__":
    print(json.dumps({path: examine(Path(path)) for path in sys.argv[1:]}))  # noqa: T201
