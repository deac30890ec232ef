"""Texts to batches of tokens: the windows that a model is calibrated or evaluated on."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, zip_longest

import numpy as np
from numpy.typing import NDArray

from msquant.calibration.builtin import evaluation_texts
from msquant.calibration.domains import Domain
from msquant.checkpoint.tokenizer import Tokenizer, leading_tokens
from msquant.errors import CalibrationError

Encode = Callable[[Sequence[str]], list[NDArray[np.int32]]]
"""Texts to token ids without special tokens, one array a text."""

TEXTS_AT_ONCE = 32
"""Are encoded by all cores together; what the tokenizer says of more would take much memory."""

_SEPARATOR = "\n\n"


@dataclass(frozen=True)
class SourceShare:
    """The texts of one source of a mix, and how many samples it is to give.

    Attributes:
        word: the source, for messages.
        domains: its texts.
        count: so many samples; None for a share of what the others leave.
        weight: that share, relative to the other sources' weights.
    """

    word: str
    domains: Sequence[Domain]
    count: int | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Samples:
    """Calibration samples, the longest first where they differ.

    Attributes:
        tokens: ids, int32 `[samples, longest]`; what is behind a sample's end is 0 and never computed.
        lengths: tokens of each sample, int32 `[samples]`.
        sources: of each sample, the source's number in the mix.
    """

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int32]
    sources: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Tokens of all samples."""
        return int(self.lengths.sum())

    @property
    def sha256(self) -> str:
        """Of the ids, and of the lengths where they differ."""
        digest = hashlib.sha256(self.tokens.tobytes())
        if (self.lengths != self.tokens.shape[1]).any():
            digest.update(self.lengths.tobytes())
        return digest.hexdigest()

    def split(self, count: int) -> "tuple[Samples, Samples | None]":
        """The first so many samples, and the others if there are any."""
        parts = [
            Samples(self.tokens[of, : self.lengths[of].max()], self.lengths[of], self.sources[of])
            for of in (slice(count), slice(count, None))
            if len(self.lengths[of])
        ]
        return parts[0], parts[1] if len(parts) > 1 else None

    def batches(self, most_tokens: int) -> Iterator[NDArray[np.int32]]:
        """The samples in order, `[B, T]`, of one length together and about so many tokens at once."""
        start = 0
        while start < len(self.lengths):
            length = int(self.lengths[start])
            stop = start + max(1, most_tokens // length)
            stop = start + int((self.lengths[start:stop] == length).sum())
            yield self.tokens[start:stop, :length]
            start = stop


def choose_samples(
    sources: Sequence[SourceShare],
    tokenizer: Tokenizer,
    *,
    samples: int,
    sequence_length: int,
    seed: int,
    pack: bool = True,
    encode: Encode | None = None,
) -> Samples:
    """Choose calibration samples from the texts of a mix.

    A source gives its count, or a share of the rest in proportion to its weight; and a domain a share of its
    source's, likewise. What a short one cannot give, the others do. Domains take turns.

    Packed, a domain's texts are concatenated and cut into as many equal stretches as it gives samples; a
    sample is a window at a random place in its stretch, so samples never overlap and cover the whole text.
    Of a domain that a chat template has rendered a sample begins where a conversation begins, and is filled
    with those that follow. Not packed, a sample is one document, cut where it is longer; shorter ones stay
    short.

    Samples start with the BOS token if the tokenizer puts one in front of every text, as it will be there
    when the model is used; a chat template writes its own.

    Args:
        sources: the mix.
        tokenizer: the model's tokenizer.
        samples: the number of samples.
        sequence_length: the tokens in a sample, at most.
        seed: of the places; the same seed gives the same samples.
        pack: fill a sample with as many documents as it takes.
        encode: texts to ids without special tokens, one array a text; by the tokenizer if it is left out.

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
    encode = encode or partial(encode_texts, tokenizer)
    pools = [
        [_Pool(domain, encode, prefix, sequence_length, pack) for domain in source.domains]
        for source in sources
    ]
    capacities = [sum(pool.capacity for pool in each) for each in pools]
    counts = _counts(sources, capacities, samples, sequence_length, pack)
    generator = np.random.default_rng(seed)
    taken: list[list[tuple[int, NDArray[np.int32]]]] = []
    for number, (source, each, count) in enumerate(zip(sources, pools, counts, strict=True)):
        shares = _shares(
            [domain.weight for domain in source.domains], [pool.capacity for pool in each], count
        )
        for pool, share in zip(each, shares, strict=True):
            taken.append([(number, sample) for sample in pool.take(share, generator)])
    turns = [sample for turn in zip_longest(*taken) for sample in turn if sample is not None]
    turns.sort(key=lambda sample: -len(sample[1]))
    lengths = np.array([len(sample) for _, sample in turns], dtype=np.int32)
    tokens = np.zeros((len(turns), int(lengths.max())), dtype=np.int32)
    for row, (_, sample) in zip(tokens, turns, strict=True):
        row[: len(sample)] = sample
    return Samples(tokens, lengths, tuple(number for number, _ in turns))


def _counts(
    sources: Sequence[SourceShare], capacities: Sequence[int], samples: int, length: int, pack: bool
) -> list[int]:
    """How many samples each source gives."""
    asked = [source.count for source in sources]
    for source, count, capacity in zip(sources, asked, capacities, strict=True):
        if count is not None and count > capacity:
            raise _too_little(source.word, count, length, capacity, pack)
    rest = samples - sum(count or 0 for count in asked)
    if rest < 0:
        raise CalibrationError(
            f"the sources give {samples - rest} samples, and {samples} are asked for",
            remedy="ask for as many with --samples, or lower a source's count",
        )
    free = [capacity if count is None else 0 for count, capacity in zip(asked, capacities, strict=True)]
    if sum(free) < rest:
        words = ", ".join(source.word for source, count in zip(sources, asked, strict=True) if count is None)
        raise _too_little(words or "the counts of the sources", rest, length, sum(free), pack)
    shares = _shares([source.weight for source in sources], free, rest)
    return [share if count is None else count for count, share in zip(asked, shares, strict=True)]


class _Pool:
    """The samples that a domain could give.

    Args:
        domain: the texts.
        encode: texts to ids.
        prefix: ids in front of every sample, but for documents that bring their own.
        length: tokens of a sample, the prefix included.
        pack: fill samples with several documents.

    Attributes:
        capacity: how many samples there are.
    """

    def __init__(self, domain: Domain, encode: Encode, prefix: list[int], length: int, pack: bool) -> None:
        whole = domain.rendered or bool(domain.encoded)
        self._prefix = np.array([] if whole else prefix, dtype=np.int32)
        self._length = length - len(self._prefix)
        join = "" if whole or not pack else _SEPARATOR
        documents = list(domain.encoded) or encode([text + join for text in domain.texts])
        self._documents: list[NDArray[np.int32]] = []
        self._stream = np.zeros(0, dtype=np.int32)
        if pack and not whole:
            self._stream = np.concatenate([self._stream, *documents])
            self.capacity = len(self._stream) // self._length
        else:
            self._documents = _filled(documents, self._length) if pack else documents
            self._documents = [each[: self._length] for each in self._documents if len(each) > 1]
            self.capacity = len(self._documents)

    def take(self, count: int, generator: np.random.Generator) -> list[NDArray[np.int32]]:
        """So many samples, spread over the texts."""
        total = len(self._documents) or len(self._stream)
        edges = [total * i // count for i in range(count + 1)] if count else []
        samples = []
        for start, end in pairwise(edges):
            if self._documents:
                sample = self._documents[generator.integers(start, end)]
            else:
                place = start + generator.integers(0, end - start - self._length + 1)
                sample = self._stream[place : place + self._length]
            samples.append(np.concatenate([self._prefix, sample]))
        return samples


def _filled(documents: Sequence[NDArray[np.int32]], length: int) -> list[NDArray[np.int32]]:
    """Runs of consecutive documents that have `length` tokens at least; the last one may be left out."""
    runs, run, size = [], [], 0
    for document in documents:
        run.append(document)
        size += len(document)
        if size >= length:
            runs.append(np.concatenate(run))
            run, size = [], 0
    return runs


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
    parts = encode_texts(tokenizer, [text + _SEPARATOR for text in domain.texts])
    stream = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
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


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[NDArray[np.int32]]:
    """The token ids of each text, int32, without special tokens beyond those that are written in it."""
    found: list[NDArray[np.int32]] = []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        batch = tokenizer(list(texts[start : start + TEXTS_AT_ONCE]), add_special_tokens=False)
        found += [np.array(ids, dtype=np.int32) for ids in batch["input_ids"]]
    return found


def _shares(weights: Sequence[float], capacities: Sequence[int], samples: int) -> list[int]:
    """Split `samples` in proportion to the weights, by highest averages (D'Hondt), within the capacities."""
    counts = [0] * len(weights)
    for _ in range(samples):
        open_domains = [i for i in range(len(weights)) if counts[i] < capacities[i]]
        counts[max(open_domains, key=lambda i: (weights[i] / (counts[i] + 1), -i))] += 1
    return counts


def _too_little(words: str, samples: int, length: int, possible: int, pack: bool) -> CalibrationError:
    remedy = f"ask for at most {possible} samples, shorten the sequence length, or give more text"
    if not possible:
        remedy = "shorten the sequence length, or give more text"
    if not pack:
        return CalibrationError(
            f"{samples} documents are asked for, and there are {possible}", where=words, remedy=remedy
        )
    return CalibrationError(
        f"{samples} samples of {length} tokens are asked for, and the text is enough for {possible}",
        where=words,
        remedy=remedy,
    )
