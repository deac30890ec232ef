"""Qwen3-Next end to end: two kinds of layers, norms that add 1, gates beside what is quantized."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.errors import CheckpointError, RecipeError
from msquant.flows.conversion import open_quantized
from msquant.flows.pipeline import quantize
from msquant.formats.registry import folder_format
from msquant.inference.cpu.cpu_model import CpuModel
from msquant.inference.mindspore_model import MindSporeModel
from msquant.models.config_json import parse_config, read_config
from msquant.planning.quantization_plan import make_plan
from msquant.progress import Progress
from msquant.recipe.recipe import Recipe, validate_recipe
from msquant.schemes import FLOAT, W4A8_DYNAMIC, W8A8, W8A8_DYNAMIC
from tests.fixtures.quantize_process import digests
from tests.fixtures.tiny_families import write_tiny

FORMATS = ["ascend", "compressed-tensors"]
STATIC = [{"lm_head": "FLOAT"}, {"mlp.": "W8A8_DYNAMIC"}, {"*": "W8A8"}]
PER_TOKEN = [{"lm_head": "FLOAT"}, {"*": "W8A8_DYNAMIC"}]
INT4 = [{"lm_head": "FLOAT"}, {"mlp.experts.": "W4A8_DYNAMIC"}, {"*": "W8A8_DYNAMIC"}]
CASES: dict[str, dict[str, Any]] = {
    "osl": {"algorithm": "osl", "schemes": PER_TOKEN, "feed_forward_alpha": 0.5},
    "gptq": {"algorithm": "gptq", "schemes": INT4, "feed_forward_alpha": 0.5},
    "osl-static": {"algorithm": "osl", "schemes": STATIC},
}
KINDS = {
    "osl": {W8A8_DYNAMIC},
    "gptq": {W8A8_DYNAMIC, W4A8_DYNAMIC},
    "osl-static": {W8A8, W8A8_DYNAMIC},
}
FLOAT_PARTS = ("lm_head", "mlp.gate", "shared_expert_gate", "in_proj_ba")


def recipe_of(model: Path, **quantization: Any) -> Recipe:
    return validate_recipe(
        {
            "model": str(model),
            "format": FORMATS,
            "quantization": quantization,
            "calibration": {"samples": 4, "sequence_length": 24},
            "evaluation": {"sequences": 1, "sequence_length": 64},
        },
        "test",
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense layer and one with experts of the delta rule, and one with experts of full attention."""
    folder = tmp_path_factory.mktemp("source") / "model"
    return write_tiny(
        folder, "qwen3_next", dtype="bfloat16", layers=3, full_attention_interval=3, prediction_layers=1
    )


@pytest.mark.parametrize("case", CASES)
def test_both_formats_are_correct_near_the_float_model_and_the_same_after_an_interrupt(
    case: str, source: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(source, **CASES[case])

    def interrupt(record: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    result = quantize(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        quantize(recipe, tmp_path / "out", progress=Progress(layer=interrupt))
    again = quantize(recipe, tmp_path / "out")
    record = json.loads((result.folder / "msquant.json").read_text())["evaluation"]
    assert record["overall"]["kl"] < 0.4
    assert all(layer["own_snr"] > 10 for layer in record["layers"])
    stored = Checkpoint.open(source)
    for name in FORMATS:
        folder = result.folders[name]
        assert digests(folder) == digests(again.folders[name])
        form = folder_format(folder)
        assert form is not None
        assert form.name == name
        assert form.validate(folder) == []
        opened = open_quantized(folder)
        assert {scheme for scheme in opened.linears.values() if scheme != FLOAT} == KINDS[case]
        assert not any(module.endswith(FLOAT_PARTS) for module in opened.linears)
        made = Checkpoint.open(folder)
        for tensor in stored.names():
            if tensor.startswith("mtp.") or tensor.endswith(("A_log", "dt_bias", "conv1d.weight")):
                np.testing.assert_array_equal(made.tensor(tensor), stored.tensor(tensor), tensor)
    assert "mtp, which predicts a further token, stays in floating point" in result.notes[0]


def test_the_engines_compute_a_quantized_folder_alike(source: Path, tmp_path: Path) -> None:
    recipe = recipe_of(source, **CASES["osl"]).replace("evaluation", sequences=0)
    folder = quantize(recipe, tmp_path / "out").folder
    config, opened = read_config(folder), open_quantized(folder).weights
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, 90).tolist()
    model, cells = CpuModel(config, opened), MindSporeModel(config, opened, "cpu")
    whole = model.logits(model.new_cache(), tokens, len(tokens))
    theirs = cells.logits(cells.new_cache(), tokens, len(tokens))
    assert np.abs(whole).max() > 1
    # An activation on the other side of a tie moves a logit by more than rounding does.
    assert np.quantile(np.abs(whole - theirs), 0.99) < 1e-2
    cache = model.new_cache()
    pieces = [model.logits(cache, tokens[:70], 70)]
    pieces += [model.logits(cache, [token], 1) for token in tokens[70:]]
    assert np.quantile(np.abs(np.concatenate(pieces) - whole), 0.99) < 1e-2


def test_a_sequence_does_not_depend_on_those_beside_it(source: Path) -> None:
    model = CpuModel(read_config(source), Checkpoint.open(source))
    generator = np.random.default_rng(1)
    prompts = [generator.integers(0, 400, length).tolist() for length in (70, 1, 9)]

    def continued(sequences: list[list[int]]) -> Any:
        caches = [model.new_cache() for _ in sequences]
        model.next_logits(list(zip(caches, sequences, strict=True)))
        return model.next_logits([(cache, [7]) for cache in caches])

    together = continued(prompts)
    for row, prompt in zip(together, prompts, strict=True):
        np.testing.assert_allclose(row, continued([prompt])[0], rtol=0, atol=1e-4)


def test_rotation_refuses_the_prediction_layer_by_its_name(source: Path, tmp_path: Path) -> None:
    recipe = recipe_of(source, algorithm="rtn", schemes=PER_TOKEN, rotation="hadamard")
    for attempt in (make_plan, quantize):
        with pytest.raises(RecipeError, match=r"multi-token-prediction layers \(mtp\)"):
            attempt(recipe, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layer_types": ["linear_attention"]},
            "layer_types is .* a list of 3 times linear_attention or full",
        ),
        ({"layer_types": ["full_attention", "sliding", "x"]}, "layer_types is "),
        (
            {"layer_types": None, "full_attention_interval": 0},
            "full_attention_interval is 0, a positive integer",
        ),
        ({"linear_num_value_heads": 3}, "linear_num_value_heads is 3, a multiple of 2 key heads"),
        ({"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim is 0, a positive integer"),
        ({"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size is 0, a positive integer"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
        ({"partial_rotary_factor": 0.03}, "partial_rotary_factor is 0.03"),
    ],
)
def test_what_makes_no_sense_is_named(source: Path, changes: dict[str, Any], message: str) -> None:
    raw = json.loads((source / "config.json").read_text()) | changes
    raw = {key: value for key, value in raw.items() if value is not None}
    with pytest.raises(CheckpointError, match=message) as caught:
        parse_config(raw)
    assert caught.value.remedy
