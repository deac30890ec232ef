"""Decoder layers of DeepSeek-R1 at full size, or of a smaller one, in the FP8 form it is published in.

One dense and one mixture-of-experts layer of full size are 12.1 GB. The values are random, but look like
weights: normal, in FP8 codes with a float32 scale for every block of 128 x 128, each matrix's output about as
large as its input, a few outlier channels in the norms. The codes are stretches of one pool of random codes,
so that writing is bound by the disk; the vocabulary is small, so that the decoder layers are what counts.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 128
MAX_SHARD_BYTES = 2_000_000_000
POOL_BYTES, PIECE_BYTES = 64_000_000, 8_000_000


@dataclass(frozen=True)
class Sizes:
    """The sizes of a DeepSeek-V3; DeepSeek-R1's by default, but for the vocabulary.

    Attributes:
        hidden: channels between layers.
        heads: of attention.
        q_rank: of the queries' compression.
        kv_rank: of the keys' and values' compression.
        nope: channels of a head's query and key without rotary embedding.
        rope: and with it.
        value: channels of a head's value.
        dense: inner channels of a dense feed-forward block.
        expert: inner channels of an expert.
        experts: routed experts of a layer.
        per_token: routed experts that work on a token.
        groups: of experts, of which the router first chooses half.
        vocabulary: tokens.
    """

    hidden: int = 7168
    heads: int = 128
    q_rank: int = 1536
    kv_rank: int = 512
    nope: int = 128
    rope: int = 64
    value: int = 128
    dense: int = 18432
    expert: int = 2048
    experts: int = 256
    per_token: int = 8
    groups: int = 8
    vocabulary: int = 1024

    def config(self, dense: int, moe: int) -> dict[str, Any]:
        """The `config.json` of a model with that many layers of either kind."""
        return CONFIG | {
            "first_k_dense_replace": dense,
            "hidden_size": self.hidden,
            "intermediate_size": self.dense,
            "kv_lora_rank": self.kv_rank,
            "moe_intermediate_size": self.expert,
            "n_group": self.groups,
            "n_routed_experts": self.experts,
            "num_attention_heads": self.heads,
            "num_experts_per_tok": self.per_token,
            "num_hidden_layers": dense + moe,
            "num_key_value_heads": self.heads,
            "q_lora_rank": self.q_rank,
            "qk_nope_head_dim": self.nope,
            "qk_rope_head_dim": self.rope,
            "topk_group": max(1, self.groups // 2),
            "v_head_dim": self.value,
            "vocab_size": self.vocabulary,
        }


CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_layer_freq": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 0,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
"""The published `config.json` without the sizes and the remote code that it names."""

FULL = Sizes()

Tensor = tuple[str, str, tuple[int, ...]]
"""A tensor's name, its safetensors dtype and its shape."""


def write_r1_layers(
    folder: Path, *, dense: int = 1, moe: int = 1, sizes: Sizes = FULL, seed: int = 0
) -> Path:
    """Write a DeepSeek-R1 of few layers as a Hugging Face folder, `config.json` last.

    Memory stays below 0.5 GB. The same arguments write the same bytes.

    Args:
        folder: where to write; made if it does not exist.
        dense: layers with a dense feed-forward, which come first; 0.58 GB each in full size.
        moe: layers with experts; 11.5 GB each in full size.
        sizes: of the layers.
        seed: of the values.

    Returns:
        The folder.

    Raises:
        SystemExit: the disk has too little room.
    """
    from benchmarks.tiny_training import train_tokenizer, training_texts

    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(tensors(dense, moe, sizes))
    total = sum(_nbytes(tensor) for shard in shards for tensor in shard)
    if (free := shutil.disk_usage(folder).free) < total + MAX_SHARD_BYTES:
        raise SystemExit(f"{folder}: {total / 1e9:.1f} GB do not fit, {free / 1e9:.1f} GB are free")
    generator = np.random.default_rng(seed)
    pool = _pool(generator)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, shard, pool, generator)
        weight_map |= {tensor[0]: name for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    train_tokenizer(training_texts(), sizes.vocabulary).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(sizes.config(dense, moe), indent=2))
    return folder


