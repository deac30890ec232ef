"""`quantize` into several formats at once: all are planned before any work, and all are there at the end."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msquant.checkpoint.disk import shown_sizes
from msquant.checkpoint.results import newest_result
from msquant.checkpoint.weights import QuantizedLinear
from msquant.errors import MsquantError
from msquant.flows.conversion import export, open_quantized
from msquant.flows.engines import load_embedded
from msquant.flows.generation import generate
from msquant.flows.pipeline import Progress, quantize
from msquant.formats.registry import folder_format, format_names
from msquant.formats.summary import summarize
from msquant.inference.engine_protocol import Sampling
from msquant.recipe.recipe import Recipe, validate_recipe
from msquant.schemes import W8A8_SHIFTED, W8A16
from tests.fixtures.policies import rules
from tests.fixtures.torch_simulation import greedy, load_simulation


def recipe_of(model: Path, *formats: str, **quantization: Any) -> Recipe:
    """The cheapest recipe there is: these tests are about folders."""
    return validate_recipe(
        {
            "model": str(model),
            "quantization": {"algorithm": "rtn", **quantization},
            "calibration": {"samples": 2, "sequence_length": 16},
            "format": list(formats),
        },
        "test",
    )


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def results(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    output = tmp_path_factory.mktemp("formats") / "out"
    return dict(quantize(recipe_of(tiny_llama, *format_names()), output).folders)


def test_every_format_has_its_folder(results: dict[Any, Path]) -> None:
    first = results["golden-stick"]
    assert [folder.name for folder in results.values()] == ["out", "out-compressed-tensors", "out-ascend"]
    assert {folder.name for folder in first.parent.iterdir()} == {folder.name for folder in results.values()}
    for name, folder in results.items():
        form = folder_format(folder)
        assert form is not None
        assert form.name == name
        assert form.validate(folder, verify_hashes=True) == []
        manifest = json.loads((folder / "msquant.json").read_text())
        assert manifest["recipe"]["format"] == list(format_names())
        assert [layer["index"] for layer in manifest["layers"]] == [0, 1]
    # What `msquant run` takes when it is not told.
    assert newest_result() == first


def test_formats_with_the_same_scales_generate_the_same(results: dict[Any, Path]) -> None:
    sampling = Sampling(max_tokens=8, ignore_eos=True)
    found = {
        name: generate(folder, ["import"], sampling, engine="embedded") for name, folder in results.items()
    }
    tokens = {name: done.completions[0].token_ids for name, done in found.items()}
    assert tokens["golden-stick"] == tokens["compressed-tensors"]


def test_rounding_the_scales_costs_less_than_quantizing(tiny_llama: Path, results: dict[Any, Path]) -> None:
    """vllm-ascend holds input scales in bfloat16, so its folder rounds other activations up and down."""

    def logits(folder: Path) -> Any:
        engine = load_embedded(folder)
        ids = engine.encode("import this and that, and nothing else")
        return np.concatenate(list(engine.logits(ids, len(ids))))

    plain, rounded = (logits(results[name]) for name in ("golden-stick", "ascend"))
    assert 0 < np.linalg.norm(rounded - plain) < np.linalg.norm(plain - logits(tiny_llama))


def test_export_writes_the_same(results: dict[Any, Path], tmp_path: Path) -> None:
    (exported,) = export(results["golden-stick"], ["ascend"], output=tmp_path / "again")
    assert content(exported.folder) == content(results["ascend"])


def test_an_interrupted_run_is_continued_between_formats(
    tiny_llama: Path, results: dict[Any, Path], tmp_path: Path
) -> None:
    recipe, output = recipe_of(tiny_llama, *format_names()), tmp_path / "out"

    def interrupt(text: str) -> None:
        if text == "writing ascend":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(recipe, output, progress=Progress(stage=interrupt))
    assert {path.name for path in tmp_path.iterdir()} == {"out.partial", "out-compressed-tensors"}
    finished = (tmp_path / "out-compressed-tensors" / "msquant.json").stat().st_mtime_ns

    again = quantize(recipe, output)
    assert again.layer_seconds == []
    assert (tmp_path / "out-compressed-tensors" / "msquant.json").stat().st_mtime_ns == finished
    for name, folder in again.folders.items():
        assert content(folder) == content(results[name]), name

    with pytest.raises(MsquantError, match="holds a result already"):
        quantize(recipe, output)


def refused(recipe: Recipe, folder: Path, message: str) -> None:
    layers: list[dict[str, Any]] = []
    before = sorted(folder.iterdir())
    with pytest.raises(MsquantError, match=message):
        quantize(recipe, folder / "out", progress=Progress(layer=layers.append))
    assert (layers, sorted(folder.iterdir())) == ([], before)


def test_what_one_format_cannot_express_is_refused_before_any_work(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_llama, "compressed-tensors", "golden-stick", schemes=rules(dynamic=["down_proj"]))
    refused(recipe, tmp_path, "native backend of vLLM-MindSpore cannot serve this: .* only W8A8 and FLOAT")


@pytest.mark.parametrize(("name", "word"), [("golden-stick", "W8A16"), ("compressed-tensors", "W2A16")])
def test_weights_alone_are_refused_where_nobody_serves_them(
    name: str, word: str, tiny_llama: Path, tmp_path: Path
) -> None:
    schemes = [{"down_proj": word}, *rules()]
    refused(recipe_of(tiny_llama, name, schemes=schemes), tmp_path, word)


@pytest.mark.parametrize("name", ["ascend", "compressed-tensors"])
def test_int8_weights_alone_compute_what_they_say(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    """The greedy tokens of transformers on torch with every linear's weights rounded by its own scales."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe = recipe_of(tiny_llama, name, schemes=rules(weight_only=["proj"]))
    folder = quantize(recipe, tmp_path / "out").folder
    form = folder_format(folder)
    assert form is not None
    assert form.validate(folder, verify_hashes=True) == []
    assert set(open_quantized(folder).linears.values()) == {W8A16}
    summary = summarize(folder)
    assert set(summary.schemes()) == {"W8A16", "FLOAT"}

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    for module, linear in model.named_modules():
        if isinstance(linear, torch.nn.Linear) and module != "lm_head":
            weight = linear.weight.data
            scale = 2 * weight.abs().amax(1, keepdim=True) / 255
            linear.weight.data = (weight / scale).round().clamp(-128, 127) * scale
    expected = greedy(model, AutoTokenizer.from_pretrained(tiny_llama), "import", 8)
    sampling = Sampling(max_tokens=8, ignore_eos=True)
    done = generate(folder, ["import"], sampling, engine="embedded")
    assert list(done.completions[0].token_ids) == expected


