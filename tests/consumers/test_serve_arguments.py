"""The parser of `vllm-mindspore serve` takes every command that `--dry-run` prints."""

import json
from pathlib import Path

import pytest

from msquant.deploy.vllm_mindspore_server import PROGRAM, cluster_commands
from msquant.inference.serving_settings import ServingSettings
from msquant.inference.vllm_mindspore import worker_launch
from msquant.recipe.recipe import find_recipe, shipped_recipes
from tests.consumers.conftest import Folders, Table, run, server_environment
from tests.consumers.environments import Environments


def test_every_command_is_parsed(made: Environments, folders: Folders, tmp_path: Path, table: Table) -> None:
    recipes = {name: find_recipe(name).serving for name in shipped_recipes()}
    settings = [s.model_copy(update={"head_address": "10.0.0.1"}) for s in recipes.values()]
    launches = [
        launch
        for section in [ServingSettings(), ServingSettings(tensor_parallel_size=2), *settings]
        for model in ("llama-tied", "llama-float16", "deepseek")
        for launch in cluster_commands(folders[model], section, "127.0.0.1", 8000, environment={})
        if "serve" in launch.argv
    ]
    commands = [[PROGRAM, *launch.argv[1:]] for launch in launches]
    loads = [
        dict(worker_launch(folders["deepseek"], section, {}).requests[0]["options"])
        for section in settings
        if section.data_parallel_size == 1
    ]
    path = tmp_path / "commands.json"
    path.write_text(json.dumps({"serve": commands, "load": loads}))
    env = server_environment(made, VLLM_MS_MODEL_BACKEND="Native")
    program = Path(__file__).with_name("serve_arguments.py")
    run([made.python, program, path, tmp_path / "found.json"], env, tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    refused = [argv for argv, values in zip(commands, found["serve"], strict=True) if values is None]
    table.add("vllm-mindspore serve", "0.5.1", f"{len(commands)} commands", f"{len(refused)} refused")
    assert refused == []
    assert found["unknown"] == []
    for argv, values in zip(commands, found["serve"], strict=True):
        assert values["model"] == argv[2]
        assert values["quantization"] == "golden-stick"


@pytest.mark.parametrize("model", ["llama-tied"])
def test_eager_execution_is_never_asked_for(folders: Folders, model: str) -> None:
    """Eager mode quantizes with the reciprocal of the scale, which is not what the folder holds."""
    launch = worker_launch(folders[model], ServingSettings(), {})
    assert "enforce_eager" not in launch.requests[0]["options"]
    for launch in cluster_commands(folders[model], ServingSettings(), "127.0.0.1", 8000, environment={}):
        assert "--enforce-eager" not in launch.argv
