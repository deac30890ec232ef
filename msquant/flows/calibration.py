"""A recipe's calibration section to samples: sources read, texts tokenized, and a record of both.

All of it happens before the first decoder layer is computed, so what is wrong with a source costs no time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msquant.calibration.builtin import calibration_domains
from msquant.calibration.domains import Domain
from msquant.calibration.rows import Template
from msquant.calibration.sources import Reading, Source, SourceTexts, parse_source
from msquant.calibration.streaming import MAX_CHARACTERS
from msquant.calibration.token_cache import cached_tokens
from msquant.calibration.tokens import Samples, SourceShare, choose_samples, encode_texts
from msquant.checkpoint.tokenizer import leading_tokens, load_tokenizer
from msquant.errors import CalibrationError, EngineError
from msquant.hub.models import resolve_model
from msquant.interrupts import check_interrupt
from msquant.progress import Progress
from msquant.recipe.recipe import CalibrationSettings

SEED_TOKENS = 4
"""Tokens of builtin text that the model's own words begin with."""

_RESERVE = 64
"""Characters that are read of a larger source for each token that is wanted: about 16 times the need."""
_LEAST_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Calibration:
    """What a model is calibrated on.

    Attributes:
        samples: the tokens.
        spare: further ones, which only feed the experts of a mixture; None for none.
        sources: of each source in the mix: the word, its samples and tokens, and where it is from.
    """

    samples: Samples
    spare: Samples | None
    sources: list[dict[str, Any]]

    @property
    def size(self) -> int:
        """Tokens of all samples."""
        return self.samples.size + (self.spare.size if self.spare else 0)

    @property
    def record(self) -> dict[str, Any]:
        """What the manifest keeps."""
        return {
            "shape": list(self.samples.tokens.shape),
            "tokens": self.samples.size,
            "sha256": self.samples.sha256,
            **({"spare": {"tokens": self.spare.size, "sha256": self.spare.sha256}} if self.spare else {}),
            "sources": self.sources,
        }


@dataclass(frozen=True)
class ShownSample:
    """A sample as the model sees it.

    Attributes:
        source: the word of its source.
        tokens: how many.
        text: decoded, special tokens as they are written.
    """

    source: str
    tokens: int
    text: str


@dataclass(frozen=True)
class ShownCalibration:
    """What `look_at_calibration` found: everything, and the first samples of each source as text."""

    calibration: Calibration
    first: list[ShownSample]


def look_at_calibration(
    settings: CalibrationSettings,
    model: str,
    first: int,
    *,
    offline: bool = False,
    progress: Progress | None = None,
) -> ShownCalibration:
    """Choose the samples of a recipe as `quantize` would, and decode the first of each source.

    Args:
        settings: the recipe's section.
        model: as `resolve_model` takes it; its tokenizer is what is needed.
        first: so many samples of each source.
        offline: ask no hub.
        progress: callbacks.

    Raises:
        MsquantError: as `resolve_model` and `calibration_of`.
    """
    require_sources(settings)
    folder = resolve_model(model, note=progress.stage if progress else lambda text: None)
    found = calibration_of(settings, folder, offline=offline, progress=progress)
    tokenizer, samples = load_tokenizer(folder), found.samples
    shown = []
    for number, source in enumerate(found.sources):
        places = [place for place, of in enumerate(samples.sources) if of == number]
        for place in places[:first]:
            ids = samples.tokens[place, : samples.lengths[place]].tolist()
            text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            shown.append(ShownSample(source["source"], len(ids), text))
    return ShownCalibration(found, shown)


def require_sources(settings: CalibrationSettings) -> None:
    """Refuse local sources that are not there, before any work. Raises CalibrationError."""
    for word in settings.sources:
        source = parse_source(word)
        source.place.require(source.word)


