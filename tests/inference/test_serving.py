"""The serving section: what fits together, what is refused, what vLLM is given."""

from typing import Any

import pytest
from pydantic import ValidationError

from msquant.errors import RecipeError
from msquant.inference.serving_settings import ServingSettings
from msquant.recipe.recipe import find_recipe, validate_recipe

GUIDE = {
    "max_num_seqs": 256,
    "max_model_len": 32768,
    "max_num_batched_tokens": 4096,
    "block_size": 128,
    "gpu_memory_utilization": 0.9,
}


def test_defaults_leave_vllm_its_own() -> None:
    settings = ServingSettings()
    assert settings.engine_arguments() == {"block_size": 128, "gpu_memory_utilization": 0.9}
    assert (settings.world_size, settings.visible_devices(), settings.uses_ray) == (1, (0,), False)


@pytest.mark.parametrize(
    "name", ["deepseek-r1", "deepseek-r1-0528", "deepseek-v3", "deepseek-v3-0324", "deepseek-ai/DeepSeek-R1"]
)
def test_r1_is_served_as_the_guide_serves_it_tp16(name: str) -> None:
    settings = find_recipe(name).serving
    assert settings.engine_arguments() == GUIDE | {
        "tensor_parallel_size": 16,
        "distributed_executor_backend": "ray",
    }
    assert (settings.nodes, settings.npus_per_node) == (2, 8)
    assert settings.visible_devices() == (0, 1, 2, 3, 4, 5, 6, 7)


def test_r1_is_served_as_the_guide_serves_it_dp4_tp4_ep4() -> None:
    recipe = find_recipe("deepseek-r1-dp4-tp4-ep4")
    assert recipe.serving.engine_arguments() == GUIDE | {
        "tensor_parallel_size": 4,
        "enable_expert_parallel": True,
        "additional_config": {"expert_parallel": 4},
    }
    assert (recipe.serving.nodes, recipe.serving.npus_per_node, recipe.serving.uses_ray) == (2, 8, False)
    # It is the same result: only the serving differs.
    tp16 = find_recipe("deepseek-r1")
    assert recipe.model_copy(update={"serving": tp16.serving, "description": tp16.description}) == tp16


@pytest.mark.parametrize(
    ("section", "complaint"),
    [
        (
            {"tensor_parallel_size": 3, "nodes": 2, "launcher": "ray"},
            "3 NPUs cannot be shared evenly by 2 nodes",
        ),
        (
            {"tensor_parallel_size": 16, "nodes": 2},
            "tensor parallelism over several nodes needs launcher: ray",
        ),
        ({"data_parallel_size": 3, "tensor_parallel_size": 4, "nodes": 2}, "3 is not a multiple of 2 nodes"),
        ({"tensor_parallel_size": 4, "expert_parallel_size": 3}, "expert_parallel_size 3 does not divide"),
        ({"tensor_parallel_size": 2, "devices": [4]}, "devices must name 2 different NPUs"),
        ({"tensor_parallel_size": 2, "devices": [4, 4]}, "devices must name 2 different NPUs"),
        ({"devices": []}, "serving.devices"),
        ({"devices": [-1]}, "serving.devices.0"),
        ({"gpu_memory_utilization": 1.1}, "serving.gpu_memory_utilization"),
        ({"block_size": 0}, "serving.block_size"),
        ({"ray_port": 70000}, "serving.ray_port"),
        ({"launcher": "slurm"}, "be 'mp' or 'ray'"),
        ({"model_backend": "mindformers"}, "serving.model_backend"),
        ({"tensor_parallel": 2}, "unknown key serving.tensor_parallel (did you mean tensor_parallel_size?)"),
        # Nothing in it can be taken for an option, a second command or a list of hosts.
        ({"head_address": "--block"}, "serving.head_address"),
        ({"head_address": "10.0.0.1;id"}, "serving.head_address"),
        ({"network_interface": "eth0 eth1"}, "serving.network_interface"),
        ({"network_interface": "a" * 16}, "serving.network_interface"),
        ({"ms_alloc_conf": "enable_vmm:true\nLD_PRELOAD=x"}, "serving.ms_alloc_conf"),
        ({"environment": {"LD_PRELOAD": "x"}}, "unknown key serving.environment"),
    ],
)
def test_what_does_not_fit_is_refused(section: dict[str, Any], complaint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        validate_recipe({"model": "m", "serving": section}, "recipe.yaml")
    assert complaint in str(caught.value)


def test_memory_policy_of_several_settings() -> None:
    policy = "enable_vmm: true, derag_memory_step_freq: -1"
    assert ServingSettings(ms_alloc_conf=policy).ms_alloc_conf == policy


def test_changed_is_checked_again() -> None:
    settings = find_recipe("deepseek-r1").serving
    moved = settings.changed({"head_address": "192.5.5.5", "network_interface": None, "ray_port": 6380})
    assert (moved.head_address, moved.network_interface, moved.ray_port) == ("192.5.5.5", None, 6380)
    assert moved.tensor_parallel_size == 16
    with pytest.raises(ValidationError, match="cannot be shared evenly"):
        settings.changed({"nodes": 3})
