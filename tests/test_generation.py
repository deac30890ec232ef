"""Which folder runs, on which engine, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest

from msquant.checkpoint.results import remember_result
from msquant.errors import CheckpointError, EngineError, ModelError
from msquant.flows.generation import find_model, generate
from msquant.inference.engine_protocol import Sampling
from tests.inference.quantized_folder import write_quantized


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that remembers nothing, and a current folder that holds nothing."""
    monkeypatch.setenv("MSQUANT_CACHE", str(tmp_path / "cache"))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


def finished(tiny_llama: Path, folder: Path) -> Path:
    shutil.copytree(tiny_llama, folder)
    (folder / "msquant.json").write_text("{}")
    return folder


def test_nothing_to_run(empty_cache: Path) -> None:
    with pytest.raises(ModelError, match="no model has been quantized or downloaded") as caught:
        find_model()
    assert "msquant quantize smollm2-135m --algo osl" in str(caught.value.remedy)


def test_newest_result_wins_over_the_folder_of_the_guide(empty_cache: Path, tiny_llama: Path) -> None:
    guide = shutil.copytree(tiny_llama, empty_cache / "DeepSeek-R1-W8A8")
    assert find_model().resolve() == guide
    older = finished(tiny_llama, empty_cache / "older")
    newer = finished(tiny_llama, empty_cache / "newer")
    remember_result(older)
    remember_result(newer)
    assert find_model() == newer
    shutil.rmtree(newer)
    assert find_model() == older
    assert find_model(guide) == guide


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_incomplete_folder(empty_cache: Path, tiny_llama: Path, missing: str) -> None:
    folder = shutil.copytree(tiny_llama, empty_cache / "model")
    (folder / missing).unlink()
    with pytest.raises((ModelError, CheckpointError), match=missing) as caught:
        find_model(folder)
    assert caught.value.where == str(folder)


def test_a_folder_may_have_the_shard_names_of_msmodelslim(empty_cache: Path, tiny_llama: Path) -> None:
    folder = shutil.copytree(tiny_llama, empty_cache / "model")
    (folder / "model.safetensors").rename(folder / "quant_model_weight_w8a8.safetensors")
    assert find_model(folder) == folder


def test_unfinished_result(empty_cache: Path, tiny_llama: Path) -> None:
    folder = shutil.copytree(tiny_llama, empty_cache / "result.partial")
    with pytest.raises(ModelError, match="unfinished"):
        find_model(folder)


def test_no_such_folder(empty_cache: Path) -> None:
    with pytest.raises(ModelError, match="no such model folder") as caught:
        find_model(empty_cache / "absent")
    assert "absent" in str(caught.value.where)


def test_quantized_and_float_folders(tiny_llama: Path, tmp_path: Path) -> None:
    quantized = write_quantized(tiny_llama, tmp_path / "quantized", calibration=list(range(60)))
    ready: list[tuple[Path, str]] = []
    for folder in (quantized, tiny_llama):
        result = generate(
            folder, ["I am"], Sampling(max_tokens=4), on_ready=lambda path, name: ready.append((path, name))
        )
        assert result.model == folder
        assert result.engine == "embedded"
        assert len(result.completions[0].token_ids) == 4
    assert ready == [(quantized, "embedded"), (tiny_llama, "embedded")]


def test_unknown_engine(tiny_llama: Path) -> None:
    with pytest.raises(EngineError, match="'tensorrt' is unknown") as caught:
        generate(tiny_llama, ["I am"], Sampling(), engine="tensorrt")
    assert "auto, embedded, vllm, vllm-mindspore" in str(caught.value.remedy)


def test_engine_that_is_not_available(tiny_llama: Path) -> None:
    with pytest.raises(EngineError, match="vllm_mindspore is not installed"):
        generate(tiny_llama, ["I am"], Sampling(), engine="vllm-mindspore")


def test_empty_prompt_is_refused_before_loading(empty_cache: Path) -> None:
    with pytest.raises(EngineError, match="is empty"):
        generate(empty_cache / "absent", [""], Sampling())


def change_config(source: Path, folder: Path, **changes: object) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_architecture_for_the_other_engine(tiny_llama: Path, tmp_path: Path) -> None:
    folder = change_config(tiny_llama, tmp_path / "model", model_type="gemma2")
    with pytest.raises(EngineError, match="'gemma2'") as caught:
        generate(folder, ["I am"], Sampling())
    assert caught.value.where == str(folder)
    assert "vLLM-MindSpore on an Ascend NPU can run this folder" in str(caught.value.remedy)
    assert "vllm_mindspore is not installed" in str(caught.value.remedy)


def test_another_tools_format(tiny_llama: Path, tmp_path: Path) -> None:
    folder = change_config(tiny_llama, tmp_path / "model", quantization_config={"quant_method": "quip"})
    with pytest.raises(ModelError, match="quip"):
        generate(folder, ["I am"], Sampling())


def test_missing_tokenizer(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(ModelError, match="tokenizer") as caught:
        generate(folder, ["I am"], Sampling())
    assert caught.value.where == str(folder)


def test_truncated_shard(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated") as caught:
        generate(folder, ["I am"], Sampling())
    assert caught.value.where == str(shard)
