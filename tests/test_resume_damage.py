"""A run that continues another makes the bytes of an undisturbed one, or names the file that is not right."""

import os
import random
import shutil
from pathlib import Path

import pytest

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.errors import MsquantError, StartOverError
from msquant.flows.pipeline import Progress, quantize
from msquant.recipe.recipe import Recipe, validate_recipe
from tests.fixtures.quantize_process import digests
from tests.fixtures.tiny_model import write_tiny_llama

READ = "model.layers.0.mlp.up_proj.weight"
UNREAD = "model.layers.1.mlp.up_proj.weight"


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


class Unfinished:
    """A run of two layers that was interrupted after the first, to damage and to continue."""

    def __init__(self, folder: Path, recipe: Recipe, model: Path) -> None:
        self.output = folder / "out"
        self.partial = folder / "out.partial"
        self.recipe = recipe
        self.model = model

    def resume(self) -> dict[str, str]:
        return digests(quantize(self.recipe, self.output, source=str(self.model)).folder)

    def refused(self, file: Path) -> StartOverError:
        with pytest.raises(StartOverError) as caught:
            self.resume()
        assert caught.value.where == str(file)
        assert not self.output.exists()
        return caught.value


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return validate_recipe(
        {
            "model": "named/by-source",
            "quantization": {"smooth_alpha": [0.5]},
            "calibration": {"samples": 2, "sequence_length": 16},
            "evaluation": {"sequences": 0},
        },
        "test",
    )


@pytest.fixture(scope="module")
def made(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an unfinished run and its model."""
    folder = tmp_path_factory.mktemp("made")
    model = write_tiny_llama(folder / "model", layers=2, dtype="bfloat16", max_shard_size="50KB")
    with pytest.raises(KeyboardInterrupt):
        quantize(recipe, folder / "out", source=str(model), progress=Progress(layer=interrupt))
    return folder


@pytest.fixture(scope="module")
def expected(made: Path, recipe: Recipe) -> dict[str, str]:
    """What a run makes that nobody interrupts."""
    return digests(quantize(recipe, made / "whole", source=str(made / "model")).folder)


@pytest.fixture
def run(made: Path, recipe: Recipe, tmp_path: Path) -> Unfinished:
    """A copy of it."""
    shutil.copytree(made / "out.partial", tmp_path / "out.partial")
    return Unfinished(tmp_path, recipe, Path(shutil.copytree(made / "model", tmp_path / "model")))


def flip(path: Path, place: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))


def flip_tensor(model: Path, name: str) -> Path:
    """Change a value of a tensor, and no header; returns its file."""
    checkpoint = Checkpoint.open(model)
    shard = checkpoint.shards[checkpoint.weight_map[name]]
    flip(shard.path, shard.entries[name].offset)
    return shard.path


@pytest.mark.slow
def test_a_copied_source_is_the_same(run: Unfinished, expected: dict[str, str]) -> None:
    # Every file of the copy has another inode, so all that was read is hashed again.
    assert run.resume() == expected


def test_a_flipped_bit_in_a_finished_shard_is_found(run: Unfinished) -> None:
    shard = run.partial / "model-00001-of-00003.safetensors"
    flip(shard, shard.stat().st_size // 2)
    error = run.refused(shard)
    assert error.remedy == "start over with --restart"
    assert "of 2 decoder layers are finished" in error.__notes__[0]
    assert "same command" not in error.__notes__[0]


def test_a_source_that_changed_after_it_was_read_is_named(run: Unfinished) -> None:
    before = {path: path.stat() for path in run.model.iterdir()}
    shard = flip_tensor(run.model, READ)
    os.utime(shard, ns=(before[shard].st_atime_ns, before[shard].st_mtime_ns))
    error = run.refused(shard)
    assert "layers of two models" in error.what


@pytest.mark.slow
def test_a_source_is_what_it_is_when_it_is_read(run: Unfinished, expected: dict[str, str]) -> None:
    flip_tensor(run.model, UNREAD)
    whole = quantize(run.recipe, run.output.with_name("whole"), source=str(run.model)).folder
    assert run.resume() == digests(whole) != expected


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_error_and_note_agree_on_what_to_do_without_hidden_states(damage: str, run: Unfinished) -> None:
    (states,) = (run.partial / "scratch").glob("hidden-*.f32")
    states.unlink() if damage == "missing" else flip(states, 100)
    error = run.refused(states)
    assert damage in error.what
    assert error.remedy == "start over with --restart"
    assert "same command" not in "".join(error.__notes__)
    assert run.partial.exists()


@pytest.mark.slow
def test_a_hundred_damages_anywhere_end_with_the_same_bytes_or_an_error_that_names_the_file(
    made: Path, recipe: Recipe, expected: dict[str, str], tmp_path: Path
) -> None:
    chance, ends = random.Random(18), {"same": 0, "error": 0}
    for number in range(100):
        folder = tmp_path / str(number)
        shutil.copytree(made / "out.partial", folder / "out.partial")
        files = [path for path in (folder / "out.partial").rglob("*") if path.is_file()]
        path = chance.choice([path for path in sorted(files) if path.stat().st_size])
        place = chance.randrange(path.stat().st_size)
        if chance.random() < 0.5:
            flip(path, place, chance.randrange(8))
        else:
            os.truncate(path, place)
        refused = None
        try:
            result = Unfinished(folder, recipe, made / "model").resume()
        except MsquantError as error:
            refused = error
        if refused is None:
            assert result == expected, (number, path, place)
        else:
            assert refused.where == str(path), (number, path, place, refused)
            assert not (folder / "out").exists()
        ends["error" if refused else "same"] += 1
        shutil.rmtree(folder)
    assert all(ends.values()), ends
