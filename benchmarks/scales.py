"""SmolLM2-135M: what the rounding of static input scales costs that vllm-ascend does."""

from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.accuracy import POLICIES, Captured, Reference, quantized, simulated
from benchmarks.rows import row
from benchmarks.smollm2 import float_folder
from msquant.formats.scales import held_scales, input_parameters, rounded_reciprocal

SEQUENCES = 12
"""Of 512 tokens, of each kind of text: with four a difference of two percent is within the noise."""


def measure() -> list[dict[str, Any]]:
    """One quantization, with input scales as they were found, and as vllm-ascend holds them in bfloat16."""
    reference = Reference(float_folder(), SEQUENCES)
    captured = quantized(reference.folder, POLICIES["osl, static"])
    exact, text = reference.score(simulated(reference.folder, captured))
    rows = [row("input scales as found", text)]
    for name, holds in {"nearest in bfloat16": nearest, "as msquant chooses them": chosen}.items():
        held = Captured()
        held.tensors = captured.tensors
        held.linears = {module: holds(module, linear) for module, linear in captured.linears.items()}
        kl, text = reference.score(simulated(reference.folder, held))
        worse = max(kl[domain] / exact[domain] - 1 for domain in kl)
        rows.append(row(name, f"{text}; at most {worse:+.2%}", "KL at most 2 % above", worse <= 0.02))
    return rows


def chosen(module: str, linear: Any) -> Any:
    """A linear as vllm-ascend holds what msquant writes: the scale, and its reciprocal in bfloat16."""
    return _held(linear, lambda: input_parameters(module, linear, "bfloat16")[0])


def nearest(module: str, linear: Any) -> Any:
    """As `chosen`, with the bfloat16 that is nearest to the scale."""
    return _held(linear, lambda: held_scales(linear.input_scale, "bfloat16")[0])


def _held(linear: Any, scale: Any) -> Any:
    if linear.scheme.is_float:
        return linear
    held = np.array([scale()], np.float32)
    reciprocal = rounded_reciprocal(held, "bfloat16")
    return replace(linear, input_scale=held, input_reciprocal=reciprocal)
