"""SmolLM2-135M in four bits, 16 x 128 tokens: KL to the float model by scheme, algorithm and calibration.

The texts are of the kind that `builtin:documentation` is (technical English), the King James Bible, and
Hamlet, see `texts.py`. What the algorithms' defaults were chosen by are the builtin evaluation texts, which
are of neither of the last two. Groups of 128 do not fit 576 columns; groups of 192 are coarser.
"""

from typing import Any

from benchmarks.accuracy import Reference
from benchmarks.rows import row
from benchmarks.smollm2 import float_folder

# KL at most on the calibrated kind of text and on the Bible, by calibration on that kind alone, and the
# policy that is to keep to it: with one scale a channel, the rotated one.
LIMITS = {
    "W4A16_G64_ASYM": (0.070, 0.25, "gptq"),
    "W4A16_G192": (0.100, 0.34, "gptq"),
    "W4A16_CHANNEL": (0.095, 0.34, "gptq, rotated"),
    "W4A8_DYNAMIC": (0.110, 0.36, "gptq, rotated"),
}
KIND = "builtin:documentation"
POLICIES: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("rtn", {"algorithm": "rtn"}, "builtin"),
    ("awq", {"algorithm": "awq"}, KIND),
    ("gptq", {"algorithm": "gptq"}, KIND),
    ("gptq", {"algorithm": "gptq"}, "builtin"),
    ("gptq, rotated", {"algorithm": "gptq", "rotation": "hadamard"}, KIND),
)
CPU_SECONDS = 100


def measure() -> list[dict[str, Any]]:
    """Quantize by every scheme and algorithm and compare the logits with the float model's."""
    reference = Reference(float_folder())
    rows = []
    for word, (same, bible, best) in LIMITS.items():
        for name, options, source in POLICIES:
            policy = {**options, "schemes": [{"*": word}]}
            kl, text, seconds = reference.measure(policy, source)
            limited = (name, source) == (best, KIND)
            target = f"KL <= {same}, {bible}; <= {CPU_SECONDS} CPU s" if limited else ""
            met = kl["same"] <= same and kl["bible"] <= bible and seconds <= CPU_SECONDS
            measured = f"{text}; {seconds:.0f} CPU s"
            rows.append(row(f"{word}, {name}, {source}", measured, target, met if limited else None))
    return rows
