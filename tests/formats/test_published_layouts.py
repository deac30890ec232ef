"""The page of published names is what the script makes, and each layout on it is read, or refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.weights import QuantizedLinear
from msquant.checkpoint.writer import write_json, write_shard
from msquant.flows.engines import open_weights
from msquant.formats.ascend.layout import DESCRIPTION_NAME
from msquant.formats.summary import Summary, summarize
from msquant.models.rotation import Hadamard
from msquant.schemes import W4A8_DYNAMIC, W8A8, W8A8_DYNAMIC, W8A8_MIX, W8A16, Scheme
from tests.formats.ascend.test_kv_cache import HEADS_OF_32, cached
from tests.formats.ascend.test_published import write_dense
from tests.formats.expert_folders import DEEPSEEK, QWEN, four_bit_experts, schemes_of, write_experts
from tests.formats.folders import CONFIG, change_json
from tools.published_layouts import names, pages, parts, parts_of, reads

MOE: dict[str, Any] = {**QWEN, "hidden_size": 64, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
PREDICTS: dict[str, Any] = {**DEEPSEEK, "moe_intermediate_size": 32, "hidden_size": 64}
Made = Callable[[Path], list[Path]]


def ascend(folder: Path, config: dict[str, Any], schemes: dict[str, Scheme]) -> Path:
    """As msModelSlim leaves it: no manifest, and an architecture that msquant has no family for."""
    write_experts(folder, config, schemes=schemes, format_name="ascend")
    (folder / "msquant.json").unlink()
    change_json(folder / "config.json", lambda config: config.update(model_type="a_stranger"))
    return folder


def whole(config: dict[str, Any], scheme: Scheme) -> dict[str, Scheme]:
    return dict.fromkeys(schemes_of(config), scheme)


def w8a8(folder: Path) -> list[Path]:
    mixed = {m: W8A8_MIX if ".self_attn." in m else W8A8_DYNAMIC for m in schemes_of(MOE)}
    return [
        ascend(folder / "static", CONFIG, whole(CONFIG, W8A8)),
        ascend(folder / "dynamic", MOE, whole(MOE, W8A8_DYNAMIC)),
        ascend(folder / "mix", MOE, mixed),
    ]


def w4a8(folder: Path) -> list[Path]:
    sizes = (W4A8_DYNAMIC, W4A8_DYNAMIC.in_groups(16))
    folders = [ascend(folder / str(one), MOE, four_bit_experts(MOE, one)) for one in sizes]
    return [*folders, write_dense(folder / "dense", 16, 16)]


def compressed(folder: Path) -> list[Path]:
    made = []
    for name, schemes in {
        "quantized.w8a8": whole(MOE, W8A8_DYNAMIC),
        "quantized.w4a8": four_bit_experts(MOE, W4A8_DYNAMIC),
    }.items():
        schemes = {m: W8A8_DYNAMIC if its == W8A8 else its for m, its in schemes.items()}
        write_experts(folder / name, MOE, schemes=schemes, format_name="compressed-tensors")
        (folder / name / "msquant.json").unlink()
        made.append(folder / name)
    return made


def predicting(scheme: Scheme) -> Made:
    def make(folder: Path) -> list[Path]:
        schemes = schemes_of(PREDICTS)
        own = f".layers.{PREDICTS['num_hidden_layers']}."
        schemes |= {module: scheme for module in schemes if own in module and ".mlp." in module}
        return [ascend(folder / "m", PREDICTS, schemes)]

    return make


def quarot(folder: Path) -> list[Path]:
    made = ascend(folder / "m", CONFIG, whole(CONFIG, W8A8))
    (made / "optional").mkdir()
    write_shard(
        made / "optional/quarot.safetensors",
        {"global_rotation": Hadamard(16).rotate(np.eye(16, dtype=np.float32))},
    )
    entry = {"quarot": {"rotation_map": {"global_rotation": "optional/quarot.safetensors"}}}
    change_json(made / DESCRIPTION_NAME, lambda described: described.update(optional=entry))
    return [made]


def c8(folder: Path) -> list[Path]:
    return [ascend(folder / "m", HEADS_OF_32, cached(HEADS_OF_32))]


READ: dict[str, Made] = {
    "c8": c8,
    "compressed-tensors": compressed,
    "w4a8": w4a8,
    "w8a16": lambda folder: [ascend(folder / "m", CONFIG, whole(CONFIG, W8A16))],
    "w8a8": w8a8,
    "mtp": predicting(W8A8_DYNAMIC),
    "floatmtp": lambda folder: [ascend(folder / "m", PREDICTS, schemes_of(PREDICTS))],
    "quarot": quarot,
}

# A description's word or entry, of a folder that is in W8A8 but for it.
REFUSED = {
    "mxfp": ("W8A8_MXFP8", "described as 'W8A8_MXFP8'"),
    "w8a8sc": ("W8A8SC", "described as 'W8A8SC'"),
    "w4a4": ("W4A4_FLATQUANT_DYNAMIC", "described as 'W4A4_FLATQUANT_DYNAMIC'"),
    "sparse-c8": ({"indexer_quant_type": "INT8_DYNAMIC"}, "indexer_quant_type is 'INT8_DYNAMIC'"),
}


def test_the_pages_are_what_the_script_makes() -> None:
    for path, text in pages().items():
        assert path.read_text(encoding="utf-8") == text, f"run python -m tools.published_layouts: {path}"


def test_every_name_is_said_something_of_and_most_are_read() -> None:
    assert len(names()) == len(set(names())) == 112
    assert all(parts_of(name) for name in names())
    assert sum(map(reads, names())) >= 80
    assert {part.key for part in parts() if part.reads} == set(READ)
    assert {part.key for part in parts() if not part.reads} == set(REFUSED)
    said = {part.key for name in names() for part in parts_of(name)}
    assert said == set(READ) | set(REFUSED)


def _found(summary: Summary) -> set[str]:
    return {module.scheme for module in summary.modules}


@pytest.mark.parametrize("key", READ)
def test_a_layout_is_read(tmp_path: Path, key: str) -> None:
    """By `inspect`, whatever the architecture, and each layer by the reader of `run` and `export`."""
    for folder in READ[key](tmp_path):
        summary = summarize(folder)
        assert summary.findings == []
        weights = open_weights(folder)
        quantized = [module for module in summary.modules if module.scheme != "FLOAT"]
        assert quantized
        for module in quantized:
            linear = weights.linear(module.name)
            assert isinstance(linear, QuantizedLinear)
            assert str(linear.scheme) == module.scheme
        if key.endswith("mtp"):
            schemes = {m.scheme for m in summary.modules if m.layer == PREDICTS["num_hidden_layers"]}
            assert schemes == ({"FLOAT"} if key == "floatmtp" else {"FLOAT", "W8A8_DYNAMIC"})


@pytest.mark.parametrize("key", REFUSED)
def test_a_layout_is_refused_by_the_word_that_says_it(tmp_path: Path, key: str) -> None:
    said, problem = REFUSED[key]
    folder = ascend(tmp_path / "m", CONFIG, whole(CONFIG, W8A8))
    described = json.loads((folder / DESCRIPTION_NAME).read_text())
    if isinstance(said, str):
        described = {name: said if word == "W8A8" else word for name, word in described.items()}
    else:
        described |= said
    write_json(folder / DESCRIPTION_NAME, described)
    assert Checkpoint.open(folder).names()
    assert any(problem in str(finding) for finding in summarize(folder).findings)
