"""The planned peak of memory, against a real run's and against growth."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from msquant.checkpoint.memory import available_memory
from msquant.hub.published import published_config
from msquant.models.config_json import parse_config
from msquant.planning.blocks import LayerBlocks, Tokens
from msquant.planning.quantization_plan import BASE_BYTES, layer_bytes, make_plan
from msquant.recipe.recipe import find_recipe, load_recipe
from tests.fixtures.tiny_model import write_tiny_llama

TOLERANCE = 0.3

RECIPE = """
model: {model}
quantization: {{smooth_alpha: [0.4, 0.7]}}
calibration: {{samples: 4, sequence_length: 128}}
"""


@pytest.mark.e2e
def test_the_estimate_is_near_a_real_peak(tmp_path: Path) -> None:
    model = write_tiny_llama(
        tmp_path / "model", layers=1, dtype="bfloat16", hidden_size=1024, intermediate_size=8192, head_dim=256
    )
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=model))
    plan = make_plan(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "out")
    # The model itself is a good part of what is estimated.
    assert plan.peak_memory > 1.2 * BASE_BYTES
    command = [sys.executable, "-m", "msquant", "quantize", str(tmp_path / "recipe.yaml"), "--json"]
    done = subprocess.run([*command, "--output", str(tmp_path / "out")], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)["peak_memory_bytes"]
    assert plan.peak_memory == pytest.approx(measured, rel=TOLERANCE)


def blocks(index: int, **changed: int) -> LayerBlocks:
    raw = (published_config("deepseek-r1") or {}) | changed
    recipe = find_recipe("deepseek-r1")
    return LayerBlocks(parse_config(raw), recipe.quantization, index)


def test_it_grows_neither_with_experts_nor_with_layers() -> None:
    tokens = Tokens(4, 128, 4)
    many = layer_bytes(blocks(3), tokens, 1 << 30)
    assert layer_bytes(blocks(3, n_routed_experts=8, n_group=1, topk_group=1), tokens, 1 << 30) == many
    assert layer_bytes(blocks(60), tokens, 1 << 30) == many
    # The target for DeepSeek-R1 with so many tokens.
    assert BASE_BYTES + many < 6e9


def test_it_grows_with_tokens_and_within_the_budget() -> None:
    layer = blocks(3)
    few, more = (layer_bytes(layer, Tokens(samples, 512, 1), 1 << 30) for samples in (8, 32))
    assert few < more
    assert layer_bytes(layer, Tokens(32, 512, 1), 1 << 28) < more


def test_the_memory_of_this_machine_is_what_the_system_says() -> None:
    available = available_memory()
    assert available is not None
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line)
    assert 100e6 < available <= int(total.split()[1]) * 1024
