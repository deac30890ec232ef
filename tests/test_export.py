"""A quantized folder in another format: what stays, what is carried over, and what is refused."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.writer import file_sha256
from msquant.errors import MsquantError
from msquant.flows.conversion import ExportProgress, export, open_quantized
from msquant.flows.engines import open_weights
from msquant.formats.registry import FormatName, folder_format, format_names
from msquant.schemes import FLOAT, W8A8, W8A8_DYNAMIC, W8A16
from tests.formats.expert_folders import DEEPSEEK, groups_of, write_experts
from tests.formats.folders import CONFIG, change_json

COMPLETE = {"max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "torch_dtype": "bfloat16"}
MODELS: dict[str, dict[str, Any]] = {
    "llama": CONFIG | COMPLETE,
    "qwen2 with biases": CONFIG | COMPLETE | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "qwen2 in float16": CONFIG | COMPLETE | {"model_type": "qwen2", "torch_dtype": "float16"},
    "deepseek with biases": DEEPSEEK
    | COMPLETE
    | {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "attention_bias": True},
}


def tensors(folder: Path) -> dict[str, np.ndarray]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.raw(name) for name in checkpoint.names()}


def assert_same_tensors(first: Path, second: Path) -> None:
    mine, theirs = tensors(first), tensors(second)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert mine[name].dtype == theirs[name].dtype, name
        assert mine[name].tobytes() == theirs[name].tobytes(), name


def write(folder: Path, config: Mapping[str, Any], name: FormatName = "golden-stick", **options: Any) -> Path:
    write_experts(folder, config, format_name=name, **options)
    return folder


def through(folder: Path, *names: FormatName) -> Path:
    """Export a folder to a format, that one to the next, and so on."""
    for name in names:
        folder = export(folder, [name], output=folder.with_name(f"{folder.name}-{name[0]}"))[0].folder
        form = folder_format(folder)
        assert form is not None
        assert form.validate(folder, verify_hashes=True) == []
    return folder


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("way", [format_names()[1:], format_names()[:0:-1]])
def test_a_round_trip_changes_no_bit(tmp_path: Path, model: str, way: tuple[FormatName, ...]) -> None:
    folder = write(tmp_path / "m", MODELS[model])
    back = through(folder, *way, "golden-stick")
    assert_same_tensors(folder, back)
    for name in (
        "quantization_description.json",
        "config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
    ):
        assert (folder / name).read_bytes() == (back / name).read_bytes()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("start", format_names())
def test_every_format_holds_the_same_layers(tmp_path: Path, model: str, start: FormatName) -> None:
    config = MODELS[model]
    folder = write(tmp_path / "m", config, start)
    source = open_quantized(folder)
    others = [name for name in format_names() if name != start]
    for result in export(folder, others):
        assert result.folder == tmp_path / f"m-{result.format}"
        weights = open_weights(result.folder)
        for module, scheme in source.linears.items():
            before, after = source.weights.linear(module), weights.linear(module)
            assert type(before) is type(after), module
            np.testing.assert_array_equal(before.weight, after.weight)
            np.testing.assert_array_equal(np.asarray(before.bias), np.asarray(after.bias))
            if scheme != FLOAT:
                np.testing.assert_allclose(before.weight_scale, after.weight_scale, rtol=1e-6)  # type: ignore[union-attr]
                np.testing.assert_array_equal(before.input_scale, after.input_scale)  # type: ignore
                np.testing.assert_array_equal(before.input_offset, after.input_offset)  # type: ignore
        for group in groups_of(config):
            for name in group:
                if name.rpartition(".")[0] not in source.linears:
                    np.testing.assert_array_equal(source.weights.tensor(name), weights.tensor(name))


def test_the_manifest_is_carried_over(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", MODELS["llama"])
    layers = [{"index": 0, "error": 0.5, "groups": []}]
    change_json(
        folder / "msquant.json", lambda manifest: manifest.update(recipe={"model": "x"}, layers=layers)
    )
    (result,) = export(folder, ["compressed-tensors"])
    manifest = json.loads((result.folder / "msquant.json").read_text())
    assert (manifest["recipe"], manifest["layers"]) == ({"model": "x"}, layers)
    assert (manifest["format"], manifest["variant"]) == ("compressed-tensors", result.variant)
    exported = manifest["exported_from"]
    assert (exported["format"], exported["variant"]) == ("golden-stick", "native")
    assert exported["manifest_sha256"] == file_sha256(folder / "msquant.json")
    assert set(manifest["files"]) == {path.name for path in result.folder.iterdir()} - {"msquant.json"}


def test_a_folder_of_another_tool_has_no_manifest(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", MODELS["llama"], "compressed-tensors")
    (folder / "msquant.json").unlink()
    (result,) = export(folder, ["golden-stick"])
    manifest = json.loads((result.folder / "msquant.json").read_text())
    assert manifest["exported_from"]["manifest_sha256"] is None
    assert manifest["format"] == "golden-stick"


def test_shards_are_cut_alike(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", MODELS["deepseek with biases"])
    done: list[int] = []
    (result,) = export(folder, ["ascend"], progress=ExportProgress(parts=done.append, part=done.append))
    assert done == [4, 1, 2, 3, 4]
    shards = {path.name for path in result.folder.glob("*.safetensors")}
    assert shards == {path.name for path in folder.glob("*.safetensors")}


def refused(folder: Path, message: str, *names: FormatName, output: Path | None = None) -> None:
    """An export ends with an error, and nothing is left of it."""
    before = sorted(folder.parent.iterdir())
    with pytest.raises(MsquantError, match=message):
        export(folder, names or ("compressed-tensors",), output=output)
    assert sorted(folder.parent.iterdir()) == before


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    good = write(tmp_path / "good", MODELS["llama"])
    refused(tmp_path / "none", "no such folder")
    refused(tmp_path / "good-source", "is not quantized")
    refused(good, "is in the golden-stick format already", "golden-stick")

    def broken(name: str) -> Path:
        return Path(shutil.copytree(good, tmp_path / name))

    folder = broken("tampered")
    shard = folder / "model-00001-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    refused(folder, r"model-00001-of-00003.safetensors: was changed: its sha256")

    folder = broken("incomplete")
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(folder, "model-00002-of-00003.safetensors")

    folder = broken("short")
    change_json(folder / "config.json", lambda config: config.update(num_hidden_layers=3))
    refused(folder, "model.layers.2")

    folder = broken("hostile")
    change_json(
        folder / "model.safetensors.index.json",
        lambda index: index["weight_map"].update(
            {"model.norm.weight": "../good/model-00003-of-00003.safetensors"}
        ),
    )
    refused(folder, "not the name of a file in this folder")

    folder = broken("awq")
    for name in ("quantization_description.json", "msquant.json"):
        (folder / name).unlink()
    change_json(
        folder / "config.json", lambda config: config.update(quantization_config={"quant_method": "quip"})
    )
    refused(folder, "quantized as 'quip'")


def test_what_a_format_cannot_express_is_refused(tmp_path: Path) -> None:
    schemes = {"model.layers.0.mlp.down_proj": W8A8_DYNAMIC}
    config = MODELS["llama"]
    modules = [
        name.removesuffix(".weight") for group in groups_of(config)[:2] for name in group if "proj" in name
    ]
    dynamic = write(
        tmp_path / "dynamic", config, "compressed-tensors", schemes=dict.fromkeys(modules, W8A8) | schemes
    )
    refused(
        dynamic, "golden-stick: the native backend of vLLM-MindSpore .* only W8A8 and FLOAT", "golden-stick"
    )
    schemes = dict.fromkeys(modules, W8A8) | {modules[3]: W8A16}
    alone = write(tmp_path / "alone", config, "ascend", schemes=schemes)
    refused(alone, "the native backend of vLLM-MindSpore .* only W8A8 and FLOAT", "golden-stick")
    single = write(tmp_path / "single", config | {"torch_dtype": "float32"}, "compressed-tensors")
    for name in ("golden-stick", "ascend"):
        refused(single, "is in float32: .* takes bfloat16 or float16", name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["self_attn.q_proj.input_scale", "input_layernorm.weight", "self_attn.k_proj.bias"]
)
def test_more_digits_than_formats_hold_are_refused(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "m", MODELS["qwen2 with biases"], "ascend")
    (folder / "msquant.json").unlink()
    shard = folder / "model-00001-of-00003.safetensors"
    changed = load_file(shard)
    name = f"model.layers.0.{name}"
    changed[name] = changed[name].astype(np.float32) + np.float32(2**-20)
    save_file(changed, shard, metadata={"format": "pt"})
    refused(folder, f"{name}: is stored as F32 with more digits than bfloat16 holds")


def test_outputs_that_exist_and_full_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "m", MODELS["llama"])
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("x")
    refused(folder, "holds files that msquant did not write", "ascend", output=tmp_path / "taken")
    (tmp_path / "taken-ascend").mkdir()
    (tmp_path / "taken-ascend" / "mine").write_text("x")
    refused(folder, "did not write", "compressed-tensors", "ascend", output=tmp_path / "taken")

    monkeypatch.setattr("msquant.checkpoint.disk.free_bytes", lambda path: 10)
    refused(folder, "10 bytes are free on its disk", "ascend")
    monkeypatch.undo()

    (result,) = export(folder, ["ascend"])
    refused(folder, "holds a result already", "ascend")
    before = tensors(result.folder)
    (again,) = export(folder, ["ascend"], overwrite=True)
    assert tensors(again.folder).keys() == before.keys()


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", MODELS["llama"])
    before = sorted(tmp_path.iterdir())

    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(folder, ["ascend"], progress=ExportProgress(part=interrupt))
    assert sorted(tmp_path.iterdir()) == before
