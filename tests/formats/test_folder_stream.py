"""Writing a planned folder group by group, in any order and in pieces, and going on after a crash."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.weights import FloatLinear
from msquant.checkpoint.writer import file_sha256
from msquant.errors import CheckpointError, OutputError
from msquant.families import row_orders
from msquant.formats.folder_plan import FolderPlan, plan_folder
from msquant.formats.folder_stream import FolderStream
from msquant.formats.golden_stick.form import GoldenStickFormat
from msquant.schemes import FLOAT, W8A8, W8A8_DYNAMIC
from tests.formats.expert_folders import (
    DEEPSEEK,
    groups_of,
    random_linear,
    random_tensor,
    schemes_of,
    write_experts,
    write_group,
    write_source,
)

GROUPS = groups_of(DEEPSEEK)
NORM = "model.layers.0.input_layernorm.weight"
O = "model.layers.0.self_attn.o_proj"  # noqa: E741
# YaRN that stretches nothing, which MindFormers takes where null would become a factor of 40.
UNSCALED = {
    "type": "yarn",
    "factor": 1.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


@pytest.fixture
def plan() -> FolderPlan:
    return plan_folder(GROUPS, schemes_of(DEEPSEEK), DEEPSEEK, "bfloat16", 1500)


@pytest.fixture
def stream(tmp_path: Path, plan: FolderPlan) -> FolderStream:
    return FolderStream(tmp_path, plan)


def same_files(first: Path, second: Path) -> bool:
    names = [sorted(path.name for path in folder.iterdir()) for folder in (first, second)]
    return names[0] == names[1] and all(
        (first / n).read_bytes() == (second / n).read_bytes() for n in names[0]
    )


def test_groups_and_tensors_in_any_order_give_the_same_bytes(tmp_path: Path, plan: FolderPlan) -> None:
    write_experts(tmp_path / "first", DEEPSEEK, max_shard_bytes=1500)
    (tmp_path / "second").mkdir()
    stream = FolderStream(tmp_path / "second", plan)
    for index in (3, 1, 0, 2):
        with stream.group(index) as writer:
            write_group(writer, dict(reversed(GROUPS[index].items())), plan)
        assert set(writer.files) == {shard.file_name for shard in plan.groups[index]}
    stream.finish(tmp_path / "first-source", {"msquant": "0"})
    assert same_files(tmp_path / "first", tmp_path / "second")
    assert GoldenStickFormat().validate(tmp_path / "second", verify_hashes=True) == []
    for name, entry in stream.files.items():
        path = tmp_path / "second" / name
        assert entry == {"size": path.stat().st_size, "sha256": file_sha256(path)}


def test_a_finished_group_is_taken_over(tmp_path: Path, plan: FolderPlan) -> None:
    write_experts(tmp_path / "whole", DEEPSEEK, max_shard_bytes=1500)
    folder = tmp_path / "resumed"
    folder.mkdir()
    journal: dict[int, Any] = {}
    first = FolderStream(folder, plan)
    for index in (0, 2):
        with first.group(index) as writer:
            write_group(writer, GROUPS[index], plan)
        journal[index] = json.loads(json.dumps(writer.files))
    second = FolderStream(folder, plan)
    for index, files in journal.items():
        second.restore(index, files)
    for index in (1, 3):
        with second.group(index) as writer:
            write_group(writer, GROUPS[index], plan)
    second.finish(tmp_path / "whole-source", {"msquant": "0"})
    assert same_files(tmp_path / "whole", folder)


def test_what_cannot_be_taken_over(tmp_path: Path, stream: FolderStream, plan: FolderPlan) -> None:
    with stream.group(0) as writer:
        write_group(writer, GROUPS[0], plan)
    other = FolderStream(tmp_path, plan)
    with pytest.raises(OutputError, match="group 1 was written as"):
        other.restore(1, writer.files)
    name = next(iter(writer.files))
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(OutputError, match="has 0 bytes, "):
        other.restore(0, writer.files)
    (tmp_path / name).unlink()
    with pytest.raises(OutputError, match="is missing"):
        other.restore(0, writer.files)
    assert other.files == {}


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_b_proj", "model.layers.2.self_attn.q_b_proj"])
@pytest.mark.parametrize("step", [1, 3, 7, 20])
def test_rows_in_pieces_give_the_same_tensor(tmp_path: Path, name: str, step: int) -> None:
    shape = {f"{name}.weight": (20, 12)}
    plan = plan_folder([shape], {name: FLOAT}, DEEPSEEK, "bfloat16")
    stream = FolderStream(tmp_path, plan)
    values = random_tensor(name, (20, 12))
    with stream.group(0) as writer:
        for start in reversed(range(0, 20, step)):
            writer.tensor_rows(f"{name}.weight", start, values[start : start + step])
    in_pieces = (tmp_path / "model-00001-of-00001.safetensors").read_bytes()
    with stream.group(0) as writer:
        writer.tensor(f"{name}.weight", values)
    assert in_pieces == (tmp_path / "model-00001-of-00001.safetensors").read_bytes()
    with stream.group(0) as writer:
        writer.linear(name, FloatLinear(values))
    assert in_pieces == (tmp_path / "model-00001-of-00001.safetensors").read_bytes()


def test_every_part_of_a_reordered_layer_has_the_order(tmp_path: Path) -> None:
    config = {**DEEPSEEK, "attention_bias": True}
    write_experts(tmp_path / "m", config)
    checkpoint = Checkpoint.open(tmp_path / "m")
    orders = row_orders(config)
    moved = 0
    for module in ("model.layers.0.self_attn.q_b_proj", "model.layers.1.self_attn.kv_a_proj_with_mqa"):
        order = orders.of(module)
        assert order is not None
        bias = f"{module}.bias" in checkpoint
        linear = random_linear(module, checkpoint.shape(f"{module}.weight"), W8A8, bias=bias)
        rows = order.deinterleaved()
        stored = {
            part: checkpoint.raw(f"{module}.{part}")
            for part in ("weight", "deq_scale", "quant_bias", "input_scale", "input_offset", "bias")
            if f"{module}.{part}" in checkpoint
        }
        np.testing.assert_array_equal(stored["weight"], linear.weight[rows])
        scale = stored["input_scale"][0].astype(np.float64)
        expected = (scale * linear.weight_scale.astype(np.float64)).astype(np.float32)  # type: ignore[union-attr]
        np.testing.assert_array_equal(stored["deq_scale"], expected[rows])
        sums = 3 if "kv_a" in module else -5
        np.testing.assert_array_equal(
            stored["quant_bias"], sums * linear.weight[rows].astype(int).sum(axis=1)
        )
        if bias:
            assert linear.bias is not None
            np.testing.assert_array_equal(stored["bias"], linear.bias[rows].astype(stored["bias"].dtype))
            moved += 1
    assert moved == 1


def test_the_config_is_the_models_without_what_misleads(tmp_path: Path) -> None:
    write_experts(tmp_path / "m", {**DEEPSEEK, "torch_dtype": "float32"})
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    left_out = {"quantization_config", "auto_map"}
    assert config == {name: value for name, value in DEEPSEEK.items() if name not in left_out} | {
        "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "golden-stick"},
        "rope_scaling": UNSCALED,
    }
    manifest = json.loads((tmp_path / "m" / "msquant.json").read_text())
    assert (manifest["format"], manifest["variant"]) == ("golden-stick", "mindformers")
    assert "tokenizer.json" in manifest["files"]


def test_misuse_is_refused(stream: FolderStream, tmp_path: Path) -> None:
    cases: list[tuple[Any, str]] = [
        (lambda w: w.tensor("x", np.ones(3)), "x is not planned in this group"),
        (lambda w: w.tensor(NORM, np.ones(3)), r"shape \[3\], but planned as BF16 \[16\]"),
        (lambda w: w.tensor_rows(NORM, 15, np.ones(2)), r"shape \[2\], but planned as BF16 \[16\]"),
        (lambda w: w.tensor(f"{O}.weight", np.ones((16, 10))), "write its layer with linear"),
        (lambda w: w.linear(O, random_linear(O, (16, 10), W8A8_DYNAMIC)), "W8A8_DYNAMIC, W8A8 is planned"),
        (lambda w: w.linear(O, random_linear(O, (16, 9), W8A8)), r"planned as I8 \[16, 10\]"),
        (lambda w: w.linear("model.layers.1.mlp.x", FloatLinear(np.ones((1, 1), np.float32))), "not planned"),
        (lambda w: (w.tensor(NORM, np.ones(16)), w.tensor(NORM, np.ones(16))), "twice"),
        (lambda w: w.tensor(NORM, np.ones(16)), "was not written|not complete"),
    ]
    for misuse, message in cases:
        with pytest.raises(OutputError, match=message), stream.group(0) as writer:
            misuse(writer)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="bfloat16 cannot hold"), stream.group(0) as writer:
        writer.tensor(NORM, np.full(16, np.inf))
    q = "model.layers.0.self_attn.q_b_proj"
    message = r"q_b_proj.weight is given with shape \[18, 12\]"
    with pytest.raises(OutputError, match=message), stream.group(0) as writer:
        writer.linear(q, random_linear(q, (18, 12), W8A8))
    assert stream.files == {}


def test_a_group_that_fails_leaves_nothing(stream: FolderStream, tmp_path: Path) -> None:
    def interrupted() -> None:
        with stream.group(0) as writer:
            writer.tensor(NORM, np.ones(16))
            assert len(list(tmp_path.iterdir())) == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_not_finished_before_all_groups_are(
    stream: FolderStream, plan: FolderPlan, tmp_path: Path
) -> None:
    with stream.group(0) as writer:
        write_group(writer, GROUPS[0], plan)
    source = write_source(tmp_path / "source", DEEPSEEK)
    with pytest.raises(OutputError, match="was not written"):
        stream.finish(source, {})
    assert not (tmp_path / "msquant.json").exists()


def test_one_tensor_at_a_time_is_held(tmp_path: Path) -> None:
    import tracemalloc

    names = [f"model.layers.0.mlp.experts.{expert}.up_proj" for expert in range(16)]
    config = {**DEEPSEEK, "num_hidden_layers": 1}
    plan = plan_folder(
        [{f"{name}.weight": (256, 1024) for name in names}],
        dict.fromkeys(names, W8A8_DYNAMIC),
        config,
        "bfloat16",
    )
    stream = FolderStream(tmp_path, plan)
    linear = random_linear(names[0], (256, 1024), W8A8_DYNAMIC)
    tracemalloc.start()
    try:
        with stream.group(0) as writer:
            for name in names:
                writer.linear(name, linear)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert plan.tensor_bytes > 16 * 2**18
    # Less than two of the sixteen weights, the buffer that hashes the file included.
    assert peak < 2 * 2**18 + 2**19
    shutil.rmtree(tmp_path)