@pytest.mark.parametrize("algorithm", ["rtn", "osl"])
def test_zero_points_of_columns(algorithm: str, tiny_llama: Path, tmp_path: Path) -> None:
    """The greedy tokens of torch by the contract's arithmetic, and in no other format."""
    from transformers import AutoTokenizer

    recipe = recipe_of(tiny_llama, "golden-stick", algorithm=algorithm, schemes=[{"*": "W8A8_SHIFTED"}])
    folder = quantize(recipe, tmp_path / "out").folder
    form = folder_format(folder)
    assert form is not None
    assert form.validate(folder, verify_hashes=True) == []
    quantized = open_quantized(folder)
    assert set(quantized.linears.values()) == {W8A8_SHIFTED}
    assert set(summarize(folder).schemes()) == {"W8A8_SHIFTED", "FLOAT"}
    down = quantized.weights.linear("model.layers.0.mlp.down_proj")
    assert isinstance(down, QuantizedLinear)
    assert down.input_offset is not None
    assert len(set(down.input_offset.tolist())) > 1

    expected = greedy(load_simulation(folder), AutoTokenizer.from_pretrained(tiny_llama), "import", 8)
    sampling = Sampling(max_tokens=8, ignore_eos=True)
    done = generate(folder, ["import"], sampling, engine="embedded")
    assert list(done.completions[0].token_ids) == expected

    (tmp_path / "none").mkdir()
    for name in ("ascend", "compressed-tensors"):
        with pytest.raises(MsquantError, match="is W8A8_SHIFTED: in this format msquant writes "):
            export(folder, [name], output=tmp_path / name)
        refused(recipe_of(tiny_llama, name, schemes=[{"*": "W8A8_SHIFTED"}]), tmp_path / "none", "SHIFTED")


def test_a_folder_that_is_taken_is_refused_before_any_work(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out-ascend").mkdir()
    (tmp_path / "out-ascend" / "mine").write_text("x")
    refused(
        recipe_of(tiny_llama, "golden-stick", "ascend"), tmp_path, "out-ascend: holds files that msquant did"
    )


def test_the_disk_must_hold_all_formats(
    tiny_llama: Path, results: dict[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = 2 * sum(path.stat().st_size for path in results["golden-stick"].glob("*.safetensors"))
    monkeypatch.setattr("msquant.checkpoint.disk.free_bytes", lambda path: room)
    refused(recipe_of(tiny_llama, *format_names()), tmp_path, f"{shown_sizes(room)[0]} are free on its disk")


@pytest.mark.parametrize("formats", [[], ["gguf"], ["ascend", "ascend"], [["ascend"]]])
def test_formats_that_are_none(tiny_llama: Path, formats: list[Any]) -> None:
    with pytest.raises(
        MsquantError, match="one of golden-stick, compressed-tensors, ascend is expected, or a list"
    ):
        recipe_of(tiny_llama, *formats)
