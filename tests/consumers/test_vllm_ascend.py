"""vllm-ascend's own configuration, schemes and mixture-of-experts code compute our `ascend` folders."""

import json
import os
import sys
from typing import Any

import pytest

from tests.consumers.conftest import Folders, Table, run
from tests.consumers.environments import PROJECT, VLLM_ASCEND, Environments

MODELS = (
    "llama-tied",
    "llama-biased",
    "llama-float16",
    "qwen2",
    "qwen3",
    "qwen3-moe",
    "qwen3-c8",
    "qwen3-float16-c8",
    "deepseek",
    "deepseek-mtp",
    "deepseek-c8",
    "deepseek-float16-c8",
    "qwen3-moe-w4a8",
    "qwen3-moe-w4a8-g16",
    "deepseek-w4a8",
    "deepseek-w4a8-g16",
    "deepseek-mtp-w4a8",
    "qwen2-mix",
)


@pytest.fixture(scope="module", params=VLLM_ASCEND)
def examined(
    made: Environments, folders: Folders, request: pytest.FixtureRequest
) -> tuple[str, dict[str, Any]]:
    """The version, and what became of each model's layers."""
    paths = [folders[f"{model}-ascend"] for model in MODELS]
    env = {**os.environ, "PYTHONPATH": made.ascend_paths(request.param)}
    found = json.loads(
        run([sys.executable, "-m", "tests.consumers.vllm_ascend_layers", *paths], env, PROJECT)
    )
    return made.ascend_version(request.param), {
        model: found[str(path)] for model, path in zip(MODELS, paths, strict=True)
    }


def test_every_layer_computes_what_the_folder_says(
    examined: tuple[str, dict[str, Any]], table: Table
) -> None:
    """Static, per token, and whole mixtures of experts with their router, in the model's own dtype."""
    version, models = examined
    wrong = []
    for model, found in models.items():
        words = sorted(set(found["words"].values()))
        worst = max(found["differences"].values())
        result = f"{'/'.join(words)}: {worst:.1e}"
        if found["experts"]:
            result += f"; experts: {max(found['experts'].values()):.1e}"
        if found["caches"]:
            result += f"; int8 cache: {max(found['caches']):.1e}"
        table.add("vllm-ascend", version, model, result)
        if max([worst, *found["experts"].values()]) >= 5e-4 or max(found["caches"], default=0) >= 1e-3:
            wrong.append(f"{model}: {found}")
    assert not wrong, "\n".join(wrong)


def test_layers_are_what_was_meant(examined: tuple[str, dict[str, Any]]) -> None:
    _, models = examined
    cached = ("qwen3", "qwen3-c8", "qwen3-float16-c8", "deepseek", "deepseek-c8", "deepseek-float16-c8")
    assert [len(models[model]["caches"]) for model in cached] == [0, 2, 2, 0, 2, 2]
    assert set(models["llama-tied"]["words"].values()) == {"W8A8"}
    deepseek = models["deepseek"]
    assert {word for layer, word in deepseek["words"].items() if "kv_b_proj" in layer} == {"FLOAT"}
    assert {word for layer, word in deepseek["words"].items() if ".mlp." in layer} == {"W8A8_DYNAMIC"}
    for model in (name for name in MODELS if name in ("deepseek", "qwen3-moe") or "-w4a8" in name):
        layers = (1, 2) if "mtp" in model else (1,)
        assert list(models[model]["experts"]) == [f"model.layers.{layer}.mlp.experts" for layer in layers]
        assert set(models[model]["expert_words"].values()) == {
            "W4A8_DYNAMIC" if "-w4a8" in model else "W8A8_DYNAMIC"
        }
    assert set(models["qwen3-moe-w4a8"]["words"].values()) == {"W8A8_DYNAMIC"}
    assert set(models["deepseek-w4a8"]["words"].values()) == {"FLOAT", "W8A8", "W8A8_DYNAMIC"}
    mix = models["qwen2-mix"]
    assert set(mix["words"].values()) == {"W8A8_MIX"}
    assert set(mix["differences"]) == {*mix["words"], *(f"{layer} of prompts" for layer in mix["words"])}
    predicted = [word for layer, word in models["deepseek-mtp"]["words"].items() if ".layers.2." in layer]
    assert set(predicted) == {"FLOAT"}
    last, predicted = (
        {name.split(".", 3)[3]: word for name, word in words.items() if f".layers.{layer}." in name}
        for words in [models["deepseek-mtp-w4a8"]["words"]]
        for layer in (1, 2)
    )
    assert predicted == last
    assert set(predicted.values()) == {"FLOAT", "W8A8", "W8A8_DYNAMIC"}
