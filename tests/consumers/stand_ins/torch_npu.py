"""Torch on a CPU in the place of torch_npu and of vllm-ascend's own operators; sums are exact.

Results stay float32 where an NPU would round them to the output's dtype.
"""

from types import SimpleNamespace
from typing import Any

import torch


def npu_quant_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    pertoken_scale: torch.Tensor | None = None,
    output_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`(x @ weight + bias) * scale`; per token the bias is added at the end, in floating point."""
    assert x.dtype == weight.dtype == torch.int8
    if scale.dtype == torch.int64:  # the bits of a float32, in float16 models
        scale = scale.to(torch.int32).view(torch.float32)
    sums = x.double() @ weight.double()
    if pertoken_scale is None:
        assert bias is None or bias.dtype == torch.int32
        return ((sums if bias is None else sums + bias) * scale.double()).float()
    product = sums * scale.double() * pertoken_scale.double()[:, None]
    return (product if bias is None else product + bias.double()).float()


def npu_dynamic_quant(x: torch.Tensor, dst_type: Any = torch.int8) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row by its largest magnitude over 127."""
    assert dst_type == torch.int8
    scale = x.float().abs().amax(-1) / 127
    quantized = torch.nan_to_num(torch.round(x.float() / scale[..., None]))
    return torch.clamp(quantized, -128, 127).to(torch.int8), scale


