"""Token ids of large sources, kept by the content of the texts and of the tokenizer."""

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from msquant.calibration.tokens import TEXTS_AT_ONCE
from msquant.checkpoint.cache import cache_folder

LARGE = 2_000_000
"""Characters: tokenizing less takes a second or two, and is not kept."""

_KEPT = 8
_STEP = 1_000_000

Encoder = Callable[[Any, Sequence[str]], list[NDArray[np.int32]]]


def cached_tokens(
    tokenizer: Any,
    folder: Path,
    texts: Sequence[str],
    encode: Encoder,
    step: Callable[[str], None] = lambda text: None,
) -> list[NDArray[np.int32]]:
    """The token ids of each text; those of a large source are computed once.

    Args:
        tokenizer: of the model.
        folder: where its `tokenizer.json` lies.
        texts: of one source.
        encode: computes them.
        step: called with how far it is.
    """
    total = sum(map(len, texts))
    source = folder / "tokenizer.json"
    if total < LARGE or not source.is_file():
        return encode(tokenizer, texts)
    digest = hashlib.sha256(source.read_bytes())
    for text in texts:
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text.encode("utf-8", "surrogatepass"))
    path = cache_folder() / "tokens" / f"{digest.hexdigest()}.safetensors"
    with suppress(OSError, KeyError, SafetensorError):
        kept = load_file(path)
        ids, ends = kept["ids"], kept["ends"]
        if len(ends) == len(texts) and ids.dtype == np.int32:
            os.utime(path)
            return np.split(ids, ends[:-1])
    found: list[NDArray[np.int32]] = []
    done = said = 0
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        batch = texts[start : start + TEXTS_AT_ONCE]
        found += encode(tokenizer, batch)
        done += sum(map(len, batch))
        if done - said >= _STEP or done == total:
            said = done
            step(f"tokenizing {done / total:.0%} of {total / 1e6:.1f} million characters")
    # The next run computes them again where this cannot be written.
    with suppress(OSError):
        _keep(path, found)
    return found


def _keep(path: Path, found: Sequence[NDArray[np.int32]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    ends = np.cumsum([len(each) for each in found])
    save_file({"ids": np.concatenate(found), "ends": ends}, temporary)
    temporary.replace(path)
    others = sorted(path.parent.glob("*.safetensors"), key=lambda other: other.stat().st_mtime)
    for other in others[:-_KEPT]:
        other.unlink()
