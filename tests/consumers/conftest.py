"""Folders that msquant writes, the servers' processes, and the table of what ran, for the tests here."""

import json
import os
import signal
import subprocess
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from msquant.checkpoint.weights import Linear, QuantizedLinear
from msquant.flows.engines import load_embedded
from msquant.flows.pipeline import quantize
from msquant.inference.embedded import EmbeddedEngine
from msquant.inference.engine_protocol import Sampling
from msquant.kernels.cpu_linear import Array, Layer, linear_layer
from msquant.recipe.recipe import find_recipe
from msquant.schemes import W4A8_DYNAMIC, W8A8_DYNAMIC, W8A8_MIX, W8A8_SHIFTED
from tests.consumers.environments import PROJECT, Environments, environments
from tests.fixtures.tiny_families import write_tiny

PROMPT = [3, 17, 44, 101, 5, 200, 311, 8, 9, 77, 410, 250]
OTHER_PROMPT = [5, 9, 300]
TOKENS = 12
SECONDS = 900

# There are more experts in the chosen groups than are wanted. MindFormers' fused attention has DeepSeek's own
# sizes of the latent and rotary parts. Values are as wide as the keys' part without positions.
_DEEPSEEK = {
    "model_type": "deepseek_v3",
    "n_routed_experts": 16,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "v_head_dim": 16,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-float16": {"model_type": "llama", "dtype": "float16"},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
    "qwen3-moe": {"model_type": "qwen3_moe"},
    "qwen3-c8": {"model_type": "qwen3"},
    "qwen3-float16-c8": {"model_type": "qwen3", "dtype": "float16"},
    "deepseek": _DEEPSEEK,
    "deepseek-published": _DEEPSEEK,
    "deepseek-mtp": {**_DEEPSEEK, "prediction_layers": 1},
    "deepseek-c8": _DEEPSEEK,
    "deepseek-float16-c8": {**_DEEPSEEK, "dtype": "float16"},
    "qwen3-moe-w4a8": {"model_type": "qwen3_moe"},
    "qwen3-moe-w4a8-g16": {"model_type": "qwen3_moe"},
    "deepseek-w4a8": _DEEPSEEK,
    "deepseek-w4a8-g16": _DEEPSEEK,
    "deepseek-mtp-w4a8": {**_DEEPSEEK, "prediction_layers": 1},
    "qwen2-mix": {"model_type": "qwen2"},
    "llama-shifted": {"model_type": "llama", "attention_bias": True},
}
"""Arguments of `write_tiny`; the published one has the keys of DeepSeek's own `config.json`.

A multi-token-prediction layer is quantized where no golden-stick folder holds the same numbers.
"""
_SCHEMES = {
    "-w4a8": (".experts.", W4A8_DYNAMIC),
    "-w4a8-g16": (".experts.", W4A8_DYNAMIC.in_groups(16)),
    "-mix": ("_proj", W8A8_MIX),
    "-shifted": ("_proj", W8A8_SHIFTED),
}
"""The scheme of some layers of a model whose name ends so."""
_NOT_PUBLISHED = ("qk_head_dim", "rope_interleave", "head_dim", "pretraining_tp", "pad_token_id")

