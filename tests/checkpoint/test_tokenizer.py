"""Tokenizers are loaded from local files alone, quietly, or refused with a clear error."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from msquant.checkpoint.tokenizer import leading_tokens, load_tokenizer
from msquant.errors import ModelError


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def test_round_trip(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    text = topics["lambda"]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_leading_tokens(folder: Path) -> None:
    assert leading_tokens(load_tokenizer(folder)) == []
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    bos = {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|bos|>": {"id": "<|bos|>", "ids": [0], "tokens": ["<|bos|>"]}},
    }
    path.write_text(json.dumps(content))
    assert leading_tokens(load_tokenizer(folder)) == [0]


def test_nothing_is_printed_even_without_torch(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 4}))
    script = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
        "from pathlib import Path\n"
        "from msquant.checkpoint.tokenizer import load_tokenizer\n"
        "tokens = load_tokenizer(Path(sys.argv[1])).encode('longer than four tokens')\n"
        "assert len(tokens) > 4\n"
    )
    result = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.where == str(tmp_path)
    assert "Copy tokenizer.json" in (caught.value.remedy or "")


@pytest.mark.parametrize("content", ["", "{}", '{"model": ', '{"model": {"type": "BPE"}}'])
def test_damaged_tokenizer(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
        load_tokenizer(folder)


def test_code_in_the_folder_is_not_run(folder: Path) -> None:
    marker = folder / "ran"
    (folder / "custom.py").write_text(f"open({str(marker)!r}, 'w')\nclass Custom: pass\n")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {
        "tokenizer_class": "Custom",
        "auto_map": {"AutoTokenizer": ["custom.Custom", "custom.Custom"]},
    }
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
        load_tokenizer(folder)
    assert not marker.exists()
