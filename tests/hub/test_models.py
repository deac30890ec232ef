"""A model's name leads to its folder, or to an error that says what would."""

from pathlib import Path

import pytest

from msquant.errors import ModelError
from msquant.hub.bundled import smollm2_folder
from msquant.hub.models import resolve_model


def test_bundled_name_is_the_converted_folder() -> None:
    assert resolve_model("smollm2-135m") == smollm2_folder()


def test_local_folder_is_itself(tiny_llama: Path) -> None:
    assert resolve_model(str(tiny_llama)) == tiny_llama


@pytest.mark.parametrize("name", ["", "no/such-model", "smollm2-135M"])
def test_unknown_name(name: str) -> None:
    with pytest.raises(ModelError, match="no such model") as caught:
        resolve_model(name)
    assert "smollm2-135m" in (caught.value.remedy or "")


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json") as caught:
        resolve_model(str(tmp_path))
    assert caught.value.where == str(tmp_path)


def test_file_instead_of_folder(tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match="this is a file"):
        resolve_model(str(tiny_llama / "model.safetensors"))
