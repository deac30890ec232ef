"""The embedded engine on the written SmolLM2 folder, beside an independent torch simulation of it.

Static int8 activations round at fixed places. Two float32 implementations differ in the last digit, so now
and then one activation falls on the other side of a tie, and that moves the logits by a few tenths: as much
as noise of 1e-6 on the simulation's own embeddings does, which is measured here as the control. Tokens are
therefore equal where the choice is decided by more than that, and part where two tokens are nearly level.
"""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rows import row
from benchmarks.smollm2 import quantized

# Chosen for a continuation that is decided by a wide margin throughout.
DECIDED = ("1, 2, 3, 4, 5, 6", "1, 2, 3, 4, 5, 6, 7, 8,", "10, 20, 30, 40, 50,")
OTHERS = ("The capital of France is", "I am", "Once upon a time", "def fibonacci(n):")
TOKENS = 32
LEVEL = 0.5  # logits


def measure() -> list[dict[str, Any]]:
    """Generate greedily with both, then compare their choices on held-out text."""
    from msquant.checkpoint.tokenizer import load_tokenizer
    from msquant.flows.generation import load_engine
    from msquant.inference.engine_protocol import Sampling
    from tests.fixtures import torch_simulation

    folder = Path(quantized()["folder"])
    engine, tokenizer = load_engine(folder, "embedded"), load_tokenizer(folder)
    simulation = torch_simulation.load_simulation(folder)
    sampling = Sampling(max_tokens=TOKENS, ignore_eos=True)
    rows = []
    completions = engine.generate([*DECIDED, *OTHERS], sampling)
    for completion in completions:
        expected = torch_simulation.greedy(simulation, tokenizer, completion.prompt, TOKENS)
        pairs = zip(completion.token_ids, expected, strict=True)
        equal = next((i for i, (a, b) in enumerate(pairs) if a != b), TOKENS)
        name = f"{completion.prompt!r}: tokens equal"
        if completion.prompt in DECIDED:
            rows.append(row(name, equal, str(TOKENS), equal == TOKENS))
        elif equal == TOKENS:
            rows.append(row(name, equal))
        else:
            ids = [*tokenizer(completion.prompt).input_ids, *expected[:equal]]
            margin = _margin(simulation, ids)
            rows.append(
                row(f"{name}; then margin of logits", f"{equal}; {margin:.2f}", f"< {LEVEL}", margin < LEVEL)
            )
    paris = next(c.text for c in completions if c.prompt == OTHERS[0])
    rows.append(row(f"{OTHERS[0]!r} continues", repr(paris[:6]), "' Paris'", paris.startswith(" Paris")))
    ours, control = _agreement(folder, simulation, tokenizer)
    rows.append(
        row("same choice on 2 x 256 held-out tokens", f"{ours:.1%}", "control - 2 %", ours > control - 0.02)
    )
    rows.append(row("control: the simulation with noise of 1e-6", f"{control:.1%}"))
    rows.append(row("tokens/s, slowest prompt", round(min(c.tokens_per_second for c in completions), 1)))
    return rows


def _margin(simulation: Any, ids: list[int]) -> float:
    import torch

    with torch.inference_mode():
        best = simulation(torch.tensor([ids])).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


def _agreement(folder: Path, simulation: Any, tokenizer: Any) -> tuple[float, float]:
    """Share of equal next-token choices: msquant's layers and the simulation, the simulation and itself."""
    import torch

    from msquant.calibration.tokens import evaluation_tokens
    from msquant.formats.golden_stick.reader import GoldenStickCheckpoint
    from msquant.models.config_json import read_config
    from msquant.models.device import use_device
    from msquant.models.network import CausalLM

    tokens = evaluation_tokens(tokenizer, sequences=2, sequence_length=256)
    model = CausalLM(read_config(folder), GoldenStickCheckpoint.open(folder), use_device())
    ours = model.logits(tokens).argmax(axis=-1)

    def choices() -> Any:
        with torch.inference_mode():
            return simulation(torch.tensor(tokens)).logits.argmax(dim=-1).numpy()

    plain = choices()
    generator = torch.Generator().manual_seed(0)

    def add_noise(module: Any, inputs: Any, output: Any) -> Any:
        return output * (1 + 1e-6 * torch.randn(output.shape, generator=generator))

    hook = simulation.get_input_embeddings().register_forward_hook(add_noise)
    noisy = choices()
    hook.remove()
    return float(np.mean(ours == plain)), float(np.mean(noisy == plain))
