"""`msquant run --engine vllm-mindspore` in the servers' environment: our worker, the real `LLM` and
`generate`.

What stands in for the NPU comes into the processes by `sitecustomize` of `stand_ins`, and nothing of it is in
msquant: device nodes, operators, and torch for msadapter.
"""

import json
from pathlib import Path

import pytest

from msquant.inference.engine_protocol import Sampling
from tests.consumers.conftest import Folders, Table, run, server_environment
from tests.consumers.environments import Environments


@pytest.mark.parametrize(("model", "backend"), [("llama-tied", "Native"), ("deepseek", "MindFormers")])
def test_msquant_runs_a_prompt(
    made: Environments, folders: Folders, tmp_path: Path, table: Table, model: str, backend: str
) -> None:
    (tmp_path / "davinci0").touch()
    env = server_environment(
        made,
        NPU_DEVICE_NODES=str(tmp_path / "davinci[0-9]*"),
        MSQUANT_CACHE=str(tmp_path / "cache"),
        VLLM_CACHE_ROOT=str(tmp_path / "vllm"),
    )
    command = ["-m", "msquant", "run", "--engine", "vllm-mindspore", "--model", folders[model]]
    options = ["--prompt", "I am", "--max-tokens", "12", "--json"]
    answer = json.loads(run([made.python, *command, *options], env, tmp_path))
    engine = folders.embedded(model)
    (expected,) = engine.generate(["I am"], Sampling(max_tokens=12, temperature=0.0))
    (completion,) = answer["completions"]
    table.add("msquant run --engine vllm-mindspore", "0.5.1", f"{model}, {backend}", repr(completion["text"]))
    assert completion["token_ids"] == list(expected.token_ids)
    # vLLM says nothing yet of a character of which it has no more than the first bytes.
    assert completion["text"] == expected.text.rstrip("\ufffd")
    assert answer["engine"] == "vllm-mindspore"
