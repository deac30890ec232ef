"""Hours of downloading are not begun for a result that has no room."""

from pathlib import Path

import pytest

from msquant.errors import OutputError
from msquant.planning.quantization_plan import require_room
from msquant.recipe.recipe import Recipe


def test_a_disk_without_room_for_the_result_is_refused(small_disk: Path, tmp_path: Path) -> None:
    recipe = Recipe(model="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B")
    with pytest.raises(OutputError, match=r"kB are free on its disk, [\d.]+ GB are needed") as caught:
        require_room(recipe, small_disk / "out", None, tmp_path)
    assert "for the weights" not in caught.value.what
    with pytest.raises(OutputError, match=r"and 3\.\d GB for the weights"):
        require_room(recipe, small_disk / "out", None, small_disk / "cache")


def test_what_is_not_known_here_is_let_through(small_disk: Path) -> None:
    require_room(Recipe(model="some-org/unheard-of"), small_disk / "out", None, small_disk)
