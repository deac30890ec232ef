"""Multi-token-prediction layers go through the pass that decoder layers go through, with their own inputs."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.weights import QuantizedLinear
from msquant.cli.app import app
from msquant.errors import CalibrationError, CheckpointError, RecipeError
from msquant.flows.calibration import calibration_of
from msquant.flows.conversion import export, open_quantized
from msquant.flows.generation import load_engine
from msquant.flows.pipeline import quantize
from msquant.formats.registry import folder_format
from msquant.inference.engine_protocol import Sampling
from msquant.models.config_json import read_config
from msquant.models.device import use_device
from msquant.models.layers import DecoderLayer, positions
from msquant.models.network import Embedding, PredictionInput
from msquant.planning.quantization_plan import make_plan
from msquant.progress import Progress
from msquant.recipe.recipe import Recipe, find_recipe, validate_recipe
from tests.fixtures.quantize_process import digests
from tests.fixtures.tiny_families import transformers_model, write_tiny

LAYERS = 2
FIRST = f"model.layers.{LAYERS}"


def recipe_for(folder: Path, formats: str = "ascend", **quantization: Any) -> Recipe:
    recipe = find_recipe(str(folder)).adjusted(formats=formats, samples=4, sequence_length=24, evaluate=False)
    return recipe.replace("quantization", **({"smooth_alpha": [0.5]} | quantization))


def reference(folder: Path, tokens: np.ndarray, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and outputs `[B, T - k, H]` of the decoder layer in each prediction layer.

    The decoder layers are transformers'; what is around them is written as arXiv 2412.19437, 2.2, has it, in
    float32.
    """
    model = transformers_model(folder, attn_implementation="eager")
    stored = {key: value.float() for key, value in load_file(folder / "model.safetensors").items()}
    config, ids, found = model.config, torch.from_numpy(tokens).long(), []

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps) * stored[name]

    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state  # behind the last norm
        for k in range(1, count + 1):
            name = f"model.layers.{LAYERS + k - 1}."
            embedded = stored[f"{name}embed_tokens.weight"][ids[:, k:]]
            joined = torch.cat(
                [norm(embedded, f"{name}enorm.weight"), norm(hidden[:, :-1], f"{name}hnorm.weight")], -1
            )
            x = joined @ stored[f"{name}eh_proj.weight"].T
            layer = type(model.model.layers[0])(config, LAYERS - 1).eval()
            parts = {
                key.removeprefix(name): value
                for key, value in stored.items()
                if key.startswith(name) and ".indexer." not in key
            }
            missing, unexpected = layer.load_state_dict(parts, strict=False)
            assert not missing
            assert {key.partition(".")[0] for key in unexpected} == {
                "embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head"
            }  # fmt: skip
            places = torch.arange(x.shape[1])[None]
            mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)[None, None]
            rotary = model.model.rotary_emb(x, places)
            y = layer(x, attention_mask=mask, position_ids=places, position_embeddings=rotary)
            y = y[0] if isinstance(y, tuple) else y
            found.append((x, y))
            hidden = norm(y, f"{name}shared_head.norm.weight")
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DeepSeek-V3 in float32 with two prediction layers."""
    return write_tiny(tmp_path_factory.mktemp("source"), "deepseek_v3", prediction_layers=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in bfloat16 with one."""
    folder = tmp_path_factory.mktemp("model")
    return write_tiny(folder, "deepseek_v3", dtype="bfloat16", prediction_layers=1)


