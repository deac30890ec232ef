"""Trained tiny Qwen3-Next, GLM-4.5 and Kimi-K2, 16 x 128 builtin tokens: KL to the float model by scheme.

`W8A8` is one scale per token for every linear that is quantized. `W4A8` has routed experts in int4 with one
scale a row, and all other linears as in `W8A8`: what vllm-ascend serves. Beside rounding to nearest stands
what msquant does by default, `osl` in eight bits and `gptq` in four, and what llm-compressor does in the same
scheme, SmoothQuant and GPTQ, in the environment that `python -m benchmarks peers` makes for it. All are
computed by the same integer arithmetic on torch. `MSQUANT_FAMILIES=GLM-4.5` measures one of the models.
Texts: see `texts.py`.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.accuracy import Reference, simulated
from benchmarks.peers.folders import read_folder
from benchmarks.peers.jobs import INT4_EXPERTS, Job, run_peer
from benchmarks.rows import row
from benchmarks.tiny_deepseek import trained_kimi_k2
from benchmarks.tiny_glm import trained_glm4_moe
from benchmarks.tiny_qwen import trained_qwen3_next

MODELS: dict[str, Callable[[], Path]] = {
    "Qwen3-Next": trained_qwen3_next,
    "GLM-4.5": trained_glm4_moe,
    "Kimi-K2": trained_kimi_k2,
}
SCHEMES: dict[str, list[dict[str, str]]] = {
    "W8A8": [{"lm_head": "FLOAT"}, {"*": "W8A8_DYNAMIC"}],
    "W4A8": [{"lm_head": "FLOAT"}, {"mlp.experts.": "W4A8_DYNAMIC"}, {"*": "W8A8_DYNAMIC"}],
}
PEERS = {"W8A8": ("dynamic", "llm-compressor"), "W4A8": (INT4_EXPERTS, "llm-compressor GPTQ")}
POLICIES: dict[str, dict[str, dict[str, Any]]] = {
    "W8A8": {"rtn": {"algorithm": "rtn"}, "osl": {"algorithm": "osl", "feed_forward_alpha": 0.5}},
    "W4A8": {"rtn": {"algorithm": "rtn"}, "gptq": {"algorithm": "gptq", "feed_forward_alpha": 0.5}},
}
TEXT_SEQUENCES = 16
"""Of each text: a router's choices, which flip, make the figures of a small model uncertain with fewer."""


def measure() -> list[dict[str, Any]]:
    """Quantize every model in every scheme and compare the logits with the float model's."""
    rows = []
    for name in os.environ.get("MSQUANT_FAMILIES", ",".join(MODELS)).split(","):
        reference = Reference(MODELS[name](), TEXT_SEQUENCES)
        perplexities = ", ".join(f"{text} {value:.1f}" for text, value in reference.perplexities.items())
        rows.append(row(f"{name}, floating point", f"perplexity {perplexities}"))
        for scheme, policies in POLICIES.items():
            peer, text = _peer(name, scheme, reference)
            rows.append(row(f"{name}, {scheme}, {PEERS[scheme][1]}", text))
            rivals = [peer] if peer else []
            for algorithm, options in policies.items():
                kl, text, _ = reference.measure({**options, "schemes": SCHEMES[scheme]})
                target, better = "", None
                if algorithm != "rtn":
                    target = "KL below the others' on every text"
                    better = all(kl[kind] < rival[kind] for rival in rivals for kind in kl)
                rivals.append(kl)
                rows.append(row(f"{name}, {scheme}, {algorithm}", text, target, better))
    return rows


def _peer(model: str, scheme: str, reference: Reference) -> tuple[dict[str, float], str]:
    """llm-compressor's KL by text, and a line of it; empty with its own error where it fails."""
    with tempfile.TemporaryDirectory(prefix="msquant-families-") as parent:
        output = Path(parent) / "out"
        measured = run_peer(Job(model, *PEERS[scheme]), reference.folder, output, Path(parent))
        if measured.error:
            return {}, f"failed: {measured.error}"
        return reference.score(simulated(reference.folder, read_folder(output)))
