"""The table of published models is what its script finds today."""

import json
from functools import cache
from types import ModuleType

import pytest

from msquant.checkpoint.shard import Shard
from msquant.hub.published import published_config
from tests.test_documentation import DOCS

ROOT = DOCS.parents[1]


@cache
def script() -> ModuleType:
    """`tools/published.py`, which lies beside the package."""
    import sys

    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import published
    finally:
        sys.path.pop(0)
    return published


def row_of(name: str) -> str:
    """The line of the English page about a name."""
    lines = script().PAGES["en"].read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith(f"| `{name}` |"))


@pytest.mark.slow
def test_both_pages_are_what_the_script_writes() -> None:
    published = script()
    found = published.rows()
    for language, path in published.PAGES.items():
        page = path.read_text(encoding="utf-8")
        assert published.rewritten(page, found, language) == page, "run python tools/published.py"
    assert sum(row.made or bool(row.reason) for row in found) >= 30


@pytest.mark.parametrize(
    "name",
    [
        "vllm-ascend/qwen3-0.6b-w8a16",
        "vllm-ascend/qwen2.5-0.5b-instruct-w8a8",
        "vllm-ascend/qwen3-8b-w4a8",
        "vllm-ascend/qwen3-32b-w8a8-quarot",
        "eco-tech/qwen3-32b-w8a8c8",
        "vllm-ascend/qwen3-vl-8b-instruct-w8a8",
        "eco-tech/qwen3.8-27b-w8a8",
        "vllm-ascend/deepseek-r1-w4a8-pruning",
    ],
)
def test_a_row_is_what_the_script_finds(name: str) -> None:
    published = script()
    assert row_of(name) in published.table([published._row(name)], "en").splitlines()


def test_every_name_has_a_row() -> None:
    for name in script().NAMES.read_text(encoding="utf-8").split():
        assert row_of(name)


def test_headers_have_no_data_and_are_whole() -> None:
    config = published_config("qwen2-vl-7b-instruct")
    assert config is not None
    with script().headers(config) as folder:
        shard = Shard.open(folder / "model.safetensors")
        assert (folder / "model.safetensors").stat().st_blocks * 512 < 10_000_000
        assert json.loads((folder / "config.json").read_text()) == config
    # As Qwen publishes it, and not as transformers holds it in memory.
    assert shard.entries["model.layers.27.mlp.down_proj.weight"].shape == (3584, 18944)
    assert shard.entries["visual.blocks.31.attn.qkv.weight"].shape == (3840, 1280)
    assert shard.entries["lm_head.weight"].shape == (152064, 3584)


def test_minimax_is_counted_to_the_last_parameter() -> None:
    """228,689,764,864 parameters, as the hub counts them without scales of FP8 blocks."""
    from math import prod

    config = published_config("minimax-m2")
    assert config is not None
    shapes = script().published_shapes(config)
    assert sum(map(prod, shapes.values())) == 228_689_764_864
