"""A trained tiny Qwen3-Next, 16 x 128 builtin tokens: KL to the float model by scheme.

`W8A8` is one scale per token for every linear that is quantized. `W4A8` has routed experts in int4 with one
scale a row, and all other linears as in `W8A8`: what vllm-ascend serves. Beside rounding to nearest stands
what msquant does by default: `osl` in eight bits, `gptq` in four. llm-compressor's figures in eight bits come
from `python -m benchmarks peers`. Texts: see `texts.py`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.accuracy import Reference
from benchmarks.rows import row
from benchmarks.tiny_qwen import trained_qwen3_next

MODELS: dict[str, Callable[[], Path]] = {"Qwen3-Next": trained_qwen3_next}
SCHEMES: dict[str, list[dict[str, str]]] = {
    "W8A8": [{"lm_head": "FLOAT"}, {"*": "W8A8_DYNAMIC"}],
    "W4A8": [{"lm_head": "FLOAT"}, {"mlp.experts.": "W4A8_DYNAMIC"}, {"*": "W8A8_DYNAMIC"}],
}
POLICIES: dict[str, dict[str, dict[str, Any]]] = {
    "W8A8": {"rtn": {"algorithm": "rtn"}, "osl": {"algorithm": "osl", "feed_forward_alpha": 0.5}},
    "W4A8": {"rtn": {"algorithm": "rtn"}, "gptq": {"algorithm": "gptq", "feed_forward_alpha": 0.5}},
}
TEXT_SEQUENCES = 16
"""Of each text: a router's choices, which flip, make the figures of a small model uncertain with fewer."""


def measure() -> list[dict[str, Any]]:
    """Quantize every model in every scheme and compare the logits with the float model's."""
    rows = []
    for name, trained in MODELS.items():
        reference = Reference(trained(), TEXT_SEQUENCES)
        perplexities = ", ".join(f"{text} {value:.1f}" for text, value in reference.perplexities.items())
        rows.append(row(f"{name}, floating point", f"perplexity {perplexities}"))
        for scheme, policies in POLICIES.items():
            nearest: dict[str, float] = {}
            for algorithm, options in policies.items():
                kl, text, _ = reference.measure({**options, "schemes": SCHEMES[scheme]})
                better = all(kl[kind] < nearest[kind] for kind in kl) if nearest else None
                target = "KL below rtn's on every text" if nearest else ""
                nearest = nearest or kl
                rows.append(row(f"{name}, {scheme}, {algorithm}", text, target, better))
    return rows
