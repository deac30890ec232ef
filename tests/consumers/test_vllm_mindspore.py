"""vLLM-MindSpore 0.5.1 loads our folders and computes what the embedded engine computes, from `LLM` down.

Everything is vLLM's and vLLM-MindSpore's own but the NPU's operators: prefill, and decoding through the paged
caches of its block tables, in as many processes as there is tensor parallelism.
"""

from typing import Any

import pytest

from msquant.inference.serving_settings import ServingSettings
from msquant.inference.vllm_mindspore import worker_launch
from tests.consumers.conftest import OTHER_PROMPT, PROMPT, TOKENS, Folders, Table, compare, greedy, serve
from tests.consumers.environments import MINDFORMERS, Environments

NATIVE = [
    *[
        (model, size)
        for model in ("llama-tied", "llama-biased", "llama-shifted", "qwen2", "qwen3")
        for size in (1, 2, 4)
    ],
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
    if size == 1:  # else the operators are called, and counted, in other processes
        assert {"QuantV2", "quant_batch_matmul", "ReshapeAndCache", "PagedAttention"} <= set(found["calls"])


def test_float16_is_served_as_float16(native: dict[tuple[str, int], dict[str, Any]]) -> None:
    """In bfloat16 `input_scale` would be rounded, and `deq_scale` would not."""
    found = native["llama-float16", 1]
    assert "error" not in found
    assert not [cast for cast in found["casts"] if "input_scale" in cast]


DEEPSEEK = [
    ("deepseek", 1, True),
    ("deepseek", 1, False),
    ("deepseek", 2, True),
    ("deepseek-published", 1, True),
    ("deepseek-mtp", 1, True),
    ("deepseek-mtp", 1, False),
    ("deepseek-w4a8", 1, True),
    ("deepseek-w4a8-g16", 1, True),
    ("deepseek-w4a8-g16", 2, True),
]
"""Model, tensor parallelism; fused attention with split caches, or, as at TP16, one cache a layer."""


@pytest.fixture(scope="module")
def deepseek(
    made: Environments, folders: Folders, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, int, bool], dict[str, Any]]:
    cases = [case(folders, model, size) | {"custom_ops": fused} for model, size, fused in DEEPSEEK]
    found = serve(made, cases, tmp_path_factory.mktemp("deepseek"), VLLM_MS_MODEL_BACKEND="MindFormers")
    return dict(zip(DEEPSEEK, found, strict=True))


@pytest.mark.parametrize(("model", "size", "fused"), DEEPSEEK)
def test_mindformers_in_the_engine_computes_deepseek(
    deepseek: dict[tuple[str, int, bool], dict[str, Any]],
    folders: Folders,
    table: Table,
    model: str,
    size: int,
    fused: bool,
) -> None:
    found, engine = deepseek[model, size, fused], folders.embedded(model, size)
    difference, same = compare(found, engine)
    where = f"{model}, {f'TP{size}' if fused else 'as TP16'}"
    table.add("MindFormers 1.7.0 in vllm_mindspore", "0.5.1", where, f"{difference:.1e}, {same}/{TOKENS}")
    assert difference < 1e-6
    assert same == TOKENS
    assert found["together"].tolist() == [greedy(engine, prompt) for prompt in (PROMPT, OTHER_PROMPT)]
    if size == 1:  # else the operators are called, and counted, in other processes
        assert ("mla" in found["calls"]) == fused
        assert ("GroupedMatmulV4 int4" in found["calls"]) == ("w4a8" in model)


ALONE = [key for key in DEEPSEEK if key[1] == 1]


@pytest.fixture(scope="module", params=MINDFORMERS)
def alone(
    made: Environments,
    folders: Folders,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> tuple[str, list[dict[str, Any]]]:
    """What each version of MindFormers computes, given caches and tables as vLLM-MindSpore gives them."""
    cases = [{"folder": str(folders[model]), "custom_ops": fused} for model, _, fused in ALONE]
    options = {"program": "mindformers_model.py", "mindformers": request.param}
    return request.param, serve(made, cases, tmp_path_factory.mktemp("mindformers"), **options)


def test_every_mindformers_computes_deepseek(
    alone: tuple[str, list[dict[str, Any]]], folders: Folders, table: Table
) -> None:
    version, results = alone
    wrong = []
    for (model, _, fused), found in zip(ALONE, results, strict=True):
        where, engine = f"{model}, {'below TP16' if fused else 'as TP16'}", folders.embedded(model)
        if "error" in found:
            result, right = str(found["error"]).strip().splitlines()[-1], False
        else:
            difference, same = compare(found, engine)
            result = f"{difference:.1e}, {same}/{TOKENS}"
            expected = [greedy(engine, prompt) for prompt in (PROMPT, OTHER_PROMPT)]
            right = difference < 1e-6 and found["together"].tolist() == expected
        table.add("MindFormers alone", version, where, result)
        if not right:
            wrong.append(f"{where}: {result} {str(found.get('error', ''))[-1500:]}")
    assert not wrong, "\n".join(wrong)
