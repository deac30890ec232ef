"""The int8 latent cache of `ascend` folders: filled and attended to by vllm-ascend's own code on a CPU.

A part of `vllm_ascend_layers`, which is to be imported first. Executed are the loaders and the attention of a
decode instance on Atlas A2; its two fused operators are those of `torch_npu`, by their documentation.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import vllm_ascend_on_cpu
from vllm_ascend.attention.attention_v1 import AscendAttentionState
from vllm_ascend.attention.mla_v1 import (
    AscendMLADecodeMetadata,
    AscendMLAImpl,
    AscendMLAMetadata,
    UnquantizedLinearMethod,
)
from vllm_ascend.quantization.methods.kv_c8 import AscendFAQuantAttentionMethod
from vllm_ascend.quantization.methods.registry import get_scheme_class

from msquant.inference.cpu.cpu_attention import CpuLatentAttention, LayerCache, Places
from msquant.models.config import ModelConfig
from msquant.models.config_json import parse_config
from msquant.models.rope import rotary_tables, softmax_scale
from tests.consumers.vllm_ascend_cache import difference

TOKENS, BLOCK, BLOCKS = 40, 16, 4
SCALES = [f"fa_{part}.{what}" for part in "qkv" for what in ("scale", "offset")]


def latent_difference(folder: Any, layer: int) -> float:
    """The relative RMS difference of attention's output to the embedded engine's.

    Tokens come one by one, through blocks that do not lie in order.
    """
    config, block = parse_config(folder.config, "config.json"), f"model.layers.{layer}.self_attn"
    sizes, dtype = config.latent, folder.dtype
    assert sizes is not None
    name = f"{block}.mla_attn.mla_attn"
    settings = vllm_ascend_on_cpu.CONFIG
    settings.quant_config, settings.speculative_config = folder.quantization, None
    settings.model_config = SimpleNamespace(dtype=dtype, hf_config=SimpleNamespace(**folder.config))
    # Who takes another engine's cache, and makes none for others.
    settings.kv_transfer_config = SimpleNamespace(is_kv_consumer=True, is_kv_producer=False)
    settings.compilation_config = SimpleNamespace(mode=None, static_forward_context={})
    quantization = folder.quantization
    assert quantization.is_fa_quant_layer(name)
    assert quantization.enabling_fa_quant(settings, name)
    assert quantization.get_kv_quant_dtype(name, None, SimpleNamespace(dtype=dtype, use_mla=True)) == (
        torch.int8,
        dtype,
    )
    method = get_scheme_class(quantization.quant_description["fa_quant_type"], "attention")
    assert method is AscendFAQuantAttentionMethod
    settings.compilation_config.static_forward_context[name] = _loaded(folder, method(), block, config)
    up = torch.nn.Module()
    up.weight = torch.nn.Parameter(folder.tensors[f"{block}.kv_b_proj.weight"].float(), requires_grad=False)
    up.quant_method = UnquantizedLinearMethod()  # type: ignore[assignment]
    impl = AscendMLAImpl(
        config.num_attention_heads,
        sizes.kv_lora_rank + sizes.qk_rope_head_dim,
        softmax_scale(config, sizes),
        1,
        None,
        None,
        "auto",
        None,
        "decoder",
        None,
        q_lora_rank=sizes.q_lora_rank,
        kv_lora_rank=sizes.kv_lora_rank,
        qk_nope_head_dim=sizes.qk_nope_head_dim,
        qk_rope_head_dim=sizes.qk_rope_head_dim,
        qk_head_dim=sizes.qk_nope_head_dim + sizes.qk_rope_head_dim,
        v_head_dim=sizes.v_head_dim,
        rotary_emb=None,
        fused_qkv_a_proj=_linear(folder, [f"{block}.q_a_proj", f"{block}.kv_a_proj_with_mqa"]),
        q_b_proj=_linear(folder, [f"{block}.q_b_proj"]),
        kv_b_proj=up,
        o_proj=_Output(),
        q_a_layernorm=_norm(folder, f"{block}.q_a_layernorm"),
        kv_a_layernorm=_norm(folder, f"{block}.kv_a_layernorm"),
        layer_name=name,
    )
    assert impl.fa_quant_layer
    assert impl.dtype == torch.int8
    impl.process_weights_after_loading(dtype)
    generator = torch.Generator().manual_seed(layer)
    hidden = torch.randn(TOKENS, config.hidden_size, generator=generator)
    kept = (
        torch.zeros(BLOCKS, BLOCK, 1, sizes.kv_lora_rank, dtype=torch.int8),
        torch.zeros(BLOCKS, BLOCK, 1, sizes.qk_rope_head_dim),
    )
    vllm_ascend_on_cpu.CONTEXT.num_tokens = 1
    found = torch.zeros(TOKENS, config.num_attention_heads * sizes.v_head_dim)
    for token in range(TOKENS):
        impl.forward(
            name, hidden[token : token + 1], kept, _metadata(config, token), output=found[token : token + 1]
        )
    # Some channels are beyond the largest integers, most are not.
    assert kept[0].abs().max() == 127 or kept[0].min() == -128 or kept[0].abs().max() > 60
    return difference(found, torch.from_numpy(_ours(folder, config, block, hidden.numpy())).double())


class _Output(torch.nn.Module):
    """In the place of the output projection, whose input is compared."""

    weight = None

    def forward(self, x: torch.Tensor, is_prefill: bool) -> tuple[torch.Tensor]:
        assert not is_prefill
        return (x,)


def _ours(folder: Any, config: ModelConfig, block: str, hidden: np.ndarray) -> np.ndarray:
    """The same of the embedded engine, of all tokens at once."""
    assert config.latent is not None
    attention = CpuLatentAttention(config, config.latent, folder.source, block)
    attention._o = lambda x: x
    return attention(hidden, Places(config, [(0, len(hidden))]), [LayerCache()])


def _loaded(folder: Any, scheme: Any, block: str, config: ModelConfig) -> Any:
    """vLLM's attention layer with the folder's scales, which are named and loaded as vllm-ascend does."""
    module = torch.nn.Module()
    module.num_heads, module.num_kv_heads = config.num_attention_heads, 1  # type: ignore[assignment]
    torch.set_default_dtype(folder.dtype)
    try:
        scheme.create_weights(module)
    finally:
        torch.set_default_dtype(torch.float32)
    for stored in SCALES:
        # 0.23.0 renames them where vLLM's DeepSeek loads (patch/worker/patch_weight_utils.py).
        if "get_cache_scale_mapper" in vars(type(folder.quantization)):
            renamed = folder.quantization.get_cache_scale_mapper().orig_to_new_regex
            (found,) = (
                pattern.sub(new, f"{block}.{stored}")
                for pattern, new in renamed.items()
                if pattern.search(f"{block}.{stored}")
            )
            assert found == f"{block}.mla_attn.mla_attn.{stored}"
        part, _, what = stored.partition(".")
        parameter = getattr(getattr(module, part), what)
        loaded = folder.tensors[f"{block}.{stored}"]
        assert parameter.shape == loaded.shape
        parameter.weight_loader(parameter, loaded)
    scheme.process_weights_after_loading(module)
    return module


def _linear(folder: Any, modules: list[str]) -> Any:
    """A layer of vLLM with the weights of these, as vllm-ascend's scheme leaves them."""
    scheme = get_scheme_class(folder.word(modules[0]), "linear")()
    layer = torch.nn.Module()
    rows = sum(len(folder.tensors[f"{module}.weight"]) for module in modules)
    columns = folder.tensors[f"{modules[0]}.weight"].shape[1]
    parameters = scheme.get_weight(columns, rows, folder.dtype) | scheme.get_perchannel_param(
        rows, folder.dtype
    )
    for name, parameter in parameters.items():
        stored = torch.cat([folder.tensors[f"{module}.{name}"] for module in modules])
        assert parameter.shape == stored.shape
        parameter.copy_(stored)
        layer.register_parameter(name, torch.nn.Parameter(parameter, requires_grad=False))
    scheme.process_weights_after_loading(layer)
    layer.quant_method = SimpleNamespace(quant_method=scheme)  # type: ignore[assignment]
    return layer


