"""NumPy arithmetic in the place of an NPU's operators, so that the servers' own code computes on a CPU.

Nothing else of a server is replaced by this module: which operator is called, with which tensor, transposed
or not, in which order, is decided by vLLM-MindSpore or MindFormers, and what they pass is asserted. Each
operator computes what its documentation says; attention reads and writes the real paged caches through the
real block tables and slots. Import it before the package whose operators it replaces, and call `install`.

The CPU has no bfloat16 products, so networks are switched to float32 once they are loaded
(`compute_in_float32`): the same values, with what is computed between them unrounded.
"""

import sys
import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, mint, ops

CALLS: Counter[str] = Counter()
"""How often each operator was called."""
CASTS: list[str] = []
"""Parameters that were given values of another dtype than their own, with both dtypes."""

_NZ = "FRACTAL_NZ"


def array(tensor: Any) -> Any:
    """A tensor's values, bfloat16 as float32; what is none stays as it is."""
    if tensor is None or isinstance(tensor, np.ndarray | int | float):
        return tensor
    if not isinstance(tensor, Tensor):
        return tensor.numpy()
    return (tensor.astype(ms.float32) if tensor.dtype == ms.bfloat16 else tensor).asnumpy()


def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which counts its calls."""

    def call(*arguments: Any, **options: Any) -> Any:
        CALLS[name] += 1
        return function(*arguments, **options)

    return call


def operator(name: str, function: Callable[..., Any]) -> type:
    """A class like MindSpore's primitives: made with attributes, then called; `function` takes both."""

    def __init__(self: Any, *arguments: Any, **attributes: Any) -> None:  # noqa: N807
        self.made = (arguments, attributes)

    def __call__(self: Any, *inputs: Any, **options: Any) -> Any:  # noqa: N807
        CALLS[name] += 1
        return function(self.made, *inputs, **options)

    return type(name, (), {"__init__": __init__, "__call__": __call__})


# Quantization


def quantize(
    made: Any, x: Any, scale: Any, offset: Any, sqrt_mode: bool, rounding: str, dtype: Any
) -> Tensor:
    """`clamp(round(x / scale) + offset)`: what MindSpore's kernel QuantPerChannel does in graph mode."""
    assert not sqrt_mode
    assert rounding == "ROUND"
    assert dtype == ms.int8
    values = np.rint(array(x) / array(scale)) + array(offset).astype(np.float32)
    return Tensor(np.clip(values, -128, 127).astype(np.int8))


def quantize_rows(made: Any, x: Any, smooth: Any) -> tuple[Tensor, Tensor]:
    """Per token: each row by its largest magnitude over 127."""
    assert smooth is None
    values = array(x).astype(np.float32)
    scale = (np.abs(values).max(-1) / np.float32(127)).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        rounded = np.nan_to_num(np.rint(values / scale[..., None]))
    return Tensor(np.clip(rounded, -128, 127).astype(np.int8)), Tensor(scale)


def quantized_product(x: Any, weight: Any, scale: Any, bias: Any, token_scale: Any) -> Tensor:
    """`(x @ weight.T + bias) * scale * token_scale`, the sums exact; float32 of what is rounded to the
    output."""
    assert x.dtype == weight.dtype == ms.int8
    assert bias is None or bias.dtype == ms.int32
    assert array(scale).dtype == np.float32
    sums = array(x).astype(np.float64) @ array(weight).astype(np.float64).T
    if bias is not None:
        sums = sums + array(bias)
    product = (sums * array(scale).astype(np.float64)).astype(np.float32)
    return Tensor(product if token_scale is None else product * array(token_scale)[:, None])


def quant_batch_matmul(
    x1: Any,
    x2: Any,
    scale: Any,
    offset: Any = None,
    bias: Any = None,
    pertoken_scale: Any = None,
    transpose_x1: bool = False,
    transpose_x2: bool = False,
    x2_format: str = "ND",
    output_dtype: Any = ms.float16,
) -> Tensor:
    """aclnnQuantMatmulV4, as ms_custom_ops calls it."""
    assert offset is None
    assert not transpose_x1
    assert transpose_x2
    assert x2_format == _NZ
    return quantized_product(x1, x2, scale, bias, pertoken_scale)