def tensors(dense: int, moe: int, sizes: Sizes = FULL) -> Iterator[Tensor]:
    """Every tensor of such a model, in the order in which it is written."""
    hidden, heads, q_rank, kv_rank = sizes.hidden, sizes.heads, sizes.q_rank, sizes.kv_rank
    yield "model.embed_tokens.weight", "BF16", (sizes.vocabulary, hidden)
    for index in range(dense + moe):
        layer = f"model.layers.{index}"
        yield f"{layer}.input_layernorm.weight", "BF16", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", "BF16", (hidden,)
        yield f"{layer}.self_attn.q_a_layernorm.weight", "BF16", (q_rank,)
        yield f"{layer}.self_attn.kv_a_layernorm.weight", "BF16", (kv_rank,)
        yield from _linear(f"{layer}.self_attn.q_a_proj", q_rank, hidden)
        yield from _linear(f"{layer}.self_attn.q_b_proj", heads * (sizes.nope + sizes.rope), q_rank)
        yield from _linear(f"{layer}.self_attn.kv_a_proj_with_mqa", kv_rank + sizes.rope, hidden)
        yield from _linear(f"{layer}.self_attn.kv_b_proj", heads * (sizes.nope + sizes.value), kv_rank)
        yield from _linear(f"{layer}.self_attn.o_proj", hidden, heads * sizes.value)
        if index < dense:
            yield from _feed_forward(f"{layer}.mlp", hidden, sizes.dense)
            continue
        yield f"{layer}.mlp.gate.weight", "BF16", (sizes.experts, hidden)
        yield f"{layer}.mlp.gate.e_score_correction_bias", "F32", (sizes.experts,)
        yield from _feed_forward(f"{layer}.mlp.shared_experts", hidden, sizes.expert)
        for expert in range(sizes.experts):
            yield from _feed_forward(f"{layer}.mlp.experts.{expert}", hidden, sizes.expert)
    yield "model.norm.weight", "BF16", (hidden,)
    yield "lm_head.weight", "BF16", (sizes.vocabulary, hidden)


def _feed_forward(name: str, hidden: int, inner: int) -> Iterator[Tensor]:
    yield from _linear(f"{name}.gate_proj", inner, hidden)
    yield from _linear(f"{name}.up_proj", inner, hidden)
    yield from _linear(f"{name}.down_proj", hidden, inner)


def _linear(name: str, rows: int, columns: int) -> Iterator[Tensor]:
    yield f"{name}.weight", "F8_E4M3", (rows, columns)
    yield f"{name}.weight_scale_inv", "F32", (-(-rows // BLOCK), -(-columns // BLOCK))


def _nbytes(tensor: Tensor) -> int:
    _, dtype, shape = tensor
    return int(np.prod(shape)) * {"F8_E4M3": 1, "BF16": 2, "F32": 4}[dtype]


def _shards(tensors: Iterator[Tensor]) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if size + _nbytes(tensor) > MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += _nbytes(tensor)
    return shards


def _write_shard(
    path: Path, shard: list[Tensor], pool: NDArray[np.uint8], generator: np.random.Generator
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard:
        name, dtype, shape = tensor
        end = offset + _nbytes(tensor)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in shard:
            if tensor[1] == "F8_E4M3":
                for done in range(0, _nbytes(tensor), PIECE_BYTES):
                    start = int(generator.integers(POOL_BYTES - PIECE_BYTES))
                    file.write(pool[start : start + min(PIECE_BYTES, _nbytes(tensor) - done)].data)
            else:
                file.write(_values(*tensor, generator).tobytes())


def _pool(generator: np.random.Generator) -> NDArray[np.uint8]:
    """FP8 codes of normal values, of which the largest in a block is about the largest code, 448."""
    import ml_dtypes

    pool = np.empty(POOL_BYTES, np.uint8)
    for start in range(0, POOL_BYTES, PIECE_BYTES):
        values = 112 * generator.standard_normal(PIECE_BYTES, np.float32)
        codes = np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        pool[start : start + PIECE_BYTES] = codes.view(np.uint8)
    return pool


def _values(name: str, dtype: str, shape: tuple[int, ...], generator: np.random.Generator) -> NDArray[Any]:
    """Everything but the FP8 codes."""
    import ml_dtypes

    values = generator.standard_normal(shape, np.float32)
    if name.endswith("scale_inv"):
        # A standard deviation of 1 / sqrt(K) for the weights, within a few percent for whole blocks.
        return np.exp(0.2 * values) / np.float32(112 * np.sqrt(shape[1] * BLOCK))
    if name.endswith("norm.weight"):
        values = 1 + 0.1 * values
        values[generator.choice(len(values), len(values) // 256, replace=False)] *= 8
    elif name.endswith("correction_bias"):
        values *= 0.01
    elif not name.startswith("model.embed"):
        values /= np.float32(np.sqrt(shape[1]))
    return values if dtype == "F32" else values.astype(ml_dtypes.bfloat16)
