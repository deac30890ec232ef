"""The int8 key-value cache of `ascend` folders: filled and attended to by vllm-ascend's own code on a CPU.

A part of `vllm_ascend_layers`, which is to be imported first.
"""

from types import SimpleNamespace
from typing import Any

import torch
import vllm_ascend_on_cpu
from vllm_ascend.attention.attention_v1 import (
    AscendAttentionState,
    AscendC8AttentionBackendImpl,
    AscendMetadata,
)
from vllm_ascend.quantization.methods.kv_c8 import AscendC8KVCacheAttentionMethod

TOKENS, PROMPT, BLOCK, BLOCKS = 40, 24, 32, 3
# The names of a checkpoint and those of vLLM's attention layer.
NAMES = {
    f"{part}_proj.kv_cache_{what}": f"{part}_cache_{what}" for part in "kv" for what in ("scale", "offset")
}


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative RMS."""
    return float(((found.double() - expected) ** 2).mean().sqrt() / (expected**2).mean().sqrt())


def cache_difference(folder: Any, layer: int) -> float:
    """The greatest relative RMS difference of attention to the folder's definition.

    Tokens are generated one by one after a prompt in two chunks, whose second reads the first from the
    cache, through blocks that do not lie in order.
    """
    config, block = folder.config, f"model.layers.{layer}.self_attn"
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    vllm_ascend_on_cpu.CONFIG.quant_config = folder.quantization
    vllm_ascend_on_cpu.CONFIG.cache_config = SimpleNamespace(block_size=BLOCK)
    # No other engine hands its cache on to this one.
    vllm_ascend_on_cpu.CONFIG.kv_transfer_config = None
    assert folder.quantization.is_c8_quant_layer(f"{block}.attn")
    scheme = AscendC8KVCacheAttentionMethod(folder.quantization.quant_description, f"{block}.attn")
    impl = AscendC8AttentionBackendImpl(
        heads, size, size**-0.5, groups, None, None, "auto", None, "decoder", None
    )
    module = _loaded(folder, scheme, block, impl)
    generator = torch.Generator().manual_seed(layer)
    caches = [folder.source.linear(f"{block}.{part}_proj").cache for part in "kv"]
    keys, values = (
        # Beyond the largest integers here and there.
        torch.randn(TOKENS, groups * size, generator=generator) * torch.from_numpy(cache.scale) * 50
        for cache in caches
    )
    queries = torch.randn(TOKENS, heads, size, generator=generator)
    # What the engine makes of the queries' size matters less where no key is far ahead of the others.
    queries /= keys.abs().max() * size**0.5 / 8
    kept = torch.zeros(2, BLOCKS, BLOCK, groups, size, dtype=torch.int8)
    expected = _attention(queries, *_read_back(keys, values, caches), groups)
    found = torch.zeros(TOKENS, heads, size)
    chunks = [slice(0, PROMPT // 2), slice(PROMPT // 2, PROMPT)]
    chunks += [slice(token, token + 1) for token in range(PROMPT, TOKENS)]
    for chunk in chunks:
        impl.forward(
            module,
            queries[chunk],
            keys[chunk].reshape(-1, groups, size),
            values[chunk].reshape(-1, groups, size),
            (kept[0], kept[1]),
            _metadata(chunk),
            found[chunk],
        )
    # A chunk of a prompt with nothing before it attends to its own keys and values unrounded.
    first = _attention(queries[chunks[0]], keys[chunks[0]], values[chunks[0]], groups)
    return max(difference(found[chunks[0]], first), difference(found[PROMPT // 2 :], expected[PROMPT // 2 :]))


def _loaded(folder: Any, scheme: Any, block: str, impl: Any) -> Any:
    """vLLM's attention layer with the folder's scales, which are named and loaded as vllm-ascend does."""
    module = torch.nn.Module()
    module.impl, module.layer_name = impl, f"{block}.attn"  # type: ignore[assignment]
    torch.set_default_dtype(folder.dtype)
    try:
        scheme.create_weights(module)
    finally:
        torch.set_default_dtype(torch.float32)
    assert type(module.impl) is AscendC8AttentionBackendImpl
    assert module.kv_cache_torch_dtype == torch.int8
    rename = getattr(folder.quantization, "get_cache_scale", None)
    for stored, name in NAMES.items():
        if rename is not None:
            assert rename(f"{block}.{stored}") == f"{block}.attn.{name}"
        else:
            suffixes = folder.quantization.get_cache_scale_mapper().orig_to_new_suffix
            assert suffixes[f".{stored}"] == f".attn.{name}"
        parameter = getattr(module, name)
        parameter.weight_loader(parameter, folder.tensors[f"{block}.{stored}"])
    scheme.process_weights_after_loading(module)
    return module


def _metadata(chunk: slice) -> Any:
    """What vLLM says of one sequence's next tokens; its second block lies behind its third."""
    table = torch.tensor([[0, 2, 1]])
    places = torch.arange(chunk.start, chunk.stop)
    count = len(places)
    generated = chunk.start >= PROMPT
    state = AscendAttentionState.PrefillCacheHit if chunk.start else AscendAttentionState.PrefillNoCache
    return AscendMetadata(
        attn_state=AscendAttentionState.DecodeOnly if generated else state,
        num_actual_tokens=count,
        num_decode_tokens=count if generated else 0,
        num_decodes=int(generated),
        num_prefills=int(not generated),
        seq_lens=torch.tensor([chunk.stop]),
        seq_lens_list=[chunk.stop],
        actual_seq_lengths_q=[count],
        block_tables=table,
        slot_mapping=table[0][places // BLOCK] * BLOCK + places % BLOCK,
    )


def _read_back(keys: torch.Tensor, values: torch.Tensor, caches: list[Any]) -> list[torch.Tensor]:
    """Keys and values as msquant's engine reads them back."""
    return [
        torch.from_numpy(cache.rounded(part.numpy()))
        for part, cache in zip((keys, values), caches, strict=True)
    ]


def _attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, groups: int) -> torch.Tensor:
    """By definition in float64, every query over the tokens up to its own; `[T, heads, D]`."""
    tokens, heads, size = queries.shape
    split = [part.double().reshape(tokens, groups, size) for part in (keys, values)]
    every_key, every_value = (part.repeat_interleave(heads // groups, 1) for part in split)
    scores = torch.einsum("qhd,khd->hqk", queries.double(), every_key) * size**-0.5
    hidden = torch.ones(tokens, tokens).triu(1).bool()
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), every_value)
