"""How tensors are cut into shards."""

import numpy as np
import pytest

from msquant.checkpoint.shard_plan import PlannedShard, plan_shards, weight_map
from msquant.checkpoint.tensor_spec import TensorSpec
from msquant.errors import OutputError


def specs(prefix: str, *sizes: int) -> list[TensorSpec]:
    return [TensorSpec(f"{prefix}.{i}", "I8", (size,)) for i, size in enumerate(sizes)]


def sizes(planned: list[list[PlannedShard]]) -> list[list[list[int]]]:
    return [[[spec.nbytes for spec in shard.specs] for shard in group] for group in planned]


def test_every_group_starts_a_shard_and_keeps_its_order() -> None:
    groups = [specs("a", 4, 3, 3, 1), specs("b", 2), specs("c", 10, 1)]
    planned = plan_shards(groups, 10)
    assert sizes(planned) == [[[4, 3, 3], [1]], [[2]], [[10], [1]]]
    assert [shard.file_name for group in planned for shard in group] == [
        f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)
    ]
    flat = [spec for group in planned for shard in group for spec in shard.specs]
    assert flat == [*groups[0], *groups[1], *groups[2]]
    assert weight_map(planned[0])["a.3"] == "model-00002-of-00005.safetensors"
    assert planned == plan_shards(groups, 10)


def test_a_tensor_larger_than_a_shard_has_its_own() -> None:
    planned = plan_shards([specs("a", 1, 25, 1, 1)], 10)
    assert sizes(planned) == [[[1], [25], [1, 1]]]
    assert planned[0][1].nbytes == 25


def test_an_empty_group_has_no_shard() -> None:
    assert sizes(plan_shards([[], specs("a", 1), []])) == [[], [[1]], []]


def test_the_default_limit_is_five_gigabytes() -> None:
    expert = 2048 * 7168
    planned = plan_shards([[TensorSpec(str(i), "I8", (2048, 7168)) for i in range(3 * 256)]])
    assert [len(shard.specs) for shard in planned[0]] == [5 * 10**9 // expert] * 2 + [768 - 2 * 340]


def test_a_name_that_occurs_twice_is_refused() -> None:
    with pytest.raises(OutputError, match=r"a\.0 is to be written twice"):
        plan_shards([specs("a", 1), specs("a", 1)])


def test_a_spec_knows_its_size() -> None:
    spec = TensorSpec("w", "BF16", (3, 5, 2))
    assert (spec.nbytes, spec.rows, spec.row_bytes, str(spec)) == (60, 3, 20, "BF16 [3, 5, 2]")
    assert TensorSpec("s", "F32", ()).nbytes == 4
    assert TensorSpec.of("x", np.zeros((2, 0), np.float16)) == TensorSpec("x", "F16", (2, 0))
    assert TensorSpec("x", "F16", (2, 0)).nbytes == 0


def test_what_safetensors_cannot_store_is_refused() -> None:
    with pytest.raises(OutputError, match="x cannot be stored as F13"):
        TensorSpec("x", "F13", (1,))
    with pytest.raises(OutputError, match="complex128"):
        TensorSpec.of("x", np.zeros(1, np.complex128))
