"""Folders to report on: a small one whose manifest is as large as DeepSeek-R1's, and one that is hostile."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.formats.expert_folders import DEEPSEEK, write_experts
from tests.formats.folders import change_json

LAYERS, EXPERTS, DENSE = 61, 256, 3
ATTENTION = ("q_kv_a", "q_b", "o")
MIN_TOKENS = 8

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>",
    '"><svg onload=alert(3)>',
    "{{ 7 * 7 }} {% raw %}",
    "$\\frac{1}{0}$ & |cell| `code` [link](javascript:alert(4))",
    "\x00\x1b[31m\u202e\n# heading",
)


def ranges(rng: np.random.Generator) -> dict[str, dict[str, float]]:
    """Before smoothing a few channels stand out; after it fewer do."""
    median = float(rng.uniform(0.5, 2))
    before = {"median": median, "p99": 6 * median, "largest": median * float(rng.uniform(20, 200))}
    after = {"median": 4 * median, "p99": 12 * median, "largest": 20 * median}
    return {
        side: {name: float(f"{value:.4g}") for name, value in values.items()}
        for side, values in (("before", before), ("after", after))
    }


def layer(index: int, rng: np.random.Generator) -> dict[str, Any]:
    """A decoder layer's record as `msquant.flows.manifest.layer_record` makes it."""
    groups = [
        {"name": name, "alpha": float(rng.integers(8, 19)) / 20, "loss": 1e-4, **ranges(rng)}
        for name in ATTENTION
    ]
    groups += [{"name": name, "alpha": 0.5, **ranges(rng)} for name in ("gate_up", "down")]
    record: dict[str, Any] = {
        "index": index,
        "error": float(10 ** rng.uniform(-4, -2.6)),
        "groups": groups,
        "mean_clip_ratio": {f"self_attn.{name}": 0.98 for name in ("q_a_proj", "q_b_proj", "o_proj")},
    }
    if index >= DENSE:
        tokens = np.floor(rng.gamma(2, 64, EXPERTS)).astype(int)
        few = np.flatnonzero(tokens < MIN_TOKENS)
        record["experts"] = {"tokens": tokens.tolist(), "few_tokens": few.tolist()}
    return record


def write_large(folder: Path) -> Path:
    """A tiny DeepSeek-V3 with the manifest of 61 layers and 256 experts."""
    write_experts(folder, {**DEEPSEEK, "num_experts_per_tok": 2})
    rng = np.random.default_rng(0)

    def enlarge(manifest: dict[str, Any]) -> None:
        manifest["layers"] = [layer(index, rng) for index in range(LAYERS)]
        manifest["layers"][40]["error"] = 0.1
        manifest["recipe"] = {
            "model": "deepseek-ai/DeepSeek-R1",
            "quantization": {"algorithm": "osl", "min_expert_tokens": MIN_TOKENS},
        }
        manifest["versions"] = {"msquant": "0.1.0", "mindspore": "2.7.1.post1"}
        manifest["source"] = {"shards": {f"model-{i:05}-of-00163.safetensors": 4 * 10**9 for i in range(163)}}
        manifest["evaluation"] = evaluation()
        manifest["evaluation"]["layers"][40]["own_snr"] = 28.0

    change_json(folder / "msquant.json", enlarge)
    return folder


def evaluation() -> dict[str, Any]:
    """As `msquant evaluate` writes it."""
    score = {
        "tokens": 4096,
        "perplexity": 15.08,
        "baseline_perplexity": 14.09,
        "kl": 0.0312,
        "top1": 0.913,
        "top5": 0.887,
        "logit_error": 2.3e-3,
    }
    rng = np.random.default_rng(1)
    return {
        "sequences": 1,
        "sequence_length": 256,
        "beyond": [],
        "predictions": [
            {
                "text": name,
                "before": "The quick brown",
                "actual": [" fox", " jumps", "\n"] * 8,
                "expected": [" fox", " jumped", " over"] * 8,
                "found": [" fox", " jumps", " over"] * 8,
            }
            for name in ("technical", "prose", "code")
        ],
        "texts": [{"text": name} | score for name in ("technical", "prose", "code")],
        "overall": {"text": "overall"} | score,
        "layers": [
            {"index": index, "snr": 40 - index / 4, "own_snr": float(rng.normal(45, 2))}
            for index in range(LAYERS)
        ],
    }


def poison(folder: Path) -> None:
    """Put what must not be taken for a part of the document wherever a name can stand."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["recipe"] = {
            "description": "\n".join(HOSTILE),
            "model": HOSTILE[0],
            "quantization": {"schemes": [{name: "FLOAT"} for name in HOSTILE]},
        }
        manifest["versions"] = dict.fromkeys(HOSTILE, HOSTILE[1])
        manifest["device"] = HOSTILE[2]
        manifest["layers"] = [
            {
                "index": index,
                "error": 1e-3,
                "groups": [
                    {"name": name, "alpha": 0.5, **ranges(np.random.default_rng(index))} for name in HOSTILE
                ],
                "mean_clip_ratio": dict.fromkeys(HOSTILE, 0.9),
            }
            for index in range(2)
        ]
        manifest["evaluation"] = {
            "texts": [{"text": name, "kl": 0.1} for name in HOSTILE],
            "predictions": [
                {"text": name, "before": name, "actual": [name], "expected": [name], "found": [name]}
                for name in HOSTILE
            ],
        }
        manifest["files"] |= {name: {"size": 1, "sha256": HOSTILE[0]} for name in HOSTILE}

    path = folder / "msquant.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
