"""Loads the tokenizer that lies beside a checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from msquant.checkpoint.folder_files import require_own_files
from msquant.checkpoint.transformers_import import import_transformers
from msquant.errors import ModelError


class Tokenizer(Protocol):
    """What msquant needs of a tokenizer; every Hugging Face tokenizer has it."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`, with the model's special tokens around it unless told otherwise."""
        ...

    def __call__(self, text: list[str], *, add_special_tokens: bool = True) -> Mapping[str, Any]:
        """The same for several texts: `input_ids` has the list of each."""
        ...


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer in `folder`; nothing is downloaded and no code from the folder is run.

    Args:
        folder: a checkpoint folder.

    Returns:
        A `transformers.PreTrainedTokenizerBase`, which satisfies `Tokenizer`. Texts longer than the model's
        context are encoded without a warning: they are cut afterwards.

    Raises:
        ModelError: the folder holds no tokenizer, or a damaged one, or one that needs code of its own.
        CheckpointError: as `require_own_files`.
    """
    require_own_files(folder)
    remedy = "Copy tokenizer.json and tokenizer_config.json from the original model into the folder."
    if not has_tokenizer(folder):
        raise ModelError("the folder holds no tokenizer.json", where=folder, remedy=remedy)
    auto_tokenizer = import_transformers().AutoTokenizer
    try:
        tokenizer = auto_tokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    # The Rust tokenizers library raises plain Exception for a tokenizer.json that it cannot read.
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"the tokenizer cannot be loaded ({first_line})", where=folder, remedy=remedy
        ) from error
    # The flag by which transformers remembers that it has given this warning.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether there is a tokenizer beside a checkpoint."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def leading_tokens(tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that `tokenizer` puts in front of every text: its BOS token, or none."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return [bos] if bos is not None and list(tokenizer.encode(""))[:1] == [bos] else []
