"""A Llama model in one GGUF file to a Hugging Face folder: bf16 safetensors shards, config, tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.checkpoint_reader import INDEX_NAME
from msquant.checkpoint.writer import shard_name
from msquant.errors import ModelError

MAX_SHARD_BYTES = 100_000_000

_GLOBAL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_gguf(source: Path, folder: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Convert the Llama model in `source` and write it into the existing folder `folder`.

    Quantized tensors are dequantized to float32 and rounded to bfloat16. At most one shard is in memory.

    Args:
        source: a GGUF file of architecture `llama` with a `gpt2` (byte-level BPE) tokenizer.
        folder: an empty folder.
        progress: called with the number of tensors written and their total.

    Raises:
        ModelError: the file is damaged, or holds another architecture or another kind of tokenizer.
        OSError: the folder cannot be written.
    """
    from gguf import GGUFReader
    from ml_dtypes import bfloat16
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        reader = GGUFReader(source)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ModelError(
            f"not a complete GGUF file ({error})", where=source, remedy="Download or install it again."
        ) from error
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ModelError(f"the architecture {architecture!r} is not supported, only 'llama' is", where=source)
    tensors = {_hugging_face_name(tensor.name, source): tensor for tensor in reader.tensors}
    config = _config(metadata, tied="lm_head.weight" not in tensors, source=source)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}

    shards = _plan_shards({name: 2 * int(tensor.n_elements) for name, tensor in tensors.items()})
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        file_name = shard_name(i, len(shards))
        shard = {}
        for name in names:
            values = _dequantize(tensors[name])
            module = name.split(".")[-2]
            if module in heads:
                values = _rope_rows_to_halves(values, heads[module])
            shard[name] = np.ascontiguousarray(values).astype(bfloat16)
            weight_map[name] = file_name
            if progress:
                progress(len(weight_map), len(tensors))
        try:
            save_file(shard, folder / file_name, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
    total = sum(2 * int(tensor.n_elements) for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / INDEX_NAME, index)
    write_tokenizer(metadata, folder, max_length=config["max_position_embeddings"], source=source)
    token_ids = {
        key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config
    }
    _write_json(folder / "generation_config.json", token_ids)
    _write_json(folder / "config.json", config)


def _hugging_face_name(name: str, source: Path) -> str:
    module, _, kind = name.rpartition(".")
    if kind in ("weight", "bias"):
        if module in _GLOBAL_NAMES:
            return f"{_GLOBAL_NAMES[module]}.{kind}"
        block, _, part = module.partition(".")[2].partition(".")
        if module.startswith("blk.") and part in _LAYER_NAMES:
            return f"model.layers.{block}.{_LAYER_NAMES[part]}.{kind}"
    raise ModelError(f"the tensor {name!r} is not one of a Llama model without rope scaling", where=source)


def _dequantize(tensor: Any) -> NDArray[np.float32]:
    from gguf.quants import dequantize

    values: NDArray[np.float32] = dequantize(tensor.data, tensor.tensor_type)
    return values


def _rope_rows_to_halves(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo llama.cpp's row order of the query and key projections.

    GGUF keeps the two elements of a rotated pair in neighbouring rows of each head; Hugging Face keeps them
    half a head apart (`permute` in llama.cpp's convert_hf_to_gguf.py is the inverse).
    """
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _config(metadata: dict[str, Any], *, tied: bool, source: Path) -> dict[str, Any]:
    if "llama.rope.scaling.type" in metadata and metadata["llama.rope.scaling.type"] != "none":
        raise ModelError("scaled rotary embeddings in a GGUF file are not supported", where=source)
    try:
        hidden_size, heads = metadata["llama.embedding_length"], metadata["llama.attention.head_count"]
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
            "hidden_size": hidden_size,
            "intermediate_size": metadata["llama.feed_forward_length"],
            "num_hidden_layers": metadata["llama.block_count"],
            "num_attention_heads": heads,
            "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
            "head_dim": metadata.get("llama.attention.key_length", hidden_size // heads),
            "hidden_act": "silu",
            "max_position_embeddings": metadata["llama.context_length"],
            "rms_norm_eps": _shortest(metadata["llama.attention.layer_norm_rms_epsilon"]),
            "rope_theta": _shortest(metadata.get("llama.rope.freq_base", 10000.0)),
            "rope_scaling": None,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": tied,
            "torch_dtype": "bfloat16",
            "use_cache": True,
        }
    except KeyError as error:
        raise ModelError(f"the metadata has no {error}", where=source) from error
    for name, key in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")):
        if (token := metadata.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            config[key] = token
    return config


def _shortest(value: float) -> float:
    """The shortest decimal number that is the same float32: 1e-05 rather than 9.999999747e-06."""
    return float(str(np.float32(value)))


def _plan_shards(sizes: dict[str, int]) -> list[list[str]]:
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = MAX_SHARD_BYTES
        shards[-1].append(name)
        room -= size
    return shards


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# Values of `tokenizer.ggml.token_type` in the GGUF specification.
_CONTROL = 3
_USER_DEFINED = 4

# `tokenizer.ggml.pre` of tokenizers that split every digit off before the byte-level step.
_DIGITS_FIRST = ("smollm",)


def write_tokenizer(metadata: dict[str, Any], folder: Path, *, max_length: int, source: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`.

    Control tokens become special added tokens. No token is put in front of a text: the file says
    `add_bos_token = false`, and a file that says otherwise is refused rather than converted wrongly.

    Args:
        metadata: the GGUF file's key-value pairs.
        folder: where to write; must exist.
        max_length: the model's context length in tokens.
        source: the GGUF file, for messages.

    Raises:
        ModelError: the tokenizer is of another kind, or its metadata is incomplete.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or split not in _DIGITS_FIRST:
        raise ModelError(
            f"the tokenizer {kind!r} with pre-tokenizer {split!r} is not supported, only 'gpt2' with "
            f"{' or '.join(repr(name) for name in _DIGITS_FIRST)}",
            where=source,
        )
    if metadata.get("tokenizer.ggml.add_bos_token"):
        raise ModelError("a tokenizer that adds a BOS token is not supported", where=source)
    try:
        tokens: list[str] = metadata["tokenizer.ggml.tokens"]
        types: list[int] = metadata["tokenizer.ggml.token_type"]
        merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    except KeyError as error:
        raise ModelError(f"the metadata has no {error}", where=source) from error

    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(t, special=True, normalized=False)
            for t, kind in zip(tokens, types, strict=True)
            if kind == _CONTROL
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(t, normalized=False)
            for t, kind in zip(tokens, types, strict=True)
            if kind == _USER_DEFINED
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))

    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        if (token := metadata.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            config[f"{key}_token"] = tokens[token]
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