_TABLE = pytest.StashKey[list[str]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here is a test of consumers."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("consumers")


@pytest.fixture(scope="session")
def made() -> Environments:
    """The servers' environments; a test is skipped where they are not made."""
    found = environments()
    if not found.made():
        pytest.skip(f"the servers' environments are not in {found.root}: run make test-consumers")
    return found


class Folders:
    """Tiny models, quantized in both formats when they are first asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._engines: dict[tuple[str, int], EmbeddedEngine] = {}

    def __getitem__(self, name: str) -> Path:
        """A golden-stick folder; with `-ascend` after it, the same model's `ascend` folder."""
        model = name.removesuffix("-ascend")
        folder = self._root / model
        if not folder.exists():
            _quantize(self._root, model)
        return folder if name == model else folder.with_name(f"{model}-ascend")

    def embedded(self, name: str, size: int = 1) -> EmbeddedEngine:
        """The embedded engine with a folder; with the tokens' scales of so many tensor parallel processes."""
        if (name, size) not in self._engines:
            layers = "msquant.inference.cpu.cpu_model.linear_layer"
            with patch(layers, lambda *linears: _shared_out(size, *linears)):
                self._engines[name, size] = load_embedded(self[name])
        return self._engines[name, size]


def _shared_out(size: int, *linears: Linear) -> Layer:
    """The layer of a feed-forward block, of which each process holds a part of the inner channels.

    A down projection's process finds the scale of a token in its own channels alone.
    """
    first = linears[0]
    if len(linears) > 1 or not isinstance(first, QuantizedLinear) or not first.scheme.is_dynamic:
        return linear_layer(*linears)
    weights, scale = np.split(first.weight, size, axis=1), first.weight_scale
    scales = [scale] * size if scale.ndim == 1 else np.split(scale, size, axis=1)
    layers = [
        linear_layer(replace(first, weight=np.ascontiguousarray(weight), weight_scale=part))
        for weight, part in zip(weights, scales, strict=True)
    ]

    def layer(x: Array) -> Array:
        columns = map(np.ascontiguousarray, np.split(x, size, axis=1))
        return np.sum([part(inputs) for part, inputs in zip(layers, columns, strict=True)], axis=0)

    return layer


def _quantize(root: Path, name: str) -> None:
    settings = {"dtype": "bfloat16", **MODELS[name]}
    family = settings.pop("model_type")
    source = write_tiny(root / "models" / name, family, **settings)
    if name.endswith("-published"):
        path = source / "config.json"
        config = {k: v for k, v in json.loads(path.read_text()).items() if k not in _NOT_PUBLISHED}
        config["torch_dtype"] = config.pop("dtype", config.get("torch_dtype"))
        path.write_text(json.dumps(config))
    recipe = find_recipe(str(source))
    policy = recipe.quantization.model_copy(
        update={"smooth_alpha": (0.4, 0.6), "weight_clip_ratio": (1.0, 0.9)}
    )
    own = next((scheme for end, scheme in _SCHEMES.items() if name.endswith(end)), None)
    if own is not None:
        policy = policy.model_copy(update={"schemes": (own, *policy.schemes)})
    cached = name.endswith("-c8")
    if cached:
        policy = policy.model_copy(update={"cache": "int8"})
        if family.startswith("deepseek"):
            # The operator that fills a latent cache takes nothing else.
            first = [(part, W8A8_DYNAMIC) for part in ("q_a_proj", "q_b_proj", "kv_a_proj")]
            policy = policy.model_copy(update={"schemes": (*first, *policy.schemes)})
    changes = {
        "quantization": policy,
        "calibration": recipe.calibration.model_copy(update={"samples": 4, "sequence_length": 32}),
    }
    # MindFormers builds prediction layers without quantization, and formats written together hold the same.
    only_ascend = family == "qwen3_moe" or cached or ("prediction_layers" in settings and own is not None)
    only_ascend |= own is not None and own[1].prefill is not None
    formats = "ascend" if only_ascend else "golden-stick,ascend"
    if own is not None and own[1] == W8A8_SHIFTED:
        formats = "golden-stick"
    recipe = recipe.model_copy(update=changes).adjusted(formats=formats)
    quantize(recipe, root / name)
    if only_ascend:
        (root / name).rename(root / f"{name}-ascend")
        (root / name).mkdir()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Quantized folders by name."""
    return Folders(tmp_path_factory.mktemp("consumers"))


def server_environment(made: Environments, mindformers: str = "1.7.0", **variables: str) -> dict[str, str]:
    """The variables of a server's process."""
    return {
        **os.environ,
        "PYTHONPATH": made.paths(mindformers),
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_PLUGINS": "",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "OMP_NUM_THREADS": "1",
        **variables,
    }


def run(argv: list[Any], env: dict[str, str], folder: Path) -> str:
    """A process's standard output; what it said otherwise is the test's failure.

    No process that it has started outlives it: a server's workers would wait for work for ever.
    """
    with subprocess.Popen(
        list(map(str, argv)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        cwd=folder,
        start_new_session=True,
    ) as process:
        try:
            output, messages = process.communicate(timeout=SECONDS)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, messages[-4000:]
    return output


def serve(made: Environments, cases: list[dict[str, Any]], folder: Path, **variables: str) -> list[Any]:
    """What `serve_prompts`, or another program, found for each case; what it raised as `error`."""
    version = variables.pop("mindformers", "1.7.0")
    program = PROJECT / "tests/consumers" / variables.pop("program", "serve_prompts.py")
    for index, case in enumerate(cases):
        case |= {"prompts": [PROMPT, OTHER_PROMPT], "tokens": TOKENS, "output": str(folder / f"{index}.npz")}
    (folder / "cases.json").write_text(json.dumps(cases))
    env = server_environment(made, version, VLLM_ENABLE_V1_MULTIPROCESSING="0", **variables)
    run([made.python, program, folder / "cases.json"], env, folder)
    return [dict(np.load(case["output"])) for case in cases]


def compare(found: dict[str, Any], engine: EmbeddedEngine) -> tuple[float, int]:
    """Relative RMS difference of every step's logits, and how many have one argmax, of `TOKENS`."""
    assert "error" not in found, str(found.get("error"))[-4000:]
    ids = [*PROMPT, *found["alone"].tolist()][: len(PROMPT) + TOKENS - 1]
    ours = np.concatenate([np.atleast_2d(rows) for rows in engine.logits(ids, TOKENS)]).astype(np.float64)
    theirs = found["logits"].astype(np.float64)
    assert theirs.shape == ours.shape
    difference = np.sqrt(((ours - theirs) ** 2).mean() / (ours**2).mean())
    return float(difference), int((ours.argmax(-1) == theirs.argmax(-1)).sum())


def greedy(engine: EmbeddedEngine, prompt: list[int]) -> list[int]:
    """The embedded engine's own continuation."""
    return list(engine.tokens(prompt, Sampling(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)))


class Table:
    """What ran: code, version, architecture, result."""

    def __init__(self, rows: list[str]) -> None:
        self._rows = rows

    def add(self, code: str, version: str, architecture: str, result: str) -> None:
        """A row, printed when all tests are done."""
        self._rows.append(f"| {code} | {version} | {architecture} | {result} |")


@pytest.fixture
def table(request: pytest.FixtureRequest) -> Table:
    """The table that is printed at the end."""
    return Table(request.config.stash.setdefault(_TABLE, []))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the table."""
    if rows := config.stash.get(_TABLE, []):
        terminalreporter.section("the servers' own code")
        for row in ["| code | version | architecture | result |", "|---|---|---|---|", *rows]:
            terminalreporter.write_line(row)
