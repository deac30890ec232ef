"""The byte-level BPE tokenizer in a GGUF file's metadata to Hugging Face tokenizer files."""

import json
from pathlib import Path
from typing import Any

from msquant.errors import ModelError

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
