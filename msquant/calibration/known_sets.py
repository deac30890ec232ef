"""Datasets that have a short name: those of golden-stick's and the peers' examples. A table of data."""

from dataclasses import dataclass

from msquant.calibration.rows import Exchange, Template


@dataclass(frozen=True)
class KnownSet:
    """Where a dataset is and how its rows become text.

    Attributes:
        word: the source, as `--calibration` takes it.
        licence: as its page states it.
        template: of a row; None where its columns are known by themselves.
    """

    word: str
    licence: str
    template: Template | Exchange | None = None


_CHOICE = "{question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\n答案："  # noqa: RUF001
_CMMLU = "{Question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\n答案："  # noqa: RUF001

KNOWN_SETS = {
    "alpaca": KnownSet("hf:tatsu-lab/alpaca::train", "CC-BY-NC-4.0", Template("{text}")),
    "boolq": KnownSet(
        "hf:google/boolq::train",
        "CC-BY-SA-3.0",
        Exchange(Template("{passage}\n\n{question}?"), Template("{answer}")),
    ),
    "c4": KnownSet("hf:allenai/c4:en:train", "ODC-BY", Template("{text}")),
    "ceval": KnownSet(
        "hf:ceval/ceval-exam:high_school_physics:val",
        "CC-BY-NC-SA-4.0",
        Exchange(Template(_CHOICE), Template("{answer}")),
    ),
    "cmmlu": KnownSet(
        "hf:lmlmcat/cmmlu:agronomy:test", "CC-BY-NC-4.0", Exchange(Template(_CMMLU), Template("{Answer}"))
    ),
    "gsm8k": KnownSet("hf:openai/gsm8k:main:train", "MIT"),
    "open-platypus": KnownSet("hf:garage-bAInd/Open-Platypus::train", "CC-BY-4.0 and others"),
    "pile-10k": KnownSet("hf:NeelNanda/pile-10k::train", "as the Pile's parts", Template("{text}")),
    "squad": KnownSet(
        "hf:rajpurkar/squad::train",
        "CC-BY-SA-4.0",
        Exchange(Template("{context}\n\n{question}"), Template("{answers.text.0}")),
    ),
    "ultrachat": KnownSet("hf:HuggingFaceH4/ultrachat_200k::train_sft", "MIT"),
    "wikitext2": KnownSet(
        "hf:Salesforce/wikitext:wikitext-2-raw-v1:train", "CC-BY-SA-3.0, GFDL", Template("{text}")
    ),
}
"""By short name. No copy comes with msquant: each is read from its hub, under its own licence."""