@pytest.fixture(scope="module")
def quantized(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(recipe_for(model), tmp_path_factory.mktemp("quantized") / "out", remember=False).folder


@pytest.mark.parametrize("kind", ["deepseek_v3", "kimi_k2", "deepseek_v32", "glm_moe_dsa", "glm4_moe"])
def test_both_layers_compute_what_transformers_does(kind: str, tmp_path: Path) -> None:
    from mindspore import Tensor

    source, dtype = write_tiny(tmp_path / "source", kind, prediction_layers=2), use_device("cpu")
    tokens = np.random.default_rng(0).integers(0, 500, (3, 12)).astype(np.int32)
    config, weights = read_config(source), Checkpoint.open(source)
    places = positions(config, tokens.shape[1], dtype)
    hidden = Embedding(config, weights, dtype)(tokens)
    for index in range(LAYERS):
        hidden = DecoderLayer(config, weights, index, dtype)(hidden, places)
    states = hidden.asnumpy()
    for k, (inputs, outputs) in enumerate(reference(source, tokens, 2)):
        ours = PredictionInput(config, weights, LAYERS + k, dtype)(states, tokens)
        np.testing.assert_allclose(ours, inputs.numpy(), rtol=1e-4, atol=1e-4)
        states = DecoderLayer(config, weights, LAYERS + k, dtype)(Tensor(ours, dtype), places).asnumpy()
        np.testing.assert_allclose(states, outputs.numpy(), rtol=1e-4, atol=1e-4)


def test_ranges_are_those_of_its_own_inputs(source: Path, tmp_path: Path) -> None:
    """Both layers' static scales, from transformers' inputs by golden-stick's formula."""
    recipe = find_recipe(str(source)).adjusted(algo="rtn", formats="ascend", samples=4, sequence_length=24)
    recipe = recipe.replace("evaluation", sequences=0)
    folder = quantize(recipe, tmp_path / "out", remember=False).folder
    tokens = calibration_of(recipe.calibration, source, offline=True).samples.tokens
    stored, opened = load_file(source / "model.safetensors"), open_quantized(folder).weights
    for k, (inputs, _) in enumerate(reference(source, tokens, 2)):
        layer = f"model.layers.{LAYERS + k}"
        x = inputs * torch.rsqrt(inputs.pow(2).mean(-1, keepdim=True) + 1e-6)
        x = x * stored[f"{layer}.input_layernorm.weight"]
        linear = opened.linear(f"{layer}.self_attn.q_a_proj")
        assert isinstance(linear, QuantizedLinear)
        assert linear.input_scale is not None
        expected = float(x.max().clamp(min=0) - x.min().clamp(max=0)) / 255
        assert float(linear.input_scale[0]) == pytest.approx(expected, rel=1e-2)


def test_it_is_described_and_stored_as_the_decoder_layers_are(model: Path, quantized: Path) -> None:
    form = folder_format(quantized)
    assert form is not None
    assert form.validate(quantized, verify_hashes=True) == []
    words = json.loads((quantized / "quant_model_description.json").read_text())
    last, predicted = (
        {name.removeprefix(layer): word for name, word in words.items() if name.startswith(layer)}
        for layer in (f"model.layers.{LAYERS - 1}.", f"{FIRST}.")
    )
    around = {
        "embed_tokens.weight",
        "enorm.weight",
        "hnorm.weight",
        "eh_proj.weight",
        "shared_head.norm.weight",
        "shared_head.head.weight",
    }
    assert set(predicted) - set(last) == around
    assert {predicted[name] for name in around} == {"FLOAT"}
    assert {name: predicted[name] for name in last} == last
    assert set(last.values()) == {"FLOAT", "W8A8", "W8A8_DYNAMIC"}
    original, written = Checkpoint.open(model), Checkpoint.open(quantized)
    for name in around:
        name = f"{FIRST}.{name}"
        np.testing.assert_array_equal(written.tensor(name), original.tensor(name))
    layers = json.loads((quantized / "msquant.json").read_text())["layers"]
    assert [layer["index"] for layer in layers] == [0, 1, 2]
    assert 0 < layers[2]["error"] < 0.01
    assert sum(layers[2]["experts"]["tokens"]) == 4 * 4 * 23


def test_the_weights_are_those_of_the_source(model: Path, quantized: Path) -> None:
    """Dequantized, and smoothed with the norm before them, within half a step of each row."""
    original, opened = Checkpoint.open(model), open_quantized(quantized)
    norm = f"{FIRST}.input_layernorm"
    smooth = original.tensor(f"{norm}.weight") / opened.weights.tensor(f"{norm}.weight")
    linear = opened.weights.linear(f"{FIRST}.self_attn.q_a_proj")
    assert isinstance(linear, QuantizedLinear)
    expected = original.tensor(f"{FIRST}.self_attn.q_a_proj.weight") * smooth
    step = linear.weight_scale.reshape(-1, 1)
    # The norm is stored in bfloat16. Clipped weights lie further away, and are few.
    away = np.abs(linear.weight * step - expected) / step
    assert np.median(away) < 0.5
    assert np.quantile(away, 0.95) < 1.0


@pytest.mark.parametrize("moment", ["layer", "step"])
def test_a_run_that_ends_in_it_continues_with_equal_bytes(
    moment: str, model: Path, quantized: Path, tmp_path: Path
) -> None:
    finished: list[int] = []

    def layer(record: dict[str, Any]) -> None:
        finished.append(record["index"])
        if moment == "layer" and len(finished) == LAYERS:
            raise KeyboardInterrupt

    def step(text: str) -> None:
        if moment == "step" and len(finished) == LAYERS and text == "attention":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(recipe_for(model), tmp_path / "out", progress=Progress(layer=layer, step=step))
    seen: list[tuple[int, int]] = []
    progress = Progress(layers=lambda *counts: seen.append(counts))
    quantize(recipe_for(model), tmp_path / "out", progress=progress, remember=False)
    assert seen == [(LAYERS + 1, LAYERS)]
    assert digests(tmp_path / "out") == digests(quantized)


def test_the_plan_is_what_is_written(model: Path, quantized: Path, tmp_path: Path) -> None:
    plan = make_plan(recipe_for(model), tmp_path / "out")
    assert plan.output_bytes == sum(path.stat().st_size for path in quantized.glob("*.safetensors"))
    part = next(part for part in plan.parts if part.kind == "prediction")
    assert part.linears == {"W8A8": 4, "FLOAT": 1, "W8A8_DYNAMIC": 3 * (8 + 1)}
    assert plan.notes == ()
    alone = make_plan(recipe_for(model).model_copy(update={"prediction_layers": "float"}), tmp_path / "out")
    part = next(part for part in alone.parts if part.kind == "prediction")
    assert part.linears == {}
    assert alone.output_bytes > plan.output_bytes


def test_the_folder_runs_and_is_inspected_and_compared(model: Path, quantized: Path) -> None:
    from typer.testing import CliRunner

    with closing(load_engine(quantized, "embedded")) as engine:
        (done,) = engine.generate(["I am"], Sampling(max_tokens=4, ignore_eos=True))
    assert len(done.token_ids) == 4
    runner = CliRunner()
    shown = runner.invoke(app, ["inspect", str(quantized), "--json"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.output)["findings"] == []
    compared = runner.invoke(app, ["compare", str(model), str(quantized), "--json"])
    assert compared.exit_code == 0, compared.output


def test_formats_that_hold_the_same_numbers_are_exported_without_loss(
    quantized: Path, tmp_path: Path
) -> None:
    (vllm,) = export(quantized, ["compressed-tensors"], output=tmp_path / "vllm")
    section = json.loads((vllm.folder / "config.json").read_text())["quantization_config"]
    assert any("eh_proj" in name for name in section["ignore"])
    assert open_quantized(vllm.folder).linears == open_quantized(quantized).linears
    (back,) = export(vllm.folder, ["ascend"], output=tmp_path / "back")
    ours, again = Checkpoint.open(quantized), Checkpoint.open(back.folder)
    assert set(ours.names()) == set(again.names())
    for name in ours.names():
        assert ours.raw(name).tobytes() == again.raw(name).tobytes(), name
    with pytest.raises(CheckpointError, match="multi-token-prediction layers unquantized"):
        export(quantized, ["golden-stick"], output=tmp_path / "gs")


def test_mindformers_gets_it_in_floating_point(model: Path, tmp_path: Path) -> None:
    """And with it every format that holds the same numbers."""
    (alone,) = make_plan(recipe_for(model, "golden-stick"), tmp_path / "out").notes
    assert f"{FIRST}, which predicts a further token, stays in floating point: the mindformers" in alone
    assert "ascend" not in alone
    recipe = recipe_for(model, "ascend,golden-stick")
    (note,) = make_plan(recipe, tmp_path / "out").notes
    assert "and so does ascend" in note
    result = quantize(recipe, tmp_path / "out", remember=False)
    assert note in result.notes
    for folder in result.folders.values():
        linears = open_quantized(folder).linears
        assert {str(scheme) for module, scheme in linears.items() if module.startswith(FIRST)} == {"FLOAT"}
    assert [layer["index"] for layer in result.layers] == [0, 1]


def test_schemes_can_spare_it(model: Path, tmp_path: Path) -> None:
    """It is a layer as any other to a pattern."""
    recipe = recipe_for(model)
    rules = [{f"{FIRST}.self_attn.": "FLOAT"}, *recipe.model_dump(mode="json")["quantization"]["schemes"]]
    folder = quantize(recipe.replace("quantization", schemes=rules), tmp_path / "out", remember=False).folder
    linears = open_quantized(folder).linears
    assert {str(linears[name]) for name in linears if name.startswith(f"{FIRST}.self_attn")} == {"FLOAT"}
    assert str(linears[f"{FIRST}.mlp.experts.0.up_proj"]) == "W8A8_DYNAMIC"


@pytest.mark.parametrize(("value", "word"), [(True, "float"), (False, "none")])
def test_the_key_was_a_switch(value: bool, word: str) -> None:
    with pytest.raises(RecipeError, match=f"is now written as prediction_layers: {word}"):
        validate_recipe({"model": "x", "prediction_layers": value}, "test")


def test_an_unknown_word_is_refused() -> None:
    with pytest.raises(RecipeError, match="prediction_layers"):
        validate_recipe({"model": "x", "prediction_layers": "W8A8"}, "test")


def test_samples_without_a_further_token_are_refused_before_any_work(source: Path, tmp_path: Path) -> None:
    data = tmp_path / "short.jsonl"
    data.write_text("\n".join(json.dumps({"text": text}) for text in ("It is so. " * 9, "I am. " * 9)))
    recipe = recipe_for(source).replace("calibration", source=str(data), samples=2, sequence_length=2)
    with pytest.raises(CalibrationError) as caught:
        quantize(recipe, tmp_path / "out", remember=False)
    assert f"none is left to quantize model.layers.{LAYERS + 1} with" in str(caught.value)
    assert not list(tmp_path.glob("out*"))


def test_a_layer_before_another_is_missing(source: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import save_file

    copy = shutil.copytree(source, tmp_path / "copy")
    path = copy / "model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if not name.startswith(f"{FIRST}.")}
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"no tensor {FIRST}"):
        make_plan(recipe_for(copy), tmp_path / "out")
