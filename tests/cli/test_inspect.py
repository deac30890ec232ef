"""`msquant inspect` as a person or a script calls it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from msquant.checkpoint.writer import write_json, write_shard
from msquant.schemes import W8A8_DYNAMIC
from tests.formats.expert_folders import DEEPSEEK, QWEN, schemes_of, write_experts
from tests.formats.folders import change_tensors, write_folder

pytestmark = pytest.mark.e2e


def msquant(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "msquant", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={"COLUMNS": "80", "PATH": ""})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("inspect") / "model")


def test_a_correct_folder_is_shown_and_found_valid(folder: Path) -> None:
    run = msquant("inspect", folder, "--verify")
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    for text in (
        "self_attn.q_proj",
        "W8A8",
        "24 x 16",
        "LlamaForCausalLM",
        "of them in int8",
        "0.55",
        "1.00e-03",
    ):
        assert text in run.stdout
    assert (
        "Valid: it keeps every rule of 'golden-stick' for the native backend of vLLM-MindSpore, "
        "all file hashes match." in run.stdout
    )


def test_json_is_one_document(folder: Path) -> None:
    run = msquant("inspect", folder, "--json")
    document = json.loads(run.stdout)
    assert run.returncode == 0
    assert document["valid"] is True
    assert document["quantization"] == "golden-stick"
    assert document["findings"] == []
    assert document["totals"]["quantized_parameters"] > 0
    assert document["modules"][0]["name"] == "model.embed_tokens"


def test_a_broken_folder_exits_with_1_and_names_the_tensor(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.deq_scale"
    broken = write_folder(tmp_path / "broken")
    change_tensors(broken, {name: np.ones(16, np.int64)})
    run = msquant("inspect", broken)
    assert run.returncode == 1
    assert f"{name}: stored as I64" in run.stdout
    assert "breaks the golden-stick format in 1 place" in run.stderr
    run = msquant("inspect", broken, "--json")
    assert run.returncode == 1
    document = json.loads(run.stdout)
    assert document["valid"] is False
    assert [finding["where"] for finding in document["findings"]] == [name]


def test_of_many_findings_the_first_are_shown(tmp_path: Path) -> None:
    broken = write_folder(tmp_path / "broken")
    (broken / "quantization_description.json").write_text("{}")
    (broken / "msquant.json").unlink()
    run = msquant("inspect", broken)
    assert run.returncode == 1
    assert run.stdout.count("stored, but not described") == 20
    assert "see them with --json" in run.stdout
    assert len(json.loads(msquant("inspect", broken, "--json").stdout)["findings"]) > 70


def test_a_truncated_shard_exits_with_1_and_names_it(tmp_path: Path) -> None:
    broken = write_folder(tmp_path / "broken")
    shard = broken / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    run = msquant("inspect", broken)
    assert run.returncode == 1
    assert shard.name in run.stdout
    assert "truncated" in run.stdout


def test_a_model_in_floating_point_is_listed_and_said_to_be_so(tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", {"a.weight": np.ones((2, 3), np.float16)})
    write_json(tmp_path / "config.json", {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float16"})
    run = msquant("inspect", tmp_path)
    assert run.returncode == 0
    assert "not quantized" in run.stdout
    assert "2 x 3" in run.stdout


def test_a_missing_folder_is_a_clear_error(tmp_path: Path) -> None:
    run = msquant("inspect", tmp_path / "nowhere")
    assert run.returncode == 1
    assert "there is no such folder" in run.stderr
    assert "Traceback" not in run.stderr


def test_help_has_an_example() -> None:
    run = msquant("inspect", "--help")
    assert run.returncode == 0
    assert "Example: msquant inspect" in run.stdout


def test_experts_are_shown_by_kind_and_scheme(tmp_path: Path) -> None:
    write_experts(tmp_path / "model", DEEPSEEK)
    run = msquant("inspect", tmp_path / "model")
    assert run.returncode == 0, run.stderr
    for text in (
        "mlp.experts.*.gate_proj",
        "W8A8, activations per token",
        "6 routed experts",
        "by token",
        "the mindformers backend of vLLM-MindSpore",
    ):
        assert text in run.stdout
    assert "experts.0." not in run.stdout
    document = json.loads(msquant("inspect", tmp_path / "model", "--json").stdout)
    assert document["variant"] == "mindformers"
    assert document["totals"]["experts"] == 6
    assert document["totals"]["schemes"]["W8A8_DYNAMIC"]["modules"] == 15


def test_what_no_engine_serves_yet_is_told(tmp_path: Path) -> None:
    write_experts(tmp_path / "model", QWEN)
    run = msquant("inspect", tmp_path / "model")
    assert run.returncode == 0, run.stderr
    assert "Note: no version of vllm-mindspore serves it: model_type: it builds Qwen3-MoE" in run.stdout
    assert "msquant export FOLDER --format ascend" in run.stdout


@pytest.fixture(scope="module")
def per_token(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V3 that MindFormers serves from TP16 on alone."""
    config = {**DEEPSEEK, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 32}
    config |= {"intermediate_size": 32, "moe_intermediate_size": 16, "num_nextn_predict_layers": 0}
    config |= {"v_head_dim": config["qk_nope_head_dim"]}
    schemes = schemes_of(config)
    query = {module: W8A8_DYNAMIC for module in schemes if "q_b_proj" in module}
    folder = tmp_path_factory.mktemp("inspect") / "per-token"
    write_experts(folder, config, schemes={**schemes, **query})
    return folder


def test_who_can_serve_it_is_one_table(per_token: Path) -> None:
    run = msquant("inspect", per_token)
    assert run.returncode == 0, run.stderr
    assert "Who can serve it" in run.stdout
    assert "serve it with tensor_parallel_size 16" in run.stdout
    rows = json.loads(msquant("inspect", per_token, "--json").stdout)["served"]
    found = {
        (row["server"]["version"], row["server"]["backend_version"], tuple(row["tensor_parallel"])): row
        for row in rows
        if row["server"]["name"] == "vllm-mindspore"
    }
    assert found["0.5.1", "1.7.0", (16,)]["served"] is True
    below = found["0.5.1", "1.7.0", (1, 2, 4, 8)]
    assert below["served"] is False
    assert below["refusals"][0]["where"] == "model.layers.0.self_attn.q_b_proj"
    assert found["0.6.0rc1", "", (1, 2, 4, 8, 16)]["refusals"][0]["rule"] == "rope-rows"


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--for", "vllm-mindspore"), 1, "model.layers.0.self_attn.q_b_proj: is W8A8_DYNAMIC: below TP16"),
        (("--for", "vllm-mindspore", "--tensor-parallel", "16"), 0, ""),
        (("--for", "vllm"), 1, "--format compressed-tensors"),
        (("--for", "vllm-ascend", "--json"), 1, ""),
        (("--for", "tgi"), 2, "vllm-mindspore, vllm-ascend, vllm"),
    ],
)
def test_the_answer_of_one_server_is_the_exit_code(
    per_token: Path, options: tuple[str, ...], code: int, message: str
) -> None:
    run = msquant("inspect", per_token, *options)
    assert run.returncode == code
    if "--json" in options:
        assert json.loads(run.stdout)["quantization"] == "golden-stick"
    assert " ".join(message.split()) in " ".join(run.stderr.replace("│", " ").split())
