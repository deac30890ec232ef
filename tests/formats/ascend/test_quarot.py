"""What msModelSlim's QuaRot says beside its weights: read where it is right, named where it is not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msquant.checkpoint.writer import write_shard
from msquant.formats.ascend.form import AscendFormat
from msquant.formats.ascend.layout import DESCRIPTION_NAME
from msquant.models.rotation import Hadamard, StoredRotation
from msquant.schemes import W8A8
from tests.formats.expert_folders import schemes_of, write_experts
from tests.formats.folders import CONFIG, change_json

FORM = AscendFormat()
PATH = "optional/quarot.safetensors"
MATRIX = Hadamard(16).rotate(np.eye(16, dtype=np.float32))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_experts(
        tmp_path / "m", CONFIG, schemes=dict.fromkeys(schemes_of(CONFIG), W8A8), format_name="ascend"
    )
    (tmp_path / "m/msquant.json").unlink()
    return tmp_path / "m"


def describe(folder: Path, optional: Any) -> None:
    change_json(folder / DESCRIPTION_NAME, lambda description: description.update(optional=optional))


def with_matrix(folder: Path, matrix: np.ndarray, path: Any = PATH, name: str = "global_rotation") -> None:
    (folder / "optional").mkdir()
    write_shard(folder / PATH, {name: matrix})
    describe(folder, {"quarot": {"rotation_map": {"global_rotation": path}}})


def test_the_matrix_is_read(folder: Path) -> None:
    assert FORM.residual_rotation(folder, 16) is None
    with_matrix(folder, MATRIX)
    assert FORM.validate(folder) == []
    found = FORM.residual_rotation(folder, 16)
    assert found is not None
    np.testing.assert_array_equal(found, MATRIX)
    states = np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32)
    ours, theirs = Hadamard(16), StoredRotation(found)
    np.testing.assert_allclose(theirs.rotate(states), ours.rotate(states), atol=1e-6)
    np.testing.assert_allclose(theirs.undo(theirs.rotate(states)), states, atol=1e-6)


@pytest.mark.parametrize("optional", [{}, {"quarot": {}}, {"quarot": {"rotation_map": {}}}, None, {"x": 1}])
def test_what_else_is_optional_is_passed_over(folder: Path, optional: Any) -> None:
    describe(folder, optional)
    assert FORM.validate(folder) == []
    assert FORM.open(folder).linear("model.layers.0.mlp.up_proj").scheme == W8A8
    assert FORM.residual_rotation(folder, 16) is None


@pytest.mark.parametrize(
    ("matrix", "path", "name", "problem"),
    [
        (MATRIX, "../quarot.safetensors", "global_rotation", "'../quarot.safetensors'"),
        (MATRIX, "/etc/passwd", "global_rotation", "absolute"),
        (MATRIX, 7, "global_rotation", "is 7: it is no path"),
        (MATRIX, "optional/other.safetensors", "global_rotation", ""),
        (MATRIX, PATH, "rotation", "holds no global_rotation"),
        (MATRIX[:8], PATH, "global_rotation", "has shape [8, 16], a square is expected"),
        (MATRIX[:8, :8], PATH, "global_rotation", "is not orthogonal"),
        (MATRIX * np.nan, PATH, "global_rotation", "is not orthogonal"),
        (np.eye(8, dtype=np.float32), PATH, "global_rotation", "of 8 channels, config.json says 16"),
    ],
)
def test_a_wrong_one_is_named_and_the_weights_are_read_all_the_same(
    folder: Path, matrix: np.ndarray, path: Any, name: str, problem: str
) -> None:
    with_matrix(folder, matrix, path, name)
    (found,) = FORM.validate(folder)
    assert problem in found.problem
    assert FORM.open(folder).linear("model.layers.0.mlp.up_proj").scheme == W8A8


def test_a_file_that_claims_any_size_and_links_in_a_circle_are_named(folder: Path) -> None:
    with_matrix(folder, MATRIX)
    (folder / PATH).unlink()
    (folder / PATH).symlink_to(folder / PATH)
    assert len(FORM.validate(folder)) == 1
    (folder / PATH).unlink()
    size = 1 << 20
    header = json.dumps(
        {"global_rotation": {"dtype": "F32", "shape": [size, size], "data_offsets": [0, 4 * size * size]}}
    ).encode()
    with (folder / PATH).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * size * size)
    (found,) = FORM.validate(folder)
    assert f"of {size} channels, config.json says 16" in found.problem
