"""What decides whether two runs are the same, and what the manifest carries."""

import json
from pathlib import Path

import numpy as np
import pytest

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.flows.manifest import build_manifest, job_identity, layer_record
from msquant.kernels.layer_report import GroupReport, LayerReport
from msquant.recipe.recipe import find_recipe
from tests.fixtures.tiny_model import write_tiny_llama


def test_serving_is_carried_along_but_changes_no_result(tmp_path: Path) -> None:
    source = Checkpoint.open(write_tiny_llama(tmp_path / "model"))
    tokens = np.zeros((1, 2), np.int32)
    tensor, hybrid = find_recipe("deepseek-r1"), find_recipe("deepseek-r1-dp4-tp4-ep4")
    hybrid = hybrid.model_copy(update={"description": tensor.description})
    identity = job_identity(tensor, source, tokens, "cpu")
    assert job_identity(hybrid, source, tokens, "cpu") == identity

    manifest = build_manifest(hybrid, identity, [])
    assert manifest["recipe"]["serving"]["data_parallel_size"] == 4
    assert manifest["recipe"] == hybrid.model_dump(mode="json")

    other = hybrid.replace("calibration", seed=1)
    assert job_identity(other, source, tokens, "cpu") != identity


@pytest.mark.parametrize("value", [7.568301953142509e-05, 0.002398566124611534, 123456.789])
def test_digits_that_depend_on_the_process_are_not_kept(value: float) -> None:
    policy = find_recipe("deepseek-r1").quantization
    records = []
    for noise in (1, 1 + 1e-6, 1 - 1e-6):
        group = GroupReport("qkv", 0.5, value * noise)
        report = LayerReport("model.layers.0", [group], error=value * noise)
        records.append(json.dumps(layer_record(0, report, policy)))
    assert len(set(records)) == 1
    record = json.loads(records[0])
    assert record["error"] == record["groups"][0]["loss"] == pytest.approx(value, rel=1e-3)


def test_no_loss_is_recorded_where_nothing_is_searched() -> None:
    policy = find_recipe("deepseek-r1").quantization
    record = layer_record(0, LayerReport("model.layers.0", [GroupReport("qkv", 0.5)], error=0.0), policy)
    assert record["groups"] == [{"name": "qkv", "alpha": 0.5}]
    assert record["error"] == 0.0
