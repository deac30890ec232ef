"""The embedded engine against lm_eval's own model of transformers."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from msquant.errors import EngineError
from msquant.flows.engines import load_embedded
from msquant.inference import batch
from msquant.progress import Progress

pytest.importorskip("lm_eval", reason="tasks need the extra eval")

from lm_eval.api.instance import Instance

from msquant.tasks.language_model import EmbeddedLM
from tests.server.running import MODEL, running

LONG = "The with statement is used to wrap the execution of a block. " * 40


@pytest.fixture(scope="module")
def own(tiny_llama: Path) -> EmbeddedLM:
    return EmbeddedLM(load_embedded(tiny_llama), Progress())


@pytest.fixture(scope="module")
def theirs(tiny_llama: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(tiny_llama), device="cpu", dtype="float32", batch_size=1)


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def test_loglikelihoods_are_those_of_transformers(own: EmbeddedLM, theirs: Any) -> None:
    """Letters after one context, texts of several tokens, no context, a space at its end, and a long one."""
    asked = requests(
        "loglikelihood",
        *[("Two and two are\nAnswer:", f" {letter}") for letter in "ABCD"],
        ("def f(x):", " return x + 1"),
        ("", "The with statement"),
        ("The with statement ", "is used to wrap"),
        (LONG, " the execution of a block"),
    )
    found = own.loglikelihood(asked)
    for (value, greedy), (expected, likely) in zip(
        found, theirs.loglikelihood(asked, disable_tqdm=True), strict=True
    ):
        assert value == pytest.approx(expected, abs=1e-3)
        assert greedy == likely
    assert len({value for value, _ in found}) == len(asked)


def test_their_model_of_endpoints_gets_the_same_from_our_server(own: EmbeddedLM, tiny_llama: Path) -> None:
    """lm_eval's `local-completions` sums what the server says of each token of an echoed prompt."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    asked = requests(
        "loglikelihood",
        *[("Two and two are\nAnswer:", f" {letter}") for letter in "ABCD"],
        ("def f(x):", " return x + 1"),
        ("The with", " statement is used to wrap"),
    )
    likeliest = own.generate_until(requests("generate_until", ("I am", {"until": [], "max_gen_toks": 2})))
    asked += requests("loglikelihood", ("I am", likeliest[0]))
    expected = own.loglikelihood(asked)
    with running(load_embedded(tiny_llama)) as server:
        endpoint = LocalCompletionsAPI(
            base_url=f"{server.url}/v1/completions",
            model=MODEL,
            tokenizer=str(tiny_llama),
            tokenizer_backend="huggingface",
            max_length=256,
            batch_size=3,
        )
        found = endpoint.loglikelihood(asked, disable_tqdm=True)
        texts = endpoint.loglikelihood_rolling(requests("loglikelihood_rolling", (LONG[:200],)))
    for (value, greedy), (own_value, own_greedy) in zip(found, expected, strict=True):
        assert value == pytest.approx(own_value, abs=1e-4)
        assert greedy == own_greedy
    assert {greedy for _, greedy in found} == {True, False}
    whole = own.loglikelihood_rolling(requests("loglikelihood_rolling", (LONG[:200],)))
    assert texts == pytest.approx(whole, abs=1e-3)


def test_long_texts_in_pieces(own: EmbeddedLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = requests("loglikelihood", (LONG[:40], LONG[:90]))
    whole = own.loglikelihood(asked)
    monkeypatch.setattr(batch, "PREFILL_TOKENS", 7)
    assert own.loglikelihood(asked) == [(pytest.approx(whole[0][0], abs=1e-4), whole[0][1])]


def test_a_broken_model(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = np.full(64, 3e38, np.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = EmbeddedLM(load_embedded(folder), Progress())
    with pytest.raises(EngineError, match="NaN or infinite"):
        model.loglikelihood(requests("loglikelihood", ("I", " am")))


def test_the_likeliest_answer_is_called_so(own: EmbeddedLM) -> None:
    (text,) = own.generate_until(requests("generate_until", ("I am", {"until": [], "max_gen_toks": 1})))
    ((_, greedy),) = own.loglikelihood(requests("loglikelihood", ("I am", text)))
    assert greedy


def test_rolling_loglikelihoods_are_those_of_transformers(own: EmbeddedLM, theirs: Any) -> None:
    asked = requests("loglikelihood_rolling", (LONG,), ("I am",))
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert own.loglikelihood_rolling(asked) == pytest.approx(expected, rel=1e-5, abs=1e-3)


def test_texts_are_those_of_transformers(own: EmbeddedLM, theirs: Any) -> None:
    settings = {"until": ["\n", "e"], "max_gen_toks": 24, "do_sample": False}
    contexts = [f"The {word}" for word in ("with", "for", "try", "if", "def", "class", "del", "in", "or")]
    asked = requests("generate_until", *[(text, dict(settings)) for text in (*contexts, LONG)])
    assert own.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)


def test_progress_counts_every_request(tiny_llama: Path) -> None:
    seen: list[Any] = []
    progress = Progress(layers=lambda count, _: seen.append(count), layer=lambda record: seen.append(record))
    settings = {"until": ["e"], "max_gen_toks": 4}
    model = EmbeddedLM(load_embedded(tiny_llama), progress)
    model.generate_until(requests("generate_until", *[("I am", settings)] * 11))
    assert seen == [11, *({"index": i} for i in range(11))]
