"""The embedded engine on the written SmolLM2 folder: its tokens beside a torch simulation's, its speed."""

from pathlib import Path
from typing import Any

from benchmarks.rows import row
from benchmarks.smollm2 import quantized

PROMPTS = ("The capital of France is", "I am", "def fibonacci(n):")
TOKENS = 32


def measure() -> list[dict[str, Any]]:
    """Generate greedily with both."""
    from msquant.checkpoint.tokenizer import load_tokenizer
    from msquant.generation import generate
    from msquant.inference.engine import Sampling
    from tests.fixtures import torch_simulation

    folder = Path(quantized()["folder"])
    sampling = Sampling(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    result = generate(folder, list(PROMPTS), sampling, engine="embedded")
    model, tokenizer = torch_simulation.load_simulation(folder), load_tokenizer(folder)
    rows = []
    for prompt, completion in zip(PROMPTS, result.completions, strict=True):
        expected = torch_simulation.greedy(model, tokenizer, prompt, TOKENS)
        ours = list(completion.token_ids)
        equal = sum(a == b for a, b in zip(ours, expected, strict=False))
        rows.append(row(f"{prompt!r}: tokens equal to torch", equal, str(len(expected)), ours == expected))
    first = result.completions[0].text
    rows.append(row(f"{PROMPTS[0]!r} continues", repr(first[:12]), "' Paris'", first.startswith(" Paris")))
    speed = [completion.tokens_per_second for completion in result.completions]
    return [*rows, row("tokens/s, first token included", round(min(speed), 1))]
