"""Texts to batches of tokens: the windows that a model is calibrated or evaluated on."""

from collections.abc import Sequence
from itertools import pairwise, zip_longest

import numpy as np
from numpy.typing import NDArray

from msquant.calibration.builtin import Domain, evaluation_texts
from msquant.checkpoint.tokenizer import Tokenizer, leading_tokens
from msquant.errors import CalibrationError

_SEPARATOR = "\n\n"


def calibration_batches(
    domains: Sequence[Domain], tokenizer: Tokenizer, *, samples: int, sequence_length: int, seed: int
) -> NDArray[np.int32]:
    """Choose calibration samples from the texts of several domains.

    Every domain's texts are concatenated and cut into as many equal stretches as it gives samples; a sample
    is a window at a random place in its stretch, so samples never overlap and cover the whole text. A domain
    gives samples in proportion to its weight; what a short one cannot give, the others do. Domains take
    turns. Samples start with the BOS token if the tokenizer puts one in front of every text, as it will be
    there when the model is used.

    Args:
        domains: the texts, as `load_texts` returns them.
        tokenizer: the model's tokenizer.
        samples: the number of samples.
        sequence_length: the tokens in a sample.
        seed: of the places; the same seed gives the same samples.

    Returns:
        Token ids, int32 `[samples, sequence_length]`.

    Raises:
        CalibrationError: a number is out of range, or there is too little text.
    """
    for name, value, least in (
        ("samples", samples, 1),
        ("sequence length", sequence_length, 2),
        ("seed", seed, 0),
    ):
        if value < least:
            raise CalibrationError(f"the {name} is {value}", remedy=f"It must be at least {least}.")
    prefix = leading_tokens(tokenizer)
    length = sequence_length - len(prefix)
    streams = [_encode(domain.texts, tokenizer) for domain in domains]
    capacities = [len(stream) // length for stream in streams]
    if sum(capacities) < samples:
        raise CalibrationError(
            f"{samples} samples of {sequence_length} tokens need {samples * sequence_length:,} tokens, and "
            f"the text has {sum(len(stream) for stream in streams):,}, enough for {sum(capacities)} samples",
            where=", ".join(domain.name for domain in domains) or "calibration text",
            remedy=_remedy(sum(capacities)),
        )
    counts = _shares([domain.weight for domain in domains], capacities, samples)
    generator = np.random.default_rng(seed)
    windows = [
        _windows(stream, count, length, generator) for stream, count in zip(streams, counts, strict=True)
    ]
    turns = [window for turn in zip_longest(*windows) for window in turn if window is not None]
    return np.array([prefix + window.tolist() for window in turns], dtype=np.int32)


def evaluation_tokens(
    tokenizer: Tokenizer, *, sequences: int = 8, sequence_length: int = 512
) -> NDArray[np.int32]:
    """Choose windows, evenly spread, of the text that builtin calibration leaves for evaluation.

    Args:
        tokenizer: the model's tokenizer.
        sequences: the number of windows; the first starts and the last ends with the text.
        sequence_length: the tokens in a window, a BOS token included if the tokenizer puts one in front.

    Returns:
        Token ids, int32 `[sequences, sequence_length]`.

    Raises:
        CalibrationError: the windows would overlap.
    """
    domain = Domain("evaluation text", 1, evaluation_texts())
    return spread_windows(domain, tokenizer, sequences=sequences, sequence_length=sequence_length)


def spread_windows(
    domain: Domain, tokenizer: Tokenizer, *, sequences: int, sequence_length: int, fewer: bool = False
) -> NDArray[np.int32]:
    """Choose windows, evenly spread, of one domain's texts.

    Args:
        domain: the texts.
        tokenizer: the model's tokenizer.
        sequences: the number of windows; the first starts and the last ends with the text.
        sequence_length: the tokens in a window, a BOS token included if the tokenizer puts one in front.
        fewer: take as many as there are, at least one, of a text that is too short for all.

    Returns:
        Token ids, int32 `[sequences, sequence_length]`.

    Raises:
        CalibrationError: the windows would overlap; with `fewer`, the text is shorter than one.
    """
    prefix = leading_tokens(tokenizer)
    length = sequence_length - len(prefix)
    stream = _encode(domain.texts, tokenizer)
    if fewer:
        sequences = max(1, min(sequences, len(stream) // length))
    if sequences * length > len(stream):
        windows = f"{sequences} windows" if sequences > 1 else "one window"
        raise CalibrationError(
            f"{windows} of {sequence_length} tokens are more than the {len(stream):,} there are",
            where=domain.name,
            remedy="Ask for fewer or shorter windows, or give more text.",
        )
    starts = np.linspace(0, len(stream) - length, sequences).astype(int)
    return np.array([prefix + stream[start : start + length].tolist() for start in starts], dtype=np.int32)


def _encode(texts: Sequence[str], tokenizer: Tokenizer) -> NDArray[np.int32]:
    """All texts as one run of tokens, a blank line between them, without special tokens."""
    parts = [tokenizer.encode(text + _SEPARATOR, add_special_tokens=False) for text in texts]
    return np.array([token for part in parts for token in part], dtype=np.int32)


def _shares(weights: Sequence[float], capacities: Sequence[int], samples: int) -> list[int]:
    """Split `samples` in proportion to the weights, by highest averages (D'Hondt), within the capacities."""
    counts = [0] * len(weights)
    for _ in range(samples):
        open_domains = [i for i in range(len(weights)) if counts[i] < capacities[i]]
        counts[max(open_domains, key=lambda i: (weights[i] / (counts[i] + 1), -i))] += 1
    return counts


def _windows(
    stream: NDArray[np.int32], count: int, length: int, generator: np.random.Generator
) -> list[NDArray[np.int32]]:
    """One window at a random place in each of `count` equal stretches of the stream."""
    edges = [len(stream) * i // count for i in range(count + 1)] if count else []
    windows = []
    for start, end in pairwise(edges):
        place = start + generator.integers(0, end - start - length + 1)
        windows.append(stream[place : place + length])
    return windows


def _remedy(possible: int) -> str:
    if possible == 0:
        return "Shorten the sequence length, or give more text."
    return f"Ask for at most {possible} samples, shorten the sequence length, or give more text."
