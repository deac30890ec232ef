"""The options that every engine takes."""

import pytest

from msquant.errors import EngineError
from msquant.inference.engine_protocol import Completion, Sampling, check_prompts


def test_defaults_are_those_of_vllm() -> None:
    assert Sampling() == Sampling(max_tokens=16, temperature=0.0, top_p=0.95, seed=0)


@pytest.mark.parametrize(
    ("options", "option", "value"),
    [
        ({"max_tokens": 0}, "--max-tokens", "0"),
        ({"temperature": -0.5}, "--temperature", "-0.5"),
        ({"temperature": float("nan")}, "--temperature", "nan"),
        ({"temperature": float("inf")}, "--temperature", "inf"),
        ({"top_p": 0.0}, "--top-p", "0.0"),
        ({"top_p": 1.01}, "--top-p", "1.01"),
        ({"top_p": float("nan")}, "--top-p", "nan"),
        ({"seed": -1}, "--seed", "-1"),
        ({"stop": ("x", "")}, "--stop", "a stop string is empty"),
    ],
)
def test_value_out_of_range(options: dict, option: str, value: str) -> None:
    with pytest.raises(EngineError) as caught:
        Sampling(**options)
    assert caught.value.where == option
    assert value in caught.value.what


@pytest.mark.parametrize(("prompts", "what"), [([], "no prompt"), (["I am", ""], "prompt 2 of 2 is empty")])
def test_missing_prompt(prompts: list[str], what: str) -> None:
    with pytest.raises(EngineError, match=what):
        check_prompts(prompts)


def test_tokens_per_second_counts_generated_tokens() -> None:
    assert Completion("p", "t", (1, 2, 3), "length", seconds=2.0).tokens_per_second == 1.5