def quant_batch_matmul_operator(
    made: Any, x: Any, weight: Any, scale: Any, offset: Any = None, bias: Any = None, token_scale: Any = None
) -> Tensor:
    """The same by MindSpore's own primitive."""
    assert made[1]["transpose_x2"]
    CALLS["QuantBatchMatmul per token" if token_scale is not None else "QuantBatchMatmul static"] += 1
    return quantized_product(x, weight, Tensor(array(scale).astype(np.float32)), bias, token_scale)


def trans_data(weight: Tensor, transdata_type: int) -> Tensor:
    """Another memory layout, of the same values."""
    assert transdata_type == 1
    assert weight.dtype == ms.int8
    return weight


# Mixtures of experts


def grouped_matmul(
    made: Any,
    x: Any,
    weight: Any,
    bias: Any,
    scale: Any,
    offset: Any,
    antiquant_scale: Any,
    antiquant_offset: Any,
    token_scale: Any,
    group_list: Any,
    split_item: int,
    group_type: int,
    group_list_type: int,
) -> list[Tensor]:
    """Each expert's rows by its weight `[K, N]`; `group_list` counts the rows of each."""
    assert (split_item, group_type, group_list_type) == (3, 0, 1)
    rows, weights, scales = array(x[0]), array(weight[0]), array(scale[0])
    tokens, counts = array(token_scale[0]), array(group_list)
    small = weight[0].dtype == ms.qint4x2
    assert rows.dtype == np.int8
    assert small or (weights.dtype == np.int8 and bias is None)
    assert small or scales.shape == (weights.shape[0], weights.shape[2])
    made_rows, at = np.zeros((len(rows), scales.shape[-1]), np.float32), 0
    for expert, count in enumerate(counts):
        part = slice(at, at + count)
        if small:
            CALLS["GroupedMatmulV4 int4"] += 1
            product = int4_product(rows[part], weights[expert], scales[expert], array(bias[0])[expert])
        else:
            product = rows[part].astype(np.float64) @ weights[expert].astype(np.float64) * scales[expert]
        made_rows[part] = product * tokens[part, None]
        at += count
    return [Tensor(made_rows)]


