"""A Llama model in NumPy float64, straight from the formulas, to hold the engine's arithmetic to.

It shares no code with msquant: tensors come from safetensors' own reader, quantized layers are computed from
the five stored tensors as vLLM-MindSpore's contract defines them, and there is no key-value cache.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

Array = NDArray[np.float64]


class ReferenceLlama:
    """Attributes: ranges, the smallest and largest input that each linear layer has seen."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.tensors: dict[str, Any] = {}
        for shard in folder.glob("*.safetensors"):
            self.tensors.update(load_file(shard))
        self.ranges: dict[str, tuple[float, float]] = {}

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The `count` most probable tokens after `ids`, each from the whole sequence anew."""
        ids = list(ids)
        for _ in range(count):
            ids.append(int(self.logits(ids)[-1].argmax()))
        return ids[-count:]

    def logits(self, ids: list[int]) -> Array:
        """`[T, V]`."""
        hidden = self.tensors["model.embed_tokens.weight"].astype(np.float64)[ids]
        for i in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{i}"
            normed = self._norm(hidden, f"{name}.input_layernorm")
            hidden = hidden + self._attention(normed, f"{name}.self_attn")
            normed = self._norm(hidden, f"{name}.post_attention_layernorm")
            gate = self._linear(normed, f"{name}.mlp.gate_proj")
            gated = gate / (1 + np.exp(-gate)) * self._linear(normed, f"{name}.mlp.up_proj")
            hidden = hidden + self._linear(gated, f"{name}.mlp.down_proj")
        head = "lm_head.weight" if "lm_head.weight" in self.tensors else "model.embed_tokens.weight"
        return self._norm(hidden, "model.norm") @ self.tensors[head].astype(np.float64).T

    def _norm(self, x: Array, name: str) -> Array:
        scale = np.sqrt((x**2).mean(axis=-1, keepdims=True) + self.config["rms_norm_eps"])
        return x / scale * self.tensors[f"{name}.weight"]

    def _linear(self, x: Array, name: str) -> Array:
        low, high = self.ranges.get(name, (np.inf, -np.inf))
        self.ranges[name] = (min(low, x.min()), max(high, x.max()))
        weight = self.tensors[f"{name}.weight"]
        if weight.dtype != np.int8:
            return x @ weight.astype(np.float64).T
        scale = self.tensors[f"{name}.input_scale"].astype(np.float64)
        offset = self.tensors[f"{name}.input_offset"].astype(np.int64)
        quantized = np.clip(np.rint(x / scale).astype(np.int64) + offset, -128, 127)
        total = quantized @ weight.T.astype(np.int64) + self.tensors[f"{name}.quant_bias"].astype(np.int64)
        return total * self.tensors[f"{name}.deq_scale"].astype(np.float64)

    def _attention(self, x: Array, name: str) -> Array:
        heads, groups = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        queries = self._rotate(self._heads(self._linear(x, f"{name}.q_proj"), heads))
        keys = self._rotate(self._heads(self._linear(x, f"{name}.k_proj"), groups))
        values = self._heads(self._linear(x, f"{name}.v_proj"), groups)
        mixed = []
        for h in range(heads):
            key, value = keys[h * groups // heads], values[h * groups // heads]
            scores = queries[h] @ key.T / np.sqrt(key.shape[1])
            scores[np.triu_indices(len(x), 1)] = -np.inf
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            mixed.append(weights / weights.sum(axis=1, keepdims=True) @ value)
        return self._linear(np.concatenate(mixed, axis=1), f"{name}.o_proj")

    @staticmethod
    def _heads(x: Array, count: int) -> Array:
        return x.reshape(len(x), count, -1).swapaxes(0, 1)

    def _rotate(self, x: Array) -> Array:
        half = x.shape[-1] // 2
        turns = self.config["rope_theta"] ** (-np.arange(half) / half)
        angles = np.outer(np.arange(x.shape[1]), turns)
        first, second = x[..., :half], x[..., half:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
