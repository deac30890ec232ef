"""Folders of GPTQ, AWQ and AutoRound, packed here by the written definition of their layouts, and by no tool.

The definitions: AutoGPTQ's qlinear_cuda.py `pack` and GPTQModel 7.6.0's nn_modules/qlinear/__init__.py
`pack_block` (neighbouring inputs in one int32, zero points less 1 in version 1); AutoAWQ's `WQLinear_GEMM.
from_linear` (`order_map` 0 2 4 6 1 3 5 7); AutoRound 0.16.1's `qlinear_torch.py` and `qlinear_torch_zp.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from msquant.checkpoint.writer import shard_name, write_index, write_json, write_shard
from msquant.families import expected_shapes
from msquant.formats.dtypes import cast

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "torch_dtype": "float16",
}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Values:
    """What a layer holds.

    Attributes:
        integers: `[N, K]`, from 0.
        zeros: `[N, G]`, from 0.
        scales: float16 `[N, G]`.
        groups: `[K]`, the group of each column.
    """

    integers: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    groups: np.ndarray

    @property
    def weight(self) -> np.ndarray:
        """float32 `[N, K]`."""
        shifted = self.integers.astype(np.float32) - self.zeros[:, self.groups]
        return shifted * self.scales.astype(np.float32)[:, self.groups]


def random_values(
    name: str, shape: tuple[int, int], bits: int, group_size: int, *, symmetric: bool, ordered: bool
) -> Values:
    """The same for the same name; zero points are never 0, which version 1 cannot hold."""
    rng = np.random.default_rng(sum(map(ord, name)))
    rows, columns = shape
    size = columns if group_size == -1 else group_size
    groups = np.arange(columns) // size
    count = columns // size
    middle = np.full((rows, count), 1 << (bits - 1))
    return Values(
        integers=rng.integers(0, 1 << bits, shape),
        zeros=middle if symmetric else rng.integers(1, 1 << bits, (rows, count)),
        # AutoRound has those of either sign.
        scales=(rng.uniform(1e-3, 1e-2, (rows, count)) * rng.choice([-1, 1], (rows, count))).astype(
            np.float16
        ),
        groups=rng.permutation(groups) if ordered else groups,
    )


def words(values: np.ndarray, bits: int, order: tuple[int, ...] = ()) -> np.ndarray:
    """Rows of integers as int32, `[R, C]` to `[R, C * bits / 32]`, one integer after the other."""
    held = 32 // bits
    made = np.zeros((len(values), values.shape[1] // held), np.uint32)
    for word in range(made.shape[1]):
        for place in range(held):
            taken = order[place] if order else place
            made[:, word] |= values[:, word * held + taken].astype(np.uint32) << np.uint32(place * bits)
    return made.view(np.int32)


def gptq_tensors(values: Values, bits: int, *, version: int, order: bool) -> dict[str, np.ndarray]:
    """Version 1 stores zero points less 1."""
    less = 1 if version == 1 else 0
    tensors = {
        "qweight": np.ascontiguousarray(words(values.integers, bits).T),
        "qzeros": words((values.zeros - less).T, bits),
        "scales": np.ascontiguousarray(values.scales.T),
    }
    return tensors | ({"g_idx": values.groups.astype(np.int32)} if order else {})


def awq_tensors(values: Values, bits: int) -> dict[str, np.ndarray]:
    """AutoAWQ's gemm."""
    return {
        "qweight": words(values.integers.T, bits, AWQ_ORDER),
        "qzeros": words(values.zeros.T, bits, AWQ_ORDER),
        "scales": np.ascontiguousarray(values.scales.T),
    }


SECTIONS: Mapping[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "checkpoint_format": "gptq", "desc_act": False},
    "gptq-v2": {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "desc_act": False},
    "gptq-old": {"quant_method": "gptq", "damp_percent": 0.01, "model_name_or_path": None},
    "awq": {"quant_method": "awq", "version": "gemm", "modules_to_not_convert": ["lm_head"]},
    "auto-round-gptq": {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"},
    "auto-round": {"quant_method": "auto-round", "packing_format": "auto_round", "data_type": "int"},
    "auto-round-awq": {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"},
}
"""What the tools write into `config.json`, but for bits, groups and symmetry."""


def write_qweight(
    folder: Path,
    kind: str = "gptq",
    *,
    bits: int = 4,
    group_size: int = 32,
    symmetric: bool = False,
    ordered: bool = False,
    config: Mapping[str, Any] | None = None,
    section: Mapping[str, Any] | None = None,
) -> dict[str, Values]:
    """Write a folder; returns what each of its quantized layers holds.

    Args:
        folder: is made.
        kind: of `SECTIONS`.
        bits: of an integer.
        group_size: columns of a group, or -1.
        symmetric: with zero points in the middle.
        ordered: with columns in groups by `g_idx` alone.
        config: changes of `CONFIG`.
        section: changes of the section.
    """
    whole = {**CONFIG, **(config or {})}
    shapes = expected_shapes(whole)
    assert shapes is not None
    tensors: dict[str, np.ndarray] = {}
    made: dict[str, Values] = {}
    for name, shape in shapes.items():
        module, _, part = name.rpartition(".")
        if not module.endswith("_proj") or part == "bias":
            values = np.random.default_rng(sum(map(ord, name))).normal(size=shape)
            tensors[name] = cast(name, values, whole["torch_dtype"])
            continue
        value = random_values(
            module, (shape[0], shape[1]), bits, group_size, symmetric=symmetric, ordered=ordered
        )
        made[module] = value
        if kind in ("awq", "auto-round-awq"):
            parts = awq_tensors(value, bits)
        else:
            version = 2 if kind in ("gptq-v2", "auto-round") else 1
            parts = gptq_tensors(value, bits, version=version, order=kind.startswith("gptq"))
        tensors |= {f"{module}.{part}": array for part, array in parts.items()}
    own: dict[str, Any] = {**SECTIONS[kind], "bits": bits, "group_size": group_size}
    own["zero_point" if kind == "awq" else "sym"] = symmetric != (kind == "awq")
    folder.mkdir(parents=True)
    write_shard(folder / shard_name(1, 1), tensors)
    write_index(folder, dict.fromkeys(tensors, shard_name(1, 1)), 0)
    write_json(folder / "config.json", {**whole, "quantization_config": {**own, **(section or {})}})
    return made