def npu_swiglu(x: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` of the two halves of a row."""
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def quantize(x: torch.Tensor, scale: Any, reciprocal: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """npu_quantize with `div_mode=False`: `round(x * reciprocal + offset)`."""
    return torch.clamp(torch.round(x.double() * reciprocal.double() + offset.double()), -128, 127).to(
        torch.int8
    )


def npu_format_cast(x: torch.Tensor, form: Any) -> torch.Tensor:
    """Another memory layout, of the same values."""
    return x


def npu_grouped_matmul(
    x: list[torch.Tensor],
    weight: list[torch.Tensor],
    scale: list[torch.Tensor],
    per_token_scale: list[torch.Tensor],
    group_list: torch.Tensor,
    group_list_type: int,
    bias: Any = None,
    **_: Any,
) -> list[torch.Tensor]:
    """Each expert's rows by its weight `[K, N]`; `group_list` counts the rows, or ends them (type 0)."""
    counts = group_list if group_list_type == 1 else torch.diff(group_list, prepend=torch.zeros(1))
    rows = []
    for expert, (part, tokens) in enumerate(_parts(x[0], per_token_scale[0], counts)):
        assert part.dtype == torch.int8
        if weight[0].dtype == torch.int32:
            sums = _int4_sums(part, weight[0][expert], scale[0][expert], bias[0][expert])
        else:
            assert bias is None
            assert weight[0].dtype == torch.int8
            sums = part.double() @ weight[0][expert].double() * scale[0][expert].double()
        rows.append(sums * tokens.double()[:, None])
    return [torch.cat(rows).float()]


def _int4_sums(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """As the operator: inputs as two int4 each, of which the low one is 8 less, for which `bias` makes up.

    A weight `[K, N / 8]` has eight int4 of a row in a number, the first in its lowest bits; a scale `[N]` or
    `[G, N]` is the bits of a float32 in an int64.
    """
    assert scale.dtype == torch.int64
    assert bias.dtype == torch.float32
    halves = weight.contiguous().view(torch.int8).to(torch.int16)
    whole = torch.stack([((halves & 15) ^ 8) - 8, halves >> 4], -1).reshape(len(weight), -1)
    inputs = x.to(torch.int64)
    taken = 16 * (inputs >> 4) + (inputs & 15) - 8
    values = scale.to(torch.int32).view(torch.float32).reshape(-1, whole.shape[1]).double()
    factors = values.repeat_interleave(len(whole) // len(values), 0)
    return taken.double() @ (whole.double() * factors) + bias.double()


def grouped_matmul_swiglu_quant_v2(
    x: torch.Tensor,
    weight: list[torch.Tensor],
    weight_scale: list[torch.Tensor],
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    weight_assist_matrix: list[torch.Tensor],
    dequant_mode: int,
    group_list_type: int,
    swiglu_limit: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`grouped_matmul_swiglu_quant_weight_nz` of int4 weights; `group_list` counts the rows."""
    assert (dequant_mode, group_list_type, swiglu_limit) == (0, 1, 0.0)
    (both,) = npu_grouped_matmul([x], weight, weight_scale, [x_scale], group_list, 1, weight_assist_matrix)
    return npu_dynamic_quant(npu_swiglu(both))


def grouped_matmul_swiglu_quant_weight_nz(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    x_scale: torch.Tensor,
    group_list: torch.Tensor,
    bias: Any = None,
    swiglu_limit: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, None]:
    """The product of gate and up, `silu(gate) * up`, and that quantized per token; `group_list` ends the
    rows."""
    assert not swiglu_limit
    assert weight_scale.dtype == torch.float32
    (both,) = npu_grouped_matmul([x], [weight], [weight_scale], [x_scale], group_list, 0, bias)
    quantized, scale = npu_dynamic_quant(npu_swiglu(both))
    return quantized, scale, None


def npu_moe_init_routing(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    scale: Any = None,
    expert_num: int = 0,
    quant_mode: int = -1,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Each token once for each of its experts, in the order of experts; where each went, and the counts."""
    flat = expert_idx.reshape(-1).long()
    order = torch.argsort(flat, stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(flat))
    rows, counts = x[order // expert_idx.shape[1]], torch.bincount(flat, minlength=expert_num)
    if quant_mode == -1:
        return rows, places, counts, scale
    assert quant_mode == 1
    quantized, row_scale = npu_dynamic_quant(rows)
    return quantized, places, counts, row_scale


def npu_moe_token_unpermute(
    permuted_tokens: torch.Tensor, sorted_indices: torch.Tensor, probs: torch.Tensor
) -> torch.Tensor:
    """The sum over each token's experts, weighted."""
    rows = permuted_tokens[sorted_indices.abs().long()].reshape(*probs.shape, -1)
    return (rows.double() * probs.double()[..., None]).sum(1).float()


def moe_gating_top_k(
    x: torch.Tensor,
    k: int,
    k_group: int,
    group_count: int,
    group_select_mode: int,
    renorm: int,
    norm_type: int,
    out_flag: bool,
    routed_scaling_factor: float,
    eps: float,
    bias_opt: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, None]:
    """Softmax (`norm_type` 0) or sigmoid (1), groups by the sum of their two best, the best of the best
    groups."""
    scores = x.float().softmax(-1) if norm_type == 0 else x.float().sigmoid()
    chosen = scores if bias_opt is None else scores + bias_opt.float()
    if group_count > 1:
        assert group_select_mode == 1
        grouped = chosen.reshape(len(x), group_count, -1)
        best = grouped.topk(2, -1).values.sum(-1).topk(k_group, -1).indices
        kept = torch.zeros(grouped.shape[:2], dtype=torch.bool).scatter(1, best, True)
        chosen = grouped.masked_fill(~kept[..., None], float("-inf")).reshape(len(x), -1)
    index = chosen.topk(k, -1).indices
    weights = scores.gather(1, index)
    if renorm or norm_type == 1:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    return weights * routed_scaling_factor, index, None


def npu_scatter_pa_kv_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Put tokens `[T, groups, D]` into their slots of a cache `[blocks, groups, D / 32, block, 32]`."""
    for rows, cache in ((key, key_cache), (value, value_cache)):
        assert rows.dtype == cache.dtype == torch.int8
        _, groups, parts, block, inner = cache.shape
        for row, slot in zip(rows, slot_mapping.tolist(), strict=True):
            cache[slot // block, :, :, slot % block] = row.reshape(groups, parts, inner)


def npu_fused_infer_attention_score(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    num_heads: int,
    num_key_value_heads: int,
    input_layout: str,
    scale: float,
    block_size: int,
    sparse_mode: int,
    actual_seq_lengths_kv: Any,
    actual_seq_lengths: Any = None,
    atten_mask: Any = None,
    block_table: torch.Tensor | None = None,
    key_antiquant_scale: torch.Tensor | None = None,
    value_antiquant_scale: torch.Tensor | None = None,
    antiquant_mode: int = 0,
    key_antiquant_mode: int = 0,
    value_antiquant_mode: int = 0,
    inner_precise: int = 0,
) -> tuple[torch.Tensor, None]:
    """Attention of whole sequences (TND), or of one token of each over a paged int8 cache (BNSD)."""
    assert (antiquant_mode, key_antiquant_mode, value_antiquant_mode) == (0, 0, 0)
    if input_layout == "BNSD":
        assert sparse_mode == 0
        assert block_table is not None
        assert key.dtype == value.dtype == torch.int8
        rows = []
        for place, length in enumerate(actual_seq_lengths_kv):
            taken = block_table[place]
            pair = (
                _from_blocks(cache[taken])[:length].double() * factor.double().squeeze(1)
                for cache, factor in ((key, key_antiquant_scale), (value, value_antiquant_scale))
            )
            rows.append(_attend(query[place].transpose(0, 1), *pair, scale))
        return torch.stack(rows).transpose(1, 2).float(), None
    assert (input_layout, sparse_mode, block_table) == ("TND", 3, None)
    made, first, first_key = [], 0, 0
    for last, last_key in zip(list(actual_seq_lengths), list(actual_seq_lengths_kv), strict=True):
        own = slice(first_key, int(last_key))
        made.append(_attend(query[first : int(last)], key[own].double(), value[own].double(), scale))
        first, first_key = int(last), int(last_key)
    return torch.cat(made).float(), None


def npu_mla_prolog_v2(
    token_x: torch.Tensor,
    weight_dq: torch.Tensor,
    weight_uq_qr: torch.Tensor,
    weight_uk: torch.Tensor,
    weight_dkv_kr: torch.Tensor,
    rmsnorm_gamma_cq: torch.Tensor,
    rmsnorm_gamma_ckv: torch.Tensor,
    rope_sin: torch.Tensor,
    rope_cos: torch.Tensor,
    cache_index: torch.Tensor,
    kv_cache: torch.Tensor,
    kr_cache: torch.Tensor,
    *,
    dequant_scale_x: torch.Tensor,
    dequant_scale_w_dq: torch.Tensor,
    dequant_scale_w_uq_qr: torch.Tensor,
    dequant_scale_w_dkv_kr: torch.Tensor,
    quant_scale_ckv: torch.Tensor,
    cache_mode: str,
) -> tuple[torch.Tensor, ...]:
    """What comes before latent attention, with an int8 cache that is laid out in blocks of channels.

    Of int8 inputs with a scale per token: queries in the latent's channels, rounded by their own range of
    each head (`dequantScaleQNope = rowmax / 127`), and the rotated ones in units of the product of both
    scales, as the operator's `MulQr` leaves them; and both parts of the cache with the tokens in it.
    """
    assert cache_mode == "PA_NZ"
    assert {part.dtype for part in (token_x, weight_dq, weight_uq_qr, weight_dkv_kr, kv_cache)} == {
        torch.int8
    }
    factor = dequant_scale_x.double()
    down = token_x.double() @ weight_dq.double() * factor * dequant_scale_w_dq.double()
    inner, inner_scale = npu_dynamic_quant(_rms_norm(down, rmsnorm_gamma_cq))
    queries = inner.double() @ weight_uq_qr.double() * inner_scale.double()[:, None] * dequant_scale_w_uq_qr
    heads, nope, _ = weight_uk.shape
    own, rotated = queries.reshape(len(inner), heads, -1).tensor_split([nope], -1)
    turned, turned_scale = npu_dynamic_quant(torch.einsum("tnp,npr->tnr", own, weight_uk.double()))
    latent = token_x.double() @ weight_dkv_kr.double() * factor * dequant_scale_w_dkv_kr.double()
    rank = kv_cache.shape[-1]
    kept = torch.round(_rms_norm(latent[:, :rank], rmsnorm_gamma_ckv).float() * quant_scale_ckv)
    for rows, cache, inner_width in (
        (torch.clamp(kept, -128, 127).to(torch.int8), kv_cache, 32),
        (_rotated(latent[:, None, rank:], rope_cos, rope_sin)[:, 0].float(), kr_cache, 16),
    ):
        blocks, block, _, width = cache.shape
        layout = cache.view(blocks, width // inner_width, block, inner_width)
        for row, slot in zip(rows, cache_index.tolist(), strict=True):
            layout[slot // block, :, slot % block] = row.reshape(-1, inner_width)
    units = turned_scale.double()[..., None] / quant_scale_ckv.double()[0, 0]
    positions = _rotated(rotated, rope_cos, rope_sin) / units
    return turned, positions.float(), kv_cache, kr_cache, turned_scale


def npu_fused_infer_attention_score_v2(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    query_rope: torch.Tensor,
    key_rope: torch.Tensor,
    num_query_heads: int,
    num_key_value_heads: int,
    input_layout: str,
    atten_mask: Any,
    sparse_mode: int,
    softmax_scale: float,
    block_table: torch.Tensor,
    block_size: int,
    actual_seq_qlen: Any,
    actual_seq_kvlen: list[int],
    query_quant_mode: int,
    key_quant_mode: int,
    value_quant_mode: int,
    dequant_scale_query: torch.Tensor,
    dequant_scale_key: torch.Tensor,
    dequant_scale_value: torch.Tensor,
    return_softmax_lse: bool = False,
) -> tuple[torch.Tensor, None]:
    """One token of each sequence `[B, 1, heads, D]` over a paged int8 latent cache, to `[heads, B, 1, D]`.

    Probabilities stay in floating point.
    """
    assert (input_layout, sparse_mode, atten_mask, num_key_value_heads) == ("BSND_NBSD", 0, None, 1)
    assert (query_quant_mode, key_quant_mode, value_quant_mode) == (3, 0, 0)
    assert query.dtype == key.dtype == value.dtype == torch.int8
    assert not return_softmax_lse
    rows = []
    for place, length in enumerate(actual_seq_kvlen):
        latent, rotated, values = (
            _from_blocks(cache[block_table[place]])[:length, 0].double() for cache in (key, key_rope, value)
        )
        sums = query[place, 0].double() @ latent.T + query_rope[place, 0].double() @ rotated.T
        scores = sums * dequant_scale_query[place, 0].double()[:, None] * dequant_scale_key.double()
        rows.append((scores * softmax_scale).softmax(-1) @ (values * dequant_scale_value.double()))
    return torch.stack(rows, 1)[:num_query_heads, :, None].float(), None


def npu_transpose_batchmatmul(x: torch.Tensor, weight: torch.Tensor, perm_y: Any) -> torch.Tensor:
    """`[N, B, L]` by `[N, L, V]`, to `[B, N, V]`."""
    assert tuple(perm_y) == (1, 0, 2)
    return torch.bmm(x, weight).permute(*perm_y)


def _rms_norm(x: torch.Tensor, gamma: torch.Tensor, epsilon: float = 1e-6) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * gamma.double()


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Pairs of neighbours `[T, heads, R]`, of which the first come out before the second."""
    first, second = x[..., ::2].double(), x[..., 1::2].double()
    turns = (part[:, None, : x.shape[-1] // 2].double() for part in (cos, sin))
    cosine, sine = turns
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)


def _from_blocks(cache: torch.Tensor) -> torch.Tensor:
    """Blocks `[n, groups, D / 32, block, 32]` as tokens, `[n * block, groups, D]`."""
    blocks, groups, parts, block, inner = cache.shape
    return cache.permute(0, 3, 1, 2, 4).reshape(blocks * block, groups, parts * inner)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Queries `[n, heads, D]`, the last tokens of those of keys and values `[T, groups, D]`."""
    count, heads, _ = query.shape
    tokens, groups, _ = key.shape
    keys, values = (part.repeat_interleave(heads // groups, 1) for part in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * scale
    hidden = torch.arange(tokens) > torch.arange(tokens - count, tokens)[:, None]
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)


def _parts(x: torch.Tensor, scale: torch.Tensor, counts: torch.Tensor) -> Any:
    sizes = [int(count) for count in counts]
    return zip(x.split(sizes), scale.split(sizes), strict=True)


npu_moe_init_routing_v2 = npu_moe_init_routing


class _Event:
    def record_event(self) -> None:
        """A CPU has done everything at once."""


torch.Tensor.npu = lambda self: self  # type: ignore[attr-defined]
torch.npu = SimpleNamespace(current_stream=_Event, Event=_Event, empty_cache=lambda: None)
torch.ops.vllm = SimpleNamespace(quantize=quantize, maybe_all_gather_and_maybe_unpad=lambda x, need_gather: x)
torch.ops._C_ascend = SimpleNamespace(
    npu_moe_init_routing_custom=npu_moe_init_routing,
    grouped_matmul_swiglu_quant_weight_nz=grouped_matmul_swiglu_quant_weight_nz,
    grouped_matmul_swiglu_quant_v2=grouped_matmul_swiglu_quant_v2,
    moe_gating_top_k=moe_gating_top_k,
)
