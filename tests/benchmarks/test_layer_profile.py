"""Times are charged once and to the right part, and the profile of a layer accounts for all of it."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks.layer_profile import profile_last_layer, read_plainly
from benchmarks.profiler import Profiler
from benchmarks.r1 import layer_bytes
from benchmarks.r1_layers import Sizes, tensors, write_r1_layers
from msquant.checkpoint.writer import shard_name
from tests.fixtures.policies import rules


class Work:
    def outer(self) -> None:
        time.sleep(0.05)
        self.inner(0.1)

    def inner(self, seconds: float) -> None:
        time.sleep(seconds)

    def waiting(self) -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(self.inner, [0.15, 0.15]))
            list(pool.map(self.other, [0.05, 0.05]))

    def other(self, seconds: float) -> None:
        time.sleep(seconds)


HERE = f"{__name__}:Work"


def test_a_function_is_charged_without_what_it_calls() -> None:
    original = Work.inner
    with Profiler(
        {f"{HERE}.outer": "outer", f"{HERE}.inner": lambda around, work, s: f"{around} {s}"}
    ) as profiler:
        Work().outer()
    assert profiler.seconds["outer"] == pytest.approx(0.05, abs=0.03)
    assert profiler.seconds["outer 0.1"] == pytest.approx(0.1, abs=0.03)
    assert Work.inner is original


def test_waiting_is_divided_by_what_the_threads_did() -> None:
    names = {f"{HERE}.waiting": "waiting", f"{HERE}.inner": "inner", f"{HERE}.other": "other"}
    with Profiler(names) as profiler:
        Work().waiting()
        assert profiler.worked["inner"] == pytest.approx(0.3, abs=0.06)
        profiler.share("waiting")
    assert set(profiler.seconds) == {"inner", "other"}
    assert profiler.seconds["inner"] == pytest.approx(0.15, abs=0.05)
    assert profiler.seconds["inner"] / profiler.seconds["other"] == pytest.approx(3, rel=0.3)


SIZES = Sizes(
    hidden=256, heads=2, q_rank=128, kv_rank=128, dense=384, expert=128, experts=4, per_token=2, groups=1
)


@pytest.mark.parametrize(
    ("algorithm", "clipping"),
    [("osl-golden-stick", {"clip search", "golden-stick's clipper"}), ("osl", set())],
)
def test_the_parts_of_a_layer_add_up(tmp_path: Path, algorithm: str, clipping: set[str]) -> None:
    model = write_r1_layers(tmp_path / "model", sizes=SIZES)
    recipe = tmp_path / "recipe.yaml"
    quantization = {
        "schemes": rules(skip=["lm_head", "kv_b_proj"], dynamic=["mlp."]),
        **{"algorithm": algorithm, "smooth_alpha": [0.5]},
    }
    calibration = {"samples": 2, "sequence_length": 32}
    recipe.write_text(
        json.dumps({"model": str(model), "quantization": quantization, "calibration": calibration})
    )
    profile = profile_last_layer(recipe, tmp_path / "out")
    assert sum(profile.parts.values()) == pytest.approx(profile.total)
    assert min(profile.parts.values()) >= 0
    assert {
        *("reading", "dequantizing", "experts in floating point", "experts in int8", "quantizing experts"),
        *("search of q_kv_a", "search of q_b", "search of o", "collecting garbage"),
        *("golden-stick's captures", "golden-stick's smoother", "golden-stick's quantizer"),
        *("golden-stick, all else", *clipping),
        *("writing", "hashing", "hidden states", "attention in floating point and in int8", "all else"),
    } <= {name for name, seconds in profile.parts.items() if seconds > 0}
    sizes = layer_bytes(tmp_path / "out")
    expected = sum(
        int(np.prod(shape))
        for name, dtype, shape in tensors(1, 1, SIZES)
        if ".layers.1." in name and dtype == "F8_E4M3"
    )
    assert len(sizes) == 2
    assert expected < sizes[1] < 1.3 * expected


def test_plain_reading_reads_all_of_a_layer(tmp_path: Path) -> None:
    weights = {f"model.layers.{i}.weight": np.zeros((i + 1, 1000), np.float32) for i in range(3)}
    save_file(weights, tmp_path / shard_name(1, 1))
    index = {"weight_map": dict.fromkeys(weights, shard_name(1, 1))}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    size, seconds = read_plainly(tmp_path, "model.layers.1.")
    assert size == 8000
    assert seconds > 0
