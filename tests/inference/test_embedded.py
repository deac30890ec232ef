"""The embedded engine against transformers and against an independent simulation of the integers."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.errors import CheckpointError, EngineError
from msquant.formats.golden_stick.reader import GoldenStickCheckpoint
from msquant.inference import batch
from msquant.inference.embedded import EmbeddedEngine
from msquant.inference.engine_protocol import Sampling
from msquant.models.config_json import read_config
from tests.inference.reference import ReferenceLlama

PROMPTS = ["I am", "The with statement is used to", "def f(x):"]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def engine(tiny_llama: Path, tokenizer: Any) -> EmbeddedEngine:
    return EmbeddedEngine(read_config(tiny_llama), Checkpoint.open(tiny_llama), tokenizer)


def test_greedy_tokens_equal_those_of_transformers(
    engine: EmbeddedEngine, tiny_llama: Path, tokenizer: Any
) -> None:
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for completion in engine.generate(PROMPTS, Sampling(max_tokens=32)):
        ids = torch.tensor([tokenizer.encode(completion.prompt)])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False
        )
        assert list(completion.token_ids) == expected[0, ids.shape[1] :].tolist()


def test_quantized_greedy_tokens_equal_the_exact_simulation(tiny_quantized: Path, tokenizer: Any) -> None:
    source = GoldenStickCheckpoint.open(tiny_quantized)
    engine = EmbeddedEngine(read_config(tiny_quantized), source, tokenizer)
    reference = ReferenceLlama(tiny_quantized)
    for completion in engine.generate(PROMPTS, Sampling(max_tokens=32)):
        ids = tokenizer.encode(completion.prompt)
        expected = reference.greedy(ids, len(completion.token_ids))
        assert list(completion.token_ids) == expected


@pytest.mark.parametrize(
    ("ids", "message"), [([], "no token"), ([1] * 256, "256 tokens"), ([512], "token 512")]
)
def test_tokens_that_cannot_be_continued(engine: EmbeddedEngine, ids: list[int], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        engine.tokens(ids, Sampling())


def test_long_prompt_in_pieces(
    engine: EmbeddedEngine, tiny_llama: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "PREFILL_TOKENS", 7)
    prompt = "The with statement is used to wrap the execution of a block"
    ids = tokenizer.encode(prompt)
    assert len(ids) > 3 * 7
    (completion,) = engine.generate([prompt], Sampling(max_tokens=8))
    assert list(completion.token_ids) == ReferenceLlama(tiny_llama).greedy(ids, len(completion.token_ids))


def test_streamed_text_joins_to_the_result(engine: EmbeddedEngine, tokenizer: Any) -> None:
    pieces: list[tuple[int, str]] = []
    sampling = Sampling(max_tokens=24, temperature=1.0, top_p=1.0, seed=3)
    completions = engine.generate(["I am", "I am"], sampling, lambda i, piece: pieces.append((i, piece)))
    assert [i for i, _ in pieces] == sorted(i for i, _ in pieces)
    assert len(pieces) > len(completions)
    for i, completion in enumerate(completions):
        assert "".join(piece for j, piece in pieces if j == i) == completion.text
        assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)
    assert completions[0].token_ids != completions[1].token_ids, "prompts have random numbers of their own"
    again = engine.generate(["I am", "I am"], sampling)
    assert [c.token_ids for c in again] == [c.token_ids for c in completions]


def test_stops_after_the_end_token(engine: EmbeddedEngine, tiny_llama: Path, tokenizer: Any) -> None:
    (free,) = engine.generate(["I am"], Sampling(max_tokens=6))
    assert free.finish_reason == "length"
    assert len(free.token_ids) == 6
    # The third token of the free run is declared to be an end token.
    end = free.token_ids[2]
    config = dataclasses.replace(read_config(tiny_llama), eos_token_ids=(end, 511))
    stopping = EmbeddedEngine(config, Checkpoint.open(tiny_llama), tokenizer)
    (stopped,) = stopping.generate(["I am"], Sampling(max_tokens=6))
    assert stopped.finish_reason == "stop"
    expected = free.token_ids[: free.token_ids.index(end) + 1]
    assert stopped.token_ids == expected
    assert stopped.text == tokenizer.decode(expected[:-1])


def test_stop_string_over_two_tokens(engine: EmbeddedEngine, tokenizer: Any) -> None:
    (free,) = engine.generate(["I am"], Sampling(max_tokens=12))
    words = [tokenizer.decode([token]) for token in free.token_ids]
    middle = len("".join(words[:5]))
    stop = free.text[middle - 1 : middle + 1]
    expected = free.text[: free.text.index(stop)]
    pieces: list[str] = []
    sampling = Sampling(max_tokens=12, stop=("not there", stop))
    (stopped,) = engine.generate(["I am"], sampling, lambda _, piece: pieces.append(piece))
    assert stopped.text == "".join(pieces) == expected
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]
    assert len(stopped.token_ids) < 12


def test_text_that_may_begin_a_stop_string_comes_at_the_end(engine: EmbeddedEngine) -> None:
    (free,) = engine.generate(["I am"], Sampling(max_tokens=6))
    (same,) = engine.generate(["I am"], Sampling(max_tokens=6, stop=(free.text[-2:] + "never",)))
    assert (same.text, same.finish_reason) == (free.text, "length")


def test_an_exception_in_on_text_ends_generation(engine: EmbeddedEngine) -> None:
    pieces: list[str] = []

    def leave(_: int, piece: str) -> None:
        pieces.append(piece)
        raise ConnectionError

    with pytest.raises(ConnectionError):
        engine.generate(["I am"], Sampling(max_tokens=12), leave)
    assert len(pieces) == 1


def test_stops_where_the_model_ends(tiny_llama: Path, tokenizer: Any) -> None:
    length = len(tokenizer.encode("I am"))
    config = dataclasses.replace(read_config(tiny_llama), max_position_embeddings=length + 3)
    engine = EmbeddedEngine(config, Checkpoint.open(tiny_llama), tokenizer)
    (completion,) = engine.generate(["I am"], Sampling(max_tokens=10))
    assert len(completion.token_ids) == 3
    assert completion.finish_reason == "length"


def test_prompt_longer_than_the_model_takes(engine: EmbeddedEngine) -> None:
    with pytest.raises(EngineError, match=r"a prompt of \d+ tokens leaves no room.* 256 tokens"):
        engine.generate(["I am", "word " * 300], Sampling())


def test_empty_prompt(engine: EmbeddedEngine) -> None:
    with pytest.raises(EngineError, match="prompt 1 of 1 is empty"):
        engine.generate([""], Sampling())


def test_tokenizer_of_another_model(engine: EmbeddedEngine, tiny_llama: Path, tokenizer: Any) -> None:
    class Shifted:
        def encode(self, text: str) -> list[int]:
            return [token + 512 for token in tokenizer.encode(text)]

    other = EmbeddedEngine(read_config(tiny_llama), Checkpoint.open(tiny_llama), Shifted())
    with pytest.raises(EngineError, match="vocabulary is 0 to 511") as caught:
        other.generate(["I am"], Sampling())
    assert "tokenizer" in str(caught.value.remedy)


def test_unknown_device(tiny_llama: Path, tokenizer: Any) -> None:
    with pytest.raises(EngineError, match="'gpu'"):
        EmbeddedEngine(read_config(tiny_llama), Checkpoint.open(tiny_llama), tokenizer, "gpu")


def test_quantized_scale_missing(tiny_quantized: Path, tokenizer: Any, tmp_path: Path) -> None:
    import shutil

    from safetensors.numpy import load_file, save_file

    folder = shutil.copytree(tiny_quantized, tmp_path / "broken")
    shard = next(folder.glob("*.safetensors"))
    tensors = load_file(shard)
    name = "model.layers.1.mlp.down_proj.deq_scale"
    tensors[name] = tensors[name][:-1]
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="deq_scale"):
        EmbeddedEngine(read_config(folder), GoldenStickCheckpoint.open(folder), tokenizer)
