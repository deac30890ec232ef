"""What decides whether two runs are the same, and what the manifest carries."""

from pathlib import Path

import numpy as np

from msquant.checkpoint.reader import Checkpoint
from msquant.manifest import build_manifest, job_identity
from msquant.recipes import find_recipe
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
