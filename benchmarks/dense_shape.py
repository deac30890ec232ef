"""A dense model of Qwen3-0.6B's shape beside llm-compressor and msModelSlim: seconds, 32 x 128 tokens.

442 million random weights in 28 layers, with a few outlier channels in the norms, and a small vocabulary, so
that the decoder layers are what counts. All get the same tokens and make static W8A8; msquant evaluates
nothing. Environments of the peers, some GB, are made once. `MSQUANT_DENSE_LAYERS=4` measures fewer layers.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.peers.jobs import Job, run_peer
from benchmarks.peers.process import Measured
from benchmarks.rows import row
from benchmarks.tiny_qwen import QWEN3

SHAPE: dict[str, Any] = QWEN3 | {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
"""The published `config.json`, but for the vocabulary."""

SAMPLES = 32
OUTLIERS, LOUDNESS = 8, 20.0
"""Channels of each norm that are so many times as loud as others."""

OURS, SMOOTHED, COMPRESSOR, SLIM = "msquant", "msquant smoothquant", "llm-compressor", "msModelSlim"
LIMITS = {OURS: 6.0, SMOOTHED: 1.5}
"""Of the CPU seconds, in units of llm-compressor's."""


def measure() -> list[dict[str, Any]]:
    """One run of each, one after the other."""
    layers = int(os.environ.get("MSQUANT_DENSE_LAYERS", SHAPE["num_hidden_layers"]))
    found: dict[str, Measured] = {}
    with tempfile.TemporaryDirectory(prefix="msquant-") as parent:
        model = write_dense(Path(parent) / "model", layers)
        for name in (COMPRESSOR, SMOOTHED, OURS, SLIM):
            with tempfile.TemporaryDirectory(prefix="msquant-") as place:
                job = Job("qwen3-0.6b-shape", "static", name)
                found[name] = run_peer(job, model, Path(place) / "out", Path(place), SAMPLES)
                if found[name].error:
                    raise SystemExit(f"{name}: {found[name].error}")
    rows = []
    for name, measured in found.items():
        times = measured.cpu_seconds / found[COMPRESSOR].cpu_seconds
        text = (
            f"{measured.cpu_seconds:.0f} CPU s, {times:.2f} times llm-compressor's; "
            f"{measured.seconds:.0f} s of wall time; {measured.peak_memory / 1e9:.1f} GB"
        )
        limit = LIMITS.get(name)
        if limit is None:
            rows.append(row(name, text))
            continue
        met = times <= limit and measured.seconds < found[SLIM].seconds
        rows.append(row(name, text, f"<= {limit:g} times, less wall time than msModelSlim", met))
    return rows


def write_dense(folder: Path, layers: int, seed: int = 0) -> Path:
    """Write a Qwen3 of that shape with random weights as a Hugging Face folder.

    Args:
        folder: where to write; made.
        layers: decoder layers.
        seed: of the values.

    Returns:
        The folder.
    """
    import torch
    from safetensors.torch import save_file

    from benchmarks.tiny_training import train_tokenizer, training_texts

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, head = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["head_dim"]
    queries, keys = (head * SHAPE[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    table = (SHAPE["vocab_size"], hidden)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table, "lm_head.weight": table}
    shapes["model.norm.weight"] = (hidden,)
    for index in range(layers):
        layer = f"model.layers.{index}"
        linears = {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_norm": (head,),
            "self_attn.k_norm": (head,),
        }
        shapes |= {f"{layer}.{name}.weight": shape for name, shape in linears.items()}
    tensors = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            values = torch.ones(shape)
            if shape == (hidden,):
                values[torch.randperm(hidden, generator=generator)[:OUTLIERS]] = LOUDNESS
        else:
            values = torch.randn(shape, generator=generator) * shape[1] ** -0.5
        tensors[name] = values.to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    train_tokenizer(training_texts(), SHAPE["vocab_size"]).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": layers}, indent=2))
    return folder