def _norm(folder: Any, name: str) -> Any:
    return SimpleNamespace(weight=SimpleNamespace(data=folder.tensors[f"{name}.weight"].float()), bias=None)


def _metadata(config: ModelConfig, token: int) -> Any:
    """What vLLM says of one sequence's next token."""
    table = torch.tensor([[2, 0, 3, 1]])
    cos, sin = (torch.from_numpy(part)[:, None, None] for part in rotary_tables(config, token, 1))
    # What one version alone has.
    newer = "seq_lens_device" in AscendMLADecodeMetadata.__dataclass_fields__
    lengths: dict[str, Any] = {"seq_lens_device": torch.tensor([token + 1])} if newer else {}
    padded: dict[str, Any] = {} if newer else {"num_actual_tokens_pcp_padded": 1}
    return AscendMLAMetadata(
        num_actual_tokens=1,
        **padded,
        slot_mapping=torch.tensor([int(table[0, token // BLOCK]) * BLOCK + token % BLOCK]),
        query_start_loc=torch.tensor([0, 1]),
        seq_lens=torch.tensor([token + 1]),
        seq_lens_cpu=torch.tensor([token + 1]),
        block_tables=table,
        num_decodes=1,
        num_decode_tokens=1,
        num_prefills=0,
        attn_state=AscendAttentionState.DecodeOnly,
        decode=AscendMLADecodeMetadata(
            input_positions=torch.tensor([token]),
            block_table=table,
            seq_lens=torch.tensor([token + 1]),
            max_seq_lens=token + 1,
            seq_lens_list=[token + 1],
            cos=cos,
            sin=sin,
            **lengths,
        ),
    )
