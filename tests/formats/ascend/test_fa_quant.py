"""Folders with an int8 cache of latent attention for vllm-ascend: written, read, each broken one found."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.weights import CacheScale, FloatLinear
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
from tests.formats.expert_folders import DEEPSEEK, groups_of, random_linear, schemes_of, write_experts
from tests.formats.folders import change_entries, change_tensors

LATENT: dict[str, Any] = {
    **{key: value for key, value in DEEPSEEK.items() if key != "quantization_config"},
    "num_nextn_predict_layers": 0,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "max_position_embeddings": 64,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
}
BLOCK = "model.layers.0.self_attn"
DOWN = f"{BLOCK}.kv_a_proj_with_mqa"
SCALES = [f"{BLOCK}.fa_{part}.{what}" for part in "qkv" for what in ("scale", "offset")]

problems = partial(folders.problems, AscendFormat())


def cached(config: dict[str, Any], scheme: Scheme = W8A8_DYNAMIC) -> dict[str, Scheme]:
    """All linears in a scheme, and the cache of what makes the latent state in int8."""
    return {
        module: replace(scheme, cache=C8) if module.endswith("kv_a_proj_with_mqa") else scheme
        for module in schemes_of(config)
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_experts(tmp_path / "m", LATENT, schemes=cached(LATENT), format_name="ascend")
    return tmp_path / "m"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_is_written_is_read_back_as_the_engine_holds_it(tmp_path: Path, dtype: str) -> None:
    config = LATENT | {"torch_dtype": dtype}
    write_experts(tmp_path / "m", config, schemes=cached(config), format_name="ascend")
    assert problems(tmp_path / "m") == []
    description = read_json(tmp_path / "m" / DESCRIPTION_NAME)
    assert description["fa_quant_type"] == "FAKQuant"
    assert "kv_cache_type" not in description
    assert {description[name] for name in SCALES} == {"FAQuant"}
    assert description[f"{BLOCK}.quant_type"] == "INT8"
    checkpoint, linear = Checkpoint.open(tmp_path / "m"), open_weights(tmp_path / "m").linear(DOWN)
    for name in SCALES:
        stored, rows = checkpoint.raw(name), 2 if "fa_q" in name else 1
        assert (stored.dtype, stored.shape) == (np.float32 if "scale" in name else np.int8, (rows, 1))
        assert not (stored.any() and "offset" in name)
    made, cache = random_linear(DOWN, (48, 16), replace(W8A8_DYNAMIC, cache=C8)).cache, linear.cache
    assert linear.scheme == replace(W8A8_DYNAMIC, cache=C8)
    assert made is not None
    assert cache is not None
    assert cache.queries is not None
    np.testing.assert_allclose(cache.scale, made.scale, rtol=1e-2)
    np.testing.assert_allclose(cache.queries, made.queries, rtol=1e-2)
    np.testing.assert_array_equal(cache.scale, checkpoint.raw(f"{BLOCK}.fa_k.scale").reshape(-1))
    np.testing.assert_allclose(cache.scale * cache.reciprocal, 1, atol=1e-6)
    assert linear.take_rows(np.arange(48)[::-1]).cache is cache


def test_inspect_says_it(folder: Path) -> None:
    summary = summarize(folder)
    assert summary.findings == []
    modules = {module.name: module for module in summary.modules}
    assert modules[DOWN].scheme == "W8A8_DYNAMIC_C8"
    assert modules[DOWN].cache_scale is not None
    assert not [name for name in modules if "fa_" in name]
    assert any(verdict.served for verdict in summary.served if verdict.server.name == "vllm-ascend")


def test_layers_without_it_keep_floating_point(folder: Path) -> None:
    """vllm-ascend looks for `fa_k.scale` layer by layer."""
    gone = dict.fromkeys([*SCALES, f"{BLOCK}.quant_type"])
    change_tensors(folder, dict.fromkeys(SCALES), described=False)
    change_entries(folder / DESCRIPTION_NAME, gone)
    (folder / "msquant.json").unlink()
    assert problems(folder) == []
    weights = open_weights(folder)
    assert weights.linear(DOWN).cache is None
    assert weights.linear(DOWN.replace(".0.", ".1.")).cache is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fa_k.scale": np.zeros((1, 1), np.float32)}, "fa_k.scale: holds a scale that is not positive"),
        (
            {"fa_q.scale": np.full((2, 1), np.nan, np.float32)},
            "fa_q.scale: holds a scale that is not positive",
        ),
        ({"fa_k.scale": np.ones((2, 1), np.float32)}, r"fa_k.scale: has shape [2, 1], [1, 1] is expected"),
        ({"fa_q.scale": np.ones(2, np.float32)}, r"fa_q.scale: has shape [2], [heads, 1] is expected"),
        ({"fa_k.offset": np.ones((1, 1), np.int8)}, "fa_k.offset: is not zero: the engine takes a latent"),
        (
            {"fa_k.offset": np.zeros((1, 1), np.float32)},
            "F32, I8 is expected: float8 caches are for Atlas 950",
        ),
        ({"fa_k.scale": np.ones((1, 1), np.int32)}, "fa_k.scale: is stored as I32, a floating-point number"),
        ({"fa_v.scale": None}, "fa_v.scale: missing: other scales of this attention block are there"),
    ],
)
def test_a_broken_scale_is_found(folder: Path, changes: dict[str, Any], message: str) -> None:
    change_tensors(folder, {f"{BLOCK}.{name}": values for name, values in changes.items()}, described=False)
    assert any(message in problem for problem in problems(folder)), problems(folder)
    with pytest.raises(CheckpointError, match="fa_") as caught:
        AscendCheckpoint.open(folder).linear(DOWN)
    assert "msquant inspect" in str(caught.value)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"fa_quant_type": None}, "fa_quant_type: is None in the description, but"),
        ({f"{BLOCK}.fa_k.scale": "C8"}, "described as 'C8': a scale of a cache is described as 'FAQuant'"),
        ({f"{BLOCK}.quant_type": "FP8"}, "quant_type is 'FP8': a quantized cache or attention"),
    ],
)
def test_a_description_that_does_not_say_it_is_found(
    folder: Path, entries: dict[str, Any], message: str
) -> None:
    change_entries(folder / DESCRIPTION_NAME, entries)
    assert any(message in problem for problem in problems(folder)), problems(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_lora_rank": 48}, "in blocks of 32 channels, and kv_lora_rank is 48"),
        ({"qk_rope_head_dim": 8}, "in blocks of 16 channels, and qk_rope_head_dim is 8"),
        ({"q_lora_rank": None}, "from queries that are compressed"),
        ({"index_topk": 64}, "attention with an indexer"),
    ],
)
def test_what_the_engine_cannot_keep_is_refused(changes: dict[str, Any], message: str) -> None:
    config = LATENT | changes
    with pytest.raises(RecipeError, match=message):
        plan_folder(groups_of(config), cached(config), config, "bfloat16", format_name="ascend")


@pytest.mark.parametrize("scheme", [W8A8, FLOAT], ids=str)
def test_linears_in_front_are_per_token(scheme: Scheme) -> None:
    query = f"{BLOCK}.q_b_proj"
    schemes = cached(LATENT) | {query: scheme}
    with pytest.raises(RecipeError, match=f"is {scheme}: vllm-ascend fills an int8 latent cache") as caught:
        plan_folder(groups_of(LATENT), schemes, LATENT, "bfloat16", format_name="ascend")
    assert query in str(caught.value)


@pytest.mark.parametrize("name", ["golden-stick", "compressed-tensors"])
def test_other_formats_refuse_it(tmp_path: Path, folder: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="int8 key-value cache"):
        export(folder, [name], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_leaves_the_scale_out_where_it_is_asked_to(folder: Path, tmp_path: Path) -> None:
    made = export(folder, ["ascend", "compressed-tensors"], output=tmp_path / "out", cache="none")
    assert problems(made[0].folder) == []
    assert summarize(made[1].folder).findings == []
    assert "fa_quant_type" not in read_json(made[0].folder / DESCRIPTION_NAME)
    before = open_weights(folder).linear(DOWN)
    for result in made:
        after = open_weights(result.folder).linear(DOWN)
        assert after.cache is None
        np.testing.assert_array_equal(before.weight, after.weight)


def test_a_scale_that_the_dtype_does_not_hold_is_refused() -> None:
    tiny = CacheScale.of(np.full(1, 1e-9, np.float32), np.ones(2, np.float32))
    small = FloatLinear(np.zeros((48, 16), np.float32), cache=tiny)
    with pytest.raises(CheckpointError, match="is 1e-09, which float16") as caught:
        AscendFormat().encode_linear(DOWN, small, "float16")
    assert "--cache none" in str(caught.value)
    AscendFormat().encode_linear(DOWN, small, "bfloat16")