def int4_product(x: Any, weight: Any, scale: Any, bias: Any) -> Any:
    """aclnnGroupedMatmulV4 with int4 weights: inputs as two int4, of which the low one is 8 less.

    For that `bias` `[N]` makes up. A weight `[K, N / 2]` has an even output in a byte's low half and the next
    one in its high half; a scale `[G, N]` is the bits of a float32 in a uint64.
    """
    assert scale.dtype == np.uint64
    assert bias.dtype == np.float32
    halves = weight.astype(np.uint8).astype(np.int16)
    whole = np.stack([((halves & 15) ^ 8) - 8, ((halves >> 4) ^ 8) - 8], -1).reshape(len(weight), -1)
    inputs = x.astype(np.int64)
    taken = 16 * (inputs >> 4) + (inputs & 15) - 8
    factors = scale.astype(np.uint32).view(np.float32).astype(np.float64)
    factors = np.repeat(factors, len(weight) // len(scale), axis=0)
    return taken.astype(np.float64) @ (whole * factors) + bias.astype(np.float64)


def route_tokens(made: Any, x: Any, experts: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor, None]:
    """Each token once for each of its experts, in the order of experts; where each went, and the counts."""
    values, index = array(x), array(experts)
    flat = index.ravel()
    order = np.argsort(flat, kind="stable")
    places = np.empty(len(flat), np.int32)
    places[order] = np.arange(len(flat))
    counts = np.bincount(flat, minlength=options["expert_num"]).astype(np.int32)
    return Tensor(values[order // index.shape[1]]), Tensor(places), Tensor(counts), None


def unroute_tokens(
    made: Any, permuted_tokens: Any, sorted_indices: Any, probs: Any, **options: Any
) -> Tensor:
    """The sum over each token's experts, weighted."""
    weights = array(probs)
    rows = array(permuted_tokens)[array(sorted_indices)].reshape(*weights.shape, -1)
    return Tensor((rows * weights[..., None]).sum(1).astype(np.float32))


def choose_experts(
    made: Any,
    logits: Any,
    bias: Any,
    groups: int,
    group_topk: int,
    group_experts: int,
    k: int,
    activation: int,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3's router: sigmoid, groups by their best experts' sum, the best experts of the best
    groups."""
    assert activation == 0
    assert normalize
    scores = 1 / (1 + np.exp(-array(logits)))
    chosen = scores + array(bias)
    grouped = np.sort(chosen.reshape(len(chosen), groups, -1), -1)[..., -group_experts:].sum(-1)
    kept = np.zeros(grouped.shape, bool)
    np.put_along_axis(kept, np.argsort(-grouped, -1)[:, :group_topk], True, 1)
    chosen = np.where(np.repeat(kept, chosen.shape[1] // groups, 1), chosen, -np.inf)
    index = np.argsort(-chosen, -1, kind="stable")[:, :k]
    weights = np.take_along_axis(scores, index, 1)
    weights = weights / weights.sum(-1, keepdims=True) * scale
    return Tensor(weights.astype(np.float32)), Tensor(index.astype(np.int32))


# Attention


def rms_norm(made: Any, x: Any, weight: Any) -> tuple[Tensor, None]:
    """`x / sqrt(mean(x^2) + epsilon) * weight`."""
    (epsilon,), _ = made
    values = array(x)
    root = np.sqrt((values.astype(np.float64) ** 2).mean(-1, keepdims=True) + epsilon).astype(np.float32)
    return Tensor((values / root * array(weight)).astype(np.float32)), None


def rotate(made: Any, query: Any, key: Any, cos: Any, sin: Any, lengths: Any) -> tuple[Tensor, Tensor]:
    """Rotary embedding of halves, which is what `rotary_coeff` 2 says.

    Cosine and sine have a row for each token, or for each place: then prompts of these lengths begin at 0.
    """
    assert made in (((2,), {}), ((), {"rotary_coeff": 2}))
    rows = query.shape[0]
    cosine, sine = array(cos), array(sin)
    if len(cosine) != rows:
        places = np.concatenate([np.arange(length) for length in array(lengths).ravel()])
        assert len(places) == rows
        # vLLM's trial run has more tokens than the model has places.
        cosine, sine = (np.take(table, places, 0, mode="wrap") for table in (cosine, sine))

    def turn(tensor: Any) -> Tensor:
        values = array(tensor)
        heads = values.reshape(rows, -1, cosine.shape[-1])
        first, second = np.split(heads, 2, -1)
        turned = heads * cosine[:, None] + np.concatenate([-second, first], -1) * sine[:, None]
        return Tensor(turned.reshape(values.shape).astype(np.float32))

    return turn(query), turn(key)


def write_cache(cache: Any, rows: Any, slots: Any) -> None:
    """Rows of tokens into their slots of a cache `[blocks, block size, heads, width]`; -1 is no slot."""
    values = array(rows)
    width = int(np.prod(cache.shape[2:]))
    assert values.shape[-1] == width, f"rows of {values.shape[-1]} into a cache of {width}"
    where = array(slots).ravel()
    values = values.reshape(-1, width)[: len(where)]
    held = array(cache).reshape(-1, width).copy()
    held[where[where >= 0]] = values[where >= 0]
    cache.assign_value(Tensor(held.reshape(cache.shape), cache.dtype))


def reshape_and_cache(
    made: Any,
    key: Any,
    value: Any = None,
    key_cache: Any = None,
    value_cache: Any = None,
    slot_mapping: Any = None,
) -> Any:
    """The keys and values of new tokens into their slots; one cache alone where the value's is None."""
    for rows, cache in ((key, key_cache), (value, value_cache)):
        if cache is not None and rows is not None and cache.shape[0]:
            write_cache(cache, rows, slot_mapping)
    return key


def split_reshape_and_cache(
    key: Any, value: Any, key_cache: Any, value_cache: Any, slots: Any, form: Any = 0, head_num: int = 1
) -> Any:
    """The same of ms_custom_ops, whose caches of latent and rotary parts are apart."""
    return reshape_and_cache(None, key, value, key_cache, value_cache, slots)


def attend(query: Any, keys: Any, values: Any, scale: float, first: int) -> Any:
    """Causal attention of `[n, heads, width]` over `[m, heads, width]`; the first query is at place
    `first`."""
    group = query.shape[1] // keys.shape[1]
    q = query.transpose(1, 0, 2)
    k, v = (np.repeat(part.transpose(1, 0, 2), group, 0) for part in (keys, values))
    made = []
    for begin in range(0, len(query), _ATTENDED):  # vLLM's trial run has thousands of tokens
        part = q[:, begin : begin + _ATTENDED]
        end = first + begin + part.shape[1]
        scores = part @ k[:, :end].transpose(0, 2, 1) * np.float32(scale)
        seen = np.arange(end)[None] <= first + begin + np.arange(part.shape[1])[:, None]
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        made.append((weights / weights.sum(-1, keepdims=True)) @ v[:, :end])
    return np.concatenate(made, 1).transpose(1, 0, 2).reshape(len(query), -1)


_ATTENDED = 256


def flash_attention(made: Any, query: Any, key: Any, value: Any, *others: Any) -> tuple[Any, ...]:
    """Causal attention of whole prompts laid end to end, layout TH; the lengths come seventh after the
    value."""
    attributes = made[1]
    assert attributes["input_layout"] == "TH"
    heads = attributes["head_num"]
    q, k, v = (array(part) for part in (query, key, value))
    q, k, v = (part.reshape(-1, part.shape[-1]) for part in (q, k, v))
    width = q.shape[-1] // heads
    lengths = [len(q)] if len(others) < 6 or others[5] is None else array(others[5]).ravel().tolist()
    parts, at = [], 0
    for length in lengths:
        one = slice(at, at + length)
        parts.append(
            attend(
                q[one].reshape(length, heads, width),
                k[one].reshape(length, -1, width),
                v[one].reshape(length, k.shape[-1] // width, -1),
                attributes["scale_value"],
                0,
            )
        )
        at += length
    return None, None, None, Tensor(np.concatenate(parts).astype(np.float32))


def cached(cache: Any, table: Any, length: int) -> Any:
    """The first `length` tokens' rows of a sequence: its blocks, in the order of its table."""
    values = array(cache)
    blocks = -(-length // values.shape[1])
    rows = values[array(table)[:blocks]].reshape(-1, *values.shape[2:])
    return rows[:length]


def paged_attention(
    made: Any,
    query: Any,
    key_cache: Any,
    value_cache: Any,
    block_tables: Any,
    lengths: Any,
    antiquant_scale: Any = None,
    antiquant_offset: Any = None,
    mask: Any = None,
    query_lengths: Any = None,
    *others: Any,
) -> Tensor:
    """Attention of each sequence's last tokens over its blocks.

    With `mla_v_dim` it is latent attention: the values are the first so many of the keys.
    """
    heads, scale, kv_heads, latent = _paged_attributes(made)
    q = array(query)
    shape, q = q.shape, q.reshape(-1, q.shape[-1])
    contexts, tables = array(lengths).ravel(), array(block_tables)
    counts = np.ones(len(contexts), int) if query_lengths is None else array(query_lengths).ravel()
    parts, at = [], 0
    for table, context, count in zip(tables, contexts, counts, strict=True):
        keys = cached(key_cache, table, context).reshape(context, kv_heads, -1)
        values = (
            keys[..., :latent]
            if latent
            else cached(value_cache, table, context).reshape(context, kv_heads, -1)
        )
        rows = q[at : at + count].reshape(count, heads, -1)
        parts.append(attend(rows, keys, values, scale, int(context - count)))
        at += count
    made_rows = np.concatenate(parts).astype(np.float32)
    return Tensor(made_rows.reshape(*shape[:-1], made_rows.shape[-1]))


def _paged_attributes(made: Any) -> tuple[int, float, int, int]:
    arguments, attributes = made
    named = dict(zip(("head_num", "scale_value", "kv_head_num"), arguments, strict=False)) | attributes
    return named["head_num"], named["scale_value"], named["kv_head_num"], named.get("mla_v_dim", 0)


def ring_mla(
    query: Any,
    query_rope: Any,
    key: Any,
    key_rope: Any,
    value: Any,
    head_num: int,
    scale_value: float,
    q_seq_lens: Any,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of prompts laid end to end, the rotary parts of queries and keys apart."""

    def by_heads(*parts: Any) -> Any:
        return np.concatenate([array(part).reshape(len(part), head_num, -1) for part in parts], -1)

    q, k, v = by_heads(query, query_rope), by_heads(key, key_rope), by_heads(value)
    made, at = [], 0
    for length in array(q_seq_lens).ravel():
        one = slice(at, at + length)
        made.append(attend(q[one], k[one], v[one], scale_value, 0))
        at += length
    assert at == len(q)
    return Tensor(np.concatenate(made).reshape(len(q), head_num, -1).astype(np.float32)), None


def latent_attention(
    query: Any,
    query_rope: Any,
    latent_cache: Any,
    rope_cache: Any,
    block_tables: Any,
    mask: Any,
    qk_scale: Any,
    pv_scale: Any,
    query_lengths: Any,
    lengths: Any,
    head_num: int,
    scale_value: float,
    kv_head_num: int = 1,
    **_: Any,
) -> tuple[Tensor, None]:
    """ms_custom_ops.mla: each sequence's last token over its blocks, latent and rotary parts in caches
    apart."""
    assert kv_head_num == 1
    assert qk_scale is None
    assert pv_scale is None
    latents, ropes = array(query), array(query_rope)
    q = np.concatenate([part.reshape(len(part), head_num, -1) for part in (latents, ropes)], -1)
    contexts = array(lengths).ravel()
    assert (array(query_lengths).ravel() == 1).all()
    parts = []
    for row, (table, context) in enumerate(zip(array(block_tables), contexts, strict=True)):
        latent, rope = (cached(cache, table, context) for cache in (latent_cache, rope_cache))
        keys = np.concatenate([latent, rope], -1)
        parts.append(attend(q[row : row + 1], keys, latent, scale_value, int(context) - 1))
    return Tensor(np.concatenate(parts).reshape(len(q), head_num, -1).astype(np.float32)), None


def latent_preprocess(
    hidden: Any,
    norm: Any,
    beta: Any,
    scale: Any,
    offset: Any,
    down: Any,
    down_bias: Any,
    query_norm: Any,
    query_beta: Any,
    query_scale: Any,
    query_offset: Any,
    latent_norm: Any,
    sin: Any,
    cos: Any,
    sin_again: Any,
    cos_again: Any,
    key_cache: Any,
    slots: Any,
    up: Any,
    up_bias: Any,
    absorb: Any,
    down_deq: Any,
    up_deq: Any,
    latent_scale: Any,
    nope_scale: Any,
    rope_cache: Any,
    cache_mode: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ms_custom_ops.mla_preprocess: from a layer's input to what latent attention takes, the caches written.

    Norm, quantize, the product that gives latent, rotary key and query; norm and quantize the query, its
    second product, rotate, absorb. The weights of both norms come divided by the scale of the inputs they
    feed.
    """
    assert cache_mode == 1
    ropes, width = rope_cache.shape[-1], key_cache.shape[-1]
    made = _normalized_product(hidden, norm, beta, scale, offset, down, down_bias, down_deq)
    latent, key_rope, query = np.split(made, [width, width + ropes], -1)
    write_cache(key_cache, rms_norm(((_FUSED_EPSILON,), {}), latent, latent_norm)[0], slots)
    queries = _normalized_product(
        query, query_norm, query_beta, query_scale, query_offset, up, up_bias, up_deq
    ).reshape(len(made), array(absorb).shape[0], -1)
    rotary = ((), {"rotary_coeff": 2})
    turned, key_rope = rotate(
        rotary, Tensor(np.ascontiguousarray(queries[..., -ropes:])), Tensor(key_rope), cos, sin, None
    )
    write_cache(rope_cache, key_rope, slots)
    absorbed = np.einsum("thn,hnl->thl", queries[..., :-ropes], array(absorb)).astype(np.float32)
    return Tensor(absorbed), key_cache, turned, rope_cache


_FUSED_EPSILON = 1e-5
"""Of the fused operator's norms, which takes none; the tiny models have it."""


def _normalized_product(
    x: Any, norm: Any, beta: Any, scale: Any, offset: Any, weight: Any, bias: Any, deq_scale: Any
) -> Any:
    values = array(rms_norm(((_FUSED_EPSILON,), {}), x, norm)[0]) + array(beta)
    offsets = array(offset).astype(np.float32)
    quantized = np.clip(np.rint(values / array(scale)) + offsets, -128, 127).astype(np.int8)
    return array(quantized_product(Tensor(quantized), weight, deq_scale, bias, None))


# Several processes


class _Collective:
    """A collective of MindSpore between this machine's processes, by torch's gloo group of the same ranks."""

    def __init__(self, *_: Any, **attributes: Any) -> None:
        self.group = attributes["group"]

    def parts(self, tensor: Any) -> list[Any]:
        import torch
        from vllm.distributed.parallel_state import get_tp_group

        CALLS[type(self).__name__] += 1
        mine = torch.from_numpy(np.ascontiguousarray(array(tensor)))
        gathered = [torch.empty_like(mine) for _ in range(get_tp_group().world_size)]
        torch.distributed.all_gather(gathered, mine, group=get_tp_group().cpu_group)
        return [part.numpy() for part in gathered]


class AllReduce(_Collective):
    """The sum over the processes, in the order of their ranks."""

    def __call__(self, tensor: Any) -> Tensor:
        return Tensor(np.sum(self.parts(tensor), axis=0, dtype=np.float64).astype(np.float32))


class AllGather(_Collective):
    """The processes' tensors, one after the other."""

    def __call__(self, tensor: Any) -> Tensor:
        return Tensor(np.concatenate(self.parts(tensor)))


def all_reduce(tensor: Any, *_: Any, group: str, **__: Any) -> tuple[Tensor, None]:
    """As `AllReduce`; with the handle of one that does not wait."""
    return AllReduce(group=group)(tensor), None


def rank(*_: Any, **__: Any) -> int:
    """This process's number, as vLLM has started it."""
    return _torch_group("get_rank", 0)


def group_size(*_: Any, **__: Any) -> int:
    """How many processes there are."""
    return _torch_group("get_world_size", 1)


def _torch_group(name: str, alone: int) -> int:
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_initialized():
        return alone
    return getattr(torch.distributed, name)()


COMMUNICATION = {
    "init": lambda *_, **__: None,
    "create_group": lambda *_, **__: None,
    "_is_initialized": lambda: True,
    "get_rank": rank,
    "get_group_size": group_size,
    "all_reduce": all_reduce,
}
"""MindSpore's functions between processes, which MindFormers calls."""


# What only the CPU lacks


def filled(value: float) -> Callable[..., Tensor]:
    """`mint.zeros` and the like, which make no bfloat16 on a CPU; they take torch's dtypes too, as
    msadapter's."""

    def make(*shape: Any, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
        sizes = shape[0] if len(shape) == 1 else shape
        named = ms.float32 if dtype is None else getattr(ms, str(dtype).rpartition(".")[2].lower(), dtype)
        return Tensor(np.full(sizes, value, np.float32), named)

    return make


def graph(function: Any = None, **_: Any) -> Any:
    """`mindspore.jit` without a graph, which cannot hold NumPy; as in one, what was true at its making
    stays."""
    if function is None:
        return graph
    context = sys.modules.get("vllm_mindspore.model_executor.utils")
    phase = context.get_model_context("is_prefill") if context else None

    def run(*arguments: Any, **options: Any) -> Any:
        if context:
            context.set_model_context("is_prefill", phase)
        return function(*arguments, **options)

    return run


def _assign_slice(self: Parameter, index: Any, value: Any) -> None:
    held = array(self).copy()
    if isinstance(value, Tensor):
        _note_cast(self, value)
        value = array(value)
    held[index] = value
    self.set_data(Tensor(held, self.dtype))


def _note_cast(parameter: Parameter, value: Any) -> None:
    if hasattr(value, "dtype") and value.dtype != parameter.dtype:
        CASTS.append(f"{parameter.name}: {value.dtype} -> {parameter.dtype}")


def compute_in_float32(parameters: Any, cells: Any = ()) -> None:
    """Hold a loaded network's bfloat16 and float16 values as float32.

    Args:
        parameters: all of it.
        cells: all of it; they keep what follows from parameters, or is no parameter.
    """
    halves = (ms.bfloat16, ms.float16)
    for parameter in parameters:
        if parameter.dtype in halves:
            parameter.set_dtype(ms.float32)
    for cell in cells:
        for name, value in {**vars(cell), **getattr(cell, "_tensor_list", {})}.items():
            if isinstance(value, Tensor) and not isinstance(value, Parameter) and value.dtype in halves:
                setattr(cell, name, value.astype(ms.float32))


def install(*, custom_ops: bool = True) -> None:
    """Put the operators in their places.

    Args:
        custom_ops: whether the package ms_custom_ops is there, with which vLLM-MindSpore uses fused latent
            attention below a tensor parallelism of 16.
    """
    import mindspore.communication as communication
    import mindspore.communication.comm_func as comm_func
    import mindspore.ops.auto_generate as generated
    import mindspore.ops.operations as operations
    import mindspore.ops.operations.nn_ops as nn_ops

    ms.set_context(device_target="CPU", mode=ms.PYNATIVE_MODE)
    ms.runtime.launch_blocking()
    ms.jit = graph
    mint.zeros, mint.empty, mint.ones = filled(0), filled(0), filled(1)
    mint.index_select = lambda x, axis, index: Tensor(np.take(array(x), array(index), axis))
    mint.repeat_interleave = lambda x, count, dim: Tensor(np.repeat(array(x), count, dim))
    set_data = Parameter.set_data

    def checked_set_data(self: Parameter, data: Any, *arguments: Any, **options: Any) -> Any:
        _note_cast(self, data)
        return set_data(self, data, *arguments, **options)

    Parameter.set_data, Parameter.__setitem__ = checked_set_data, _assign_slice
    Tensor.move_to = ops.move_to = lambda tensor, *_, **__: tensor
    made = {
        name: operator(name, function)
        for name, function in {
            "QuantV2": quantize,
            "DynamicQuantExt": quantize_rows,
            "QuantBatchMatmul": quant_batch_matmul_operator,
            "GroupedMatmulV4": grouped_matmul,
            "MoeInitRoutingV2": route_tokens,
            "MoeTokenUnpermute": unroute_tokens,
            "FusedAddTopKDiv": choose_experts,
            "RmsNorm": rms_norm,
            "ApplyRotaryPosEmb": rotate,
            "ReshapeAndCache": reshape_and_cache,
            "FlashAttentionScore": flash_attention,
            "PagedAttention": paged_attention,
        }.items()
    } | {"AllReduce": AllReduce, "AllGather": AllGather}
    for name, stand_in in made.items():
        for module in (generated, operations, nn_ops, ops):
            if hasattr(module, name):
                setattr(module, name, stand_in)
    for module in (communication, communication.management, communication._comm_helper, comm_func):
        for name, function in COMMUNICATION.items():
            if hasattr(module, name):
                setattr(module, name, function)
    generated.format_cast = lambda tensor, form: tensor
    if custom_ops:
        package = types.ModuleType("ms_custom_ops")
        for function in (trans_data, quant_batch_matmul, ring_mla):
            setattr(package, function.__name__, counted(function.__name__, function))
        package.reshape_and_cache = counted("reshape_and_cache", split_reshape_and_cache)
        package.mla = counted("mla", latent_attention)
        package.mla_preprocess = counted("mla_preprocess", latent_preprocess)
        sys.modules["ms_custom_ops"] = package
