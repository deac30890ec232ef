"""vLLM-MindSpore 0.5.1 loads our folders and computes what the embedded engine computes, from `LLM` down.

Everything is vLLM's and vLLM-MindSpore's own but the NPU's operators: prefill, and decoding through the paged
caches of its block tables, in as many processes as there is tensor parallelism.
"""

from typing import Any

import pytest

from msquant.inference.serving import ServingSettings
from msquant.inference.vllm_mindspore import worker_launch
from tests.consumers.conftest import OTHER_PROMPT, PROMPT, TOKENS, Folders, Table, compare, greedy, serve
from tests.consumers.environments import Environments

NATIVE = [
    *[(model, size) for model in ("llama-tied", "llama-biased", "qwen2", "qwen3") for size in (1, 2, 4)],
    ("llama-float16", 1),
]
"""A model and its tensor parallelism; with 4, its two heads of keys and values are there twice."""


def case(folders: Folders, model: str, size: int) -> dict[str, Any]:
    """What msquant's worker would load, made small: the same options, with short limits."""
    settings = ServingSettings(
        tensor_parallel_size=size, max_model_len=256, max_num_seqs=4, max_num_batched_tokens=256
    )
    options = worker_launch(folders[model], settings, {}).requests[0]["options"]
    return {"folder": str(folders[model]), "options": options}


@pytest.fixture(scope="module")
def native(
    made: Environments, folders: Folders, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, int], dict[str, Any]]:
    cases = [case(folders, model, size) for model, size in NATIVE]
    found = serve(made, cases, tmp_path_factory.mktemp("native"), VLLM_MS_MODEL_BACKEND="Native")
    return dict(zip(NATIVE, found, strict=True))


@pytest.mark.parametrize(("model", "size"), NATIVE)
def test_native_logits_are_the_embedded_engines(
    native: dict[tuple[str, int], dict[str, Any]], folders: Folders, table: Table, model: str, size: int
) -> None:
    difference, same = compare(native[model, size], folders.embedded(model))
    table.add("vllm_mindspore native", "0.5.1", f"{model}, TP{size}", f"{difference:.1e}, {same}/{TOKENS}")
    assert difference < 1e-6
    assert same == TOKENS


@pytest.mark.parametrize(("model", "size"), NATIVE)
def test_native_decoding_is_the_embedded_engines(
    native: dict[tuple[str, int], dict[str, Any]], folders: Folders, model: str, size: int
) -> None:
    """Of one prompt, and of two of different lengths at a time."""
    found, engine = native[model, size], folders.embedded(model)
    assert "error" not in found
    expected = [greedy(engine, prompt) for prompt in (PROMPT, OTHER_PROMPT)]
    assert found["alone"].tolist() == expected[0]
    assert found["together"].tolist() == expected
    assert {"QuantV2", "quant_batch_matmul", "ReshapeAndCache", "PagedAttention"} <= set(found["calls"])


def test_float16_is_served_as_float16(native: dict[tuple[str, int], dict[str, Any]]) -> None:
    """In bfloat16 `input_scale` would be rounded, and `deq_scale` would not."""
    found = native["llama-float16", 1]
    assert "error" not in found
    assert not [cast for cast in found["casts"] if "input_scale" in cast]


MINDFORMERS = [
    (version, model, size, fused)
    for version in ("1.7.0", "1.8.0", "1.9.0")
    for model, size, fused in (
        ("deepseek", 1, True),
        ("deepseek", 2, True),
        ("deepseek", 1, False),
        ("deepseek-published", 1, True),
        ("deepseek-mtp", 1, True),
        ("deepseek-mtp", 1, False),
    )
]
"""Version, model, tensor parallelism; fused attention with split caches, or, as at TP16, one cache."""


@pytest.fixture(scope="module", params=["1.7.0", "1.8.0", "1.9.0"])
def mindformers(
    made: Environments,
    folders: Folders,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> dict[tuple[str, str, int, bool], dict[str, Any]]:
    chosen = [key for key in MINDFORMERS if key[0] == request.param]
    cases = [case(folders, model, size) | {"custom_ops": fused} for _, model, size, fused in chosen]
    folder = tmp_path_factory.mktemp("mindformers")
    found = serve(made, cases, folder, VLLM_MS_MODEL_BACKEND="MindFormers", mindformers=request.param)
    return dict(zip(chosen, found, strict=True))


def test_mindformers_computes_deepseek(
    mindformers: dict[tuple[str, str, int, bool], dict[str, Any]], folders: Folders, table: Table
) -> None:
    """Logits of prefill and of decoding, and the tokens of two prompts at a time."""
    wrong = []
    for (version, model, size, fused), found in mindformers.items():
        where = f"{model}, {f'TP{size}' if fused else 'as TP16'}"
        if "error" in found:
            said = str(found["error"]).strip().splitlines()[-1]
            table.add("MindFormers in vllm_mindspore 0.5.1", version, where, said)
            wrong.append(f"{version} {where}: {str(found['error'])[-2000:]}")
            continue
        engine = folders.embedded(model)
        difference, same = compare(found, engine)
        expected = [greedy(engine, prompt) for prompt in (PROMPT, OTHER_PROMPT)]
        result = f"{difference:.1e}, {same}/{TOKENS}"
        table.add("MindFormers in vllm_mindspore 0.5.1", version, where, result)
        if difference >= 2e-4 or same < TOKENS or found["together"].tolist() != expected:
            wrong.append(f"{version} {where}: {result}")
        if ("mla" in found["calls"]) != fused:
            wrong.append(f"{version} {where}: attention is not the expected one")
    assert not wrong, "\n".join(wrong)
