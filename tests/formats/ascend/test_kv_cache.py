"""Folders with an int8 key-value cache for vllm-ascend: written, read back, and each broken one found."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.weights import CacheScale, QuantizedLinear
from msquant.errors import CheckpointError, RecipeError
from msquant.flows.conversion import export
from msquant.flows.engines import open_weights
from msquant.formats.ascend.form import AscendFormat
from msquant.formats.ascend.layout import DESCRIPTION_NAME
from msquant.formats.ascend.reader import AscendCheckpoint
from msquant.formats.folder_plan import plan_folder
from msquant.formats.summary import summarize
from msquant.schemes import C8, FLOAT, W8A8, W8A8_DYNAMIC, Scheme
from tests.formats import folders
from tests.formats.ascend.test_published import write_dense
from tests.formats.expert_folders import groups_of, random_linear, schemes_of, write_experts
from tests.formats.folders import CONFIG, change_entries, change_tensors

HEADS_OF_32: dict[str, Any] = {
    **CONFIG,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
}
K, V = "model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.v_proj"
ROWS = 64

problems = partial(folders.problems, AscendFormat())


def cached(config: dict[str, Any], scheme: Scheme = W8A8_DYNAMIC) -> dict[str, Scheme]:
    """All linears in a scheme, and the cache of those that make keys and values in int8."""
    schemes = dict.fromkeys(schemes_of(config), scheme)
    return {
        module: replace(scheme, cache=C8) if module.endswith(("k_proj", "v_proj")) else scheme
        for module, scheme in schemes.items()
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_experts(tmp_path / "m", HEADS_OF_32, schemes=cached(HEADS_OF_32), format_name="ascend")
    return tmp_path / "m"


@pytest.mark.parametrize("scheme", [W8A8_DYNAMIC, W8A8, FLOAT], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_is_written_is_read_back_as_the_engine_holds_it(
    tmp_path: Path, scheme: Scheme, dtype: str
) -> None:
    config = HEADS_OF_32 | {"torch_dtype": dtype}
    write_experts(tmp_path / "m", config, schemes=cached(config, scheme), format_name="ascend")
    assert problems(tmp_path / "m") == []
    description = read_json(tmp_path / "m" / DESCRIPTION_NAME)
    assert description["kv_cache_type"] == description["kv_quant_type"] == "C8"
    assert {description[f"{K}.kv_cache_{part}"] for part in ("scale", "offset")} == {"C8"}
    assert description[f"{K}.weight"] == str(scheme)
    checkpoint, source = Checkpoint.open(tmp_path / "m"), open_weights(tmp_path / "m")
    for module in (K, V):
        stored = checkpoint.raw(f"{module}.kv_cache_scale")
        assert (stored.dtype, stored.shape) == (np.float32, (ROWS,))
        linear = source.linear(module)
        assert linear.scheme == replace(scheme, cache=C8)
        found = linear.cache
        wanted = random_linear(module, (ROWS, 16), replace(scheme, cache=C8)).cache
        assert found is not None
        assert wanted is not None
        kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
        np.testing.assert_array_equal(found.scale.astype(kind).astype(np.float32), found.scale)
        np.testing.assert_array_equal(found.scale, stored)
        np.testing.assert_allclose(found.scale, wanted.scale, rtol=1e-2)
        # The engine multiplies by the reciprocal and then by the scale: together nearly 1.
        np.testing.assert_allclose(found.scale * found.reciprocal, 1, atol=2.5e-3)
        offset = checkpoint.raw(f"{module}.kv_cache_offset")
        assert (offset.dtype, offset.shape) == (np.float32, (ROWS,))
        if wanted.offset is None:
            assert not offset.any()
            assert found.offset is None
            continue
        # The middle of a range stays where it is, to half of the two steps that bfloat16 has there.
        np.testing.assert_array_equal(found.offset, offset)
        np.testing.assert_array_equal(offset.astype(kind).astype(np.float32), offset)
        np.testing.assert_allclose(offset / found.reciprocal / wanted.scale, wanted.offset, atol=2)
    query = source.linear(K.replace("k_proj", "q_proj"))
    assert query.cache is None


def test_inspect_says_it(folder: Path) -> None:
    summary = summarize(folder)
    assert summary.findings == []
    modules = {module.name: module for module in summary.modules}
    assert modules[K].scheme == "W8A8_DYNAMIC_C8"
    assert modules[K.replace("k_proj", "q_proj")].scheme == "W8A8_DYNAMIC"
    low, high = modules[K].cache_scale or (0, 0)
    assert 1e-3 <= low < high <= 1.01
    assert any(verdict.served for verdict in summary.served if verdict.server.name == "vllm-ascend")


def test_scales_beside_int4_weights_with_two_rows_in_a_byte(tmp_path: Path) -> None:
    folder = write_dense(tmp_path / "m", 16, 16)
    change_entries(folder / "config.json", {"num_attention_heads": 2, "num_key_value_heads": 1})
    ends = ("k_proj.weight", "v_proj.weight")
    modules = [n.removesuffix(".weight") for n in Checkpoint.open(folder).names() if n.endswith(ends)]
    scales = {f"{module}.kv_cache_scale": np.full(32, 0.5, np.float32) for module in modules}
    change_tensors(folder, scales, described=False)
    entries = dict.fromkeys([*scales, "kv_cache_type", "kv_quant_type"], "C8")
    change_entries(folder / DESCRIPTION_NAME, entries)
    assert summarize(folder).findings == []
    found = open_weights(folder).linear(K).cache
    assert found is not None
    np.testing.assert_array_equal(found.scale, scales[f"{K}.kv_cache_scale"])
    change_tensors(folder, {f"{K}.kv_cache_scale": np.ones(16, np.float32)}, described=False)
    assert f"{K}.kv_cache_scale: has shape [16], [32] is expected" in problems(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{V}.kv_cache_scale": None}, f"{V}.kv_cache_scale: missing: other layers have one"),
        (
            {f"{K}.kv_cache_scale": np.zeros(ROWS, np.float32)},
            f"{K}.kv_cache_scale: holds a scale that is not positive and finite",
        ),
        (
            {f"{K}.kv_cache_scale": np.full(ROWS, np.inf, np.float32)},
            f"{K}.kv_cache_scale: holds a scale that is not positive and finite",
        ),
        (
            {f"{K}.kv_cache_scale": np.full(ROWS, 1e-44, np.float32)},
            f"{K}.kv_cache_scale: holds a scale that is 0, or has an infinite reciprocal, in bfloat16",
        ),
        (
            {f"{K}.kv_cache_scale": np.ones(ROWS // 2, np.float32)},
            f"{K}.kv_cache_scale: has shape [32], [64] is expected",
        ),
        (
            {f"{K}.kv_cache_scale": np.ones(1, np.float32)},
            f"{K}.kv_cache_scale: has shape [1], [64] is expected",
        ),
        (
            {f"{V}.kv_cache_offset": np.ones(ROWS, np.float32)},
            f"{V}.kv_cache_offset: is not zero everywhere: the engine adds it",
        ),
        (
            {f"{K}.kv_cache_offset": np.full(ROWS, np.nan, np.float32)},
            f"{K}.kv_cache_offset: holds NaN or infinity",
        ),
        (
            {f"{K}.kv_cache_scale": np.ones(ROWS, np.int8)},
            f"{K}.kv_cache_scale: stored as I8, a floating-point dtype is expected",
        ),
    ],
)
def test_broken_scales_are_found(folder: Path, changes: dict[str, Any], message: str) -> None:
    change_tensors(folder, changes, described=False)
    assert any(message in problem for problem in problems(folder)), problems(folder)
    if not any(value is None for value in changes.values()):
        with pytest.raises(CheckpointError, match="kv_cache_") as caught:
            AscendCheckpoint.open(folder).linear(next(iter(changes)).rpartition(".")[0])
        assert "msquant inspect" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_cache_type": None}, "kv_cache_type: is None in the description, but model.layers.0"),
        (
            {f"{K}.kv_cache_scale": "FLOAT"},
            f"{K}.kv_cache_scale: described as 'FLOAT': a scale of a cache is described as 'C8'",
        ),
        ({f"{K}.kv_cache_scale": None}, f"{K}.kv_cache_scale: stored, but not described"),
    ],
)
def test_a_broken_description_is_found(folder: Path, changes: dict[str, Any], message: str) -> None:
    change_entries(folder / DESCRIPTION_NAME, changes)
    assert any(message in problem for problem in problems(folder)), problems(folder)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("golden-stick", "no loader of it selects an int8 cache of keys and values.*; vllm-ascend takes one"),
        ("compressed-tensors", "whose caches are float8 at most; vllm-ascend takes an int8 one"),
    ],
)
def test_other_formats_refuse_it(tmp_path: Path, name: str, reason: str) -> None:
    schemes, folder = cached(HEADS_OF_32, W8A8), tmp_path / "static"
    write_experts(folder, HEADS_OF_32, schemes=schemes, format_name="ascend")
    with pytest.raises(RecipeError, match=reason) as caught:
        plan_folder(groups_of(HEADS_OF_32), schemes, HEADS_OF_32, "bfloat16", format_name=name)
    assert "W8A8_C8, with an int8 key-value cache" in str(caught.value)
    assert "or write another format: ascend" in str(caught.value)
    with pytest.raises(CheckpointError, match="int8 key-value cache"):
        export(folder, [name], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_leaves_the_scales_out_where_it_is_asked_to(folder: Path, tmp_path: Path) -> None:
    made = export(folder, ["compressed-tensors"], output=tmp_path / "out", cache="none")[0].folder
    assert summarize(made).findings == []
    before, after = open_weights(folder).linear(K), open_weights(made).linear(K)
    assert isinstance(before, QuantizedLinear)
    assert isinstance(after, QuantizedLinear)
    assert after.cache is None
    np.testing.assert_array_equal(before.weight, after.weight)
    plain = export(folder, ["ascend"], output=tmp_path / "plain", cache="none")[0].folder
    assert problems(plain) == []
    assert "kv_cache_type" not in read_json(plain / DESCRIPTION_NAME)
    with pytest.raises(CheckpointError, match="floating point already"):
        export(plain, ["compressed-tensors"], output=tmp_path / "again", cache="none")
    with pytest.raises(RecipeError, match="makes no scales"):
        export(folder, ["ascend"], output=tmp_path / "again", cache="int8")


def test_heads_that_the_engine_cannot_lay_out_are_refused() -> None:
    config = HEADS_OF_32 | {"head_dim": 16}
    with pytest.raises(RecipeError, match="in blocks of 32 channels of a head, and heads have 16"):
        plan_folder(groups_of(config), cached(config), config, "bfloat16", format_name="ascend")


def test_a_folder_with_heads_that_the_engine_cannot_lay_out_is_found(folder: Path) -> None:
    """As many rows, of smaller heads."""
    halved = {"head_dim": 16, "num_attention_heads": 8, "num_key_value_heads": 4}
    change_entries(folder / "config.json", halved)
    (folder / "msquant.json").unlink()
    assert problems(folder) == [
        "model.layers.0.self_attn.k_proj: is W8A8_DYNAMIC_C8: vllm-ascend lays int8 caches out in blocks of "
        "32 channels of a head, and heads have 16"
    ]


def test_a_scale_that_the_dtype_does_not_hold_is_refused() -> None:
    linear = random_linear(K, (ROWS, 16), W8A8_DYNAMIC)
    assert isinstance(linear, QuantizedLinear)
    tiny = CacheScale.of(np.full(ROWS, 1e-7, np.float32))
    small = replace(linear, scheme=replace(W8A8_DYNAMIC, cache=C8), cache=tiny)
    with pytest.raises(CheckpointError, match=r"is 1e-07, which float16") as caught:
        AscendFormat().encode_linear(K, small, "float16")
    assert "--cache none" in str(caught.value)
    AscendFormat().encode_linear(K, small, "bfloat16")


def test_scales_are_rounded_channel_by_channel() -> None:
    cache = CacheScale.of(np.array([0.1, 2.0], np.float32))
    kept = cache.rounded(np.array([[0.26, 3.1], [100, -1000], [-0.04, 1.0]], np.float32))
    np.testing.assert_allclose(kept, [[0.3, 4], [12.7, -256], [0, 0]], rtol=1e-6)
    moved = replace(cache, offset=np.array([-100, 20], np.float32))
    kept = moved.rounded(np.array([[10.3, 3.1], [23, 1000], [-100, -1000]], np.float32))
    np.testing.assert_allclose(kept, [[0.3, 44], [12.7, 254], [-12.8, -256]], rtol=1e-5)
    one = moved.take(np.array([1]))
    assert one.offset is not None
    assert one.offset.tolist() == [20]