def calibration_of(
    settings: CalibrationSettings, folder: Path, *, offline: bool = False, progress: Progress | None = None
) -> Calibration:
    """Read the sources of a recipe and choose its samples, by the tokenizer of a model.

    Args:
        settings: the recipe's section.
        folder: the model's.
        offline: ask no hub.
        progress: callbacks.

    Raises:
        CalibrationError: a source is missing, unreadable or too short; names it, and the row where it can.
        HubError: a hub refuses.
        EngineError: the model is to continue texts itself, and does not fit into memory.
    """
    progress = progress or Progress()
    tokenizer = load_tokenizer(folder)
    sources = [parse_source(word) for word in settings.sources]
    length, most = settings.sequence_length, settings.most
    reading = Reading(
        template=Template(settings.template) if settings.template is not None else None,
        tokenizer=tokenizer if settings.chat_template else None,
        characters=most_characters(settings),
        seed=settings.seed,
        offline=offline,
        note=progress.stage,
        generate=partial(own_words, folder, tokenizer, length, settings.seed, progress),
    )
    read: list[SourceTexts] = []
    for source in sources:
        progress.stage(f"calibration from {source.word}")
        read.append(source.place.read(source.word, reading, most if source.count is None else source.count))
        check_interrupt()

    def encode(texts: Sequence[str]) -> list[NDArray[np.int32]]:
        return cached_tokens(tokenizer, folder, texts, encode_texts, progress.step)

    samples = choose_samples(
        [
            SourceShare(source.word, texts.domains, source.count, source.weight)
            for source, texts in zip(sources, read, strict=True)
        ],
        tokenizer,
        samples=most,
        sequence_length=length,
        seed=settings.seed,
        pack=settings.pack,
        encode=encode,
    )
    first, spare = samples.split(settings.total)
    return Calibration(first, spare, _records(sources, read, samples))


def own_words(
    folder: Path, tokenizer: Any, length: int, seed: int, progress: Progress, count: int
) -> list[NDArray[np.int32]]:
    """Samples that a float model writes itself, sampled at temperature 1 behind a few tokens of builtin text.

    All are continued together by the embedded engine. The idea is that of LLM-QAT (arXiv 2305.17888): such
    text has the distribution that the model has learnt.

    Args:
        folder: the model's; its weights have to fit into memory.
        tokenizer: the model's.
        length: tokens of each sample.
        seed: of places in the text and of the sampling; the same seed gives the same samples.
        progress: callbacks.
        count: how many samples.

    Returns:
        Token ids, int32 `[length]` each.

    Raises:
        EngineError: the model does not fit into memory.
    """
    from msquant.flows.engines import load_embedded
    from msquant.inference.engine_protocol import Sampling

    progress.stage(f"the model writes {count} samples of {length} tokens itself")
    try:
        engine = load_embedded(folder)
    except EngineError as error:
        raise EngineError(
            f"the model cannot write its own samples here: {error.what}",
            where="self",
            remedy="use a machine with more memory, or other sources: builtin, a file, or hf:ORG/NAME",
        ) from error
    generator, domains = np.random.default_rng(seed), calibration_domains()
    begins = [_begin(tokenizer, domains, generator) for _ in range(count)]
    room = [length - len(begin) for begin in begins]
    if min(room) < 1:
        raise CalibrationError(
            f"samples of {length} tokens are too short to be written by the model",
            where="self",
            remedy=f"ask for at least {length - min(room) + 1} with --sequence-length",
        )
    running = [
        engine.tokens(
            begin, Sampling(max_tokens=left, temperature=1.0, top_p=1.0, seed=seed, ignore_eos=True), index
        )
        for index, (begin, left) in enumerate(zip(begins, room, strict=True))
    ]
    written = [list(begin) for begin in begins]
    for place in range(max(room)):
        progress.step(f"token {place + 1} of {max(room)}")
        check_interrupt()
        for tokens, sample in zip(running, written, strict=True):
            token = next(tokens, None)
            if token is not None:
                sample.append(token)
    engine.close()
    return [np.array(sample, dtype=np.int32) for sample in written]


def _begin(tokenizer: Any, domains: Sequence[Domain], generator: np.random.Generator) -> list[int]:
    """A few tokens from a random place of these texts, as a text begins."""
    domain = domains[int(generator.integers(len(domains)))]
    text = domain.texts[int(generator.integers(len(domain.texts)))]
    place = int(generator.integers(max(1, len(text) - 200)))
    words = text[place : place + 200].partition(" ")[2] or text[:200]
    ids = tokenizer.encode(words.lstrip(), add_special_tokens=False)[:SEED_TOKENS]
    return [*leading_tokens(tokenizer), *map(int, ids)]


def most_characters(settings: CalibrationSettings) -> int:
    """How many characters are read of each source, at most: some 16 times what is wanted."""
    wanted = _RESERVE * settings.most * settings.sequence_length
    return min(MAX_CHARACTERS, max(_LEAST_CHARACTERS, wanted))


def _records(
    sources: Sequence[Source], read: Sequence[SourceTexts], samples: Samples
) -> list[dict[str, Any]]:
    records = []
    for number, (source, texts) in enumerate(zip(sources, read, strict=True)):
        own = [length for length, of in zip(samples.lengths, samples.sources, strict=True) if of == number]
        records.append({"source": source.word, "samples": len(own), "tokens": int(sum(own)), **texts.record})
    return records
