"""Decoder layers: their steps, and weights that do not fit `config.json`."""

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mindspore import Tensor, nn
from safetensors.numpy import load_file, save_file

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.errors import CheckpointError
from msquant.models.config_json import read_config
from msquant.models.layers import DecoderLayer, Part, positions
from msquant.models.network import CausalLM
from tests.fixtures.tiny_families import write_tiny
from tests.fixtures.tiny_model import write_tiny_llama
from tests.models.folders import with_config


def decoder_layer(folder: Path, dtype: Any) -> DecoderLayer:
    config = read_config(folder)
    return DecoderLayer(config, Checkpoint.open(folder), "model.layers.0", dtype)


KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "qwen3_moe": {},
    "qwen3_next": {},
    "deepseek_v3": {},
    "deepseek_v2": {"attention_bias": True},
}
STEPS = {
    "llama": ["qkv", "o", "gate_up", "down"],
    "qwen3": ["qkv", "o", "gate_up", "down"],
    "qwen3_moe": ["qkv", "o"],
    "qwen3_next": ["qkv", "o"],
    "deepseek_v3": ["q_kv_a", "q_b", "kv_b", "o"],
    "deepseek_v2": ["q_kv_a", "kv_b", "o"],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {kind: write_tiny(root / kind, kind, **settings) for kind, settings in KINDS.items()}


def layer_and_input(folder: Path, dtype: Any, index: int = 1, part: Part = "whole") -> tuple[Any, Any, Any]:
    config = read_config(folder)
    layer = DecoderLayer(config, Checkpoint.open(folder), index, dtype, part)
    hidden = Tensor(np.random.default_rng(0).standard_normal((14, 64)).astype(np.float32))
    return layer, hidden, positions(config, 7, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index", [0, 1], ids=["dense", "experts"])
def test_running_in_two_parts_equals_running_at_once(
    index: int, kind: str, folders: dict[str, Path], dtype: Any
) -> None:
    layer, hidden, places = layer_and_input(folders[kind], dtype, index)
    at_once = layer(hidden.reshape(2, 7, 64), places).asnumpy().reshape(14, 64)
    assert np.abs(at_once - hidden.asnumpy()).max() > 0.1
    for split in range(1, layer.steps):
        state = layer.run((hidden,), 2, places, stop=split)
        (resumed,) = layer.run(state, 2, places, start=split)
        np.testing.assert_array_equal(resumed.asnumpy(), at_once)


@pytest.mark.parametrize("kind", KINDS)
def test_the_steps_are_those_of_the_groups(kind: str, folders: dict[str, Path], dtype: Any) -> None:
    config = read_config(folders[kind])
    layer, _, _ = layer_and_input(folders[kind], dtype)
    assert list(layer.step_of) == STEPS[kind]
    assert [group.name for group in config.mixer_groups(1)] == [
        name for name in STEPS[kind] if name not in ("gate_up", "down")
    ]
    dense, _, _ = layer_and_input(folders[kind], dtype, index=0)
    assert list(dense.step_of) == [group.name for group in config.groups(0)]
    assert list(dense.step_of.values()) == list(range(1, dense.steps))


@pytest.mark.parametrize("kind", KINDS)
def test_the_linears_of_a_group_first_count_in_its_step(
    kind: str, folders: dict[str, Path], dtype: Any
) -> None:
    config = read_config(folders[kind])
    for group in config.groups(0):
        layer, hidden, places = layer_and_input(folders[kind], dtype, index=0)
        step = layer.step_of[group.name]
        before = layer.run((hidden,), 2, places, stop=step)
        output = layer.run(before, 2, places, start=step)[0].asnumpy()
        for name in group.linears:
            weight = cell_of(layer, name).weight
            weight.set_data(weight * 2)
        again = layer.run((hidden,), 2, places, stop=step)
        for unchanged, state in zip(before, again, strict=True):
            np.testing.assert_array_equal(state.asnumpy(), unchanged.asnumpy())
        assert np.abs(layer.run(before, 2, places, start=step)[0].asnumpy() - output).max() > 1e-3, group.name


@pytest.mark.parametrize("kind", KINDS)
def test_a_smooth_scale_can_be_moved_between_a_group_and_what_feeds_it(
    kind: str, folders: dict[str, Path], dtype: Any
) -> None:
    config = read_config(folders[kind])
    for group in config.groups(0):
        if group.name == "o":
            continue
        layer, hidden, places = layer_and_input(folders[kind], dtype, index=0)
        step = layer.step_of[group.name]
        state = layer.run((hidden,), 2, places, stop=step)
        expected = layer.run(state, 2, places, start=step)[0].asnumpy()
        scale = np.random.default_rng(1).uniform(0.5, 2, state[1].shape[1]).astype(np.float32)
        previous = cell_of(layer, group.previous).weight
        inverse = 1 / scale if previous.ndim == 1 else 1 / scale[:, None]
        previous.set_data(Tensor(previous.asnumpy() * inverse))
        for name in (*group.linears, *group.followers):
            weight = cell_of(layer, name).weight
            weight.set_data(Tensor(weight.asnumpy() * scale))
        smoothed = layer.run((hidden,), 2, places, stop=step)
        np.testing.assert_allclose(smoothed[1].asnumpy() * scale, state[1].asnumpy(), rtol=1e-4, atol=1e-5)
        # The layer's output does not change, if x was the input of these linears and of nothing else.
        moved = layer.run(smoothed, 2, places, start=step)[0].asnumpy()
        np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=1e-3)


def test_all_heads_of_the_delta_rule_share_what_feeds_the_output_projection(
    folders: dict[str, Path], dtype: Any
) -> None:
    layer, hidden, places = layer_and_input(folders["qwen3_next"], dtype, index=0)
    expected = layer.run((hidden,), 2, places)[0].asnumpy()
    group = read_config(folders["qwen3_next"]).mixer_groups(0)[1]
    assert group.heads == 4
    norm, output = (cell_of(layer, name).weight for name in (group.previous, group.linears[0]))
    scale = np.random.default_rng(1).uniform(0.5, 2, norm.shape).astype(np.float32)
    norm.set_data(Tensor(norm.asnumpy() / scale))
    output.set_data(Tensor(output.asnumpy() * np.tile(scale, group.heads)))
    np.testing.assert_allclose(layer.run((hidden,), 2, places)[0].asnumpy(), expected, rtol=1e-4, atol=1e-4)


def test_the_value_rows_of_latent_attention_feed_the_output_projection(
    folders: dict[str, Path], dtype: Any
) -> None:
    config = read_config(folders["deepseek_v3"])
    layer, hidden, places = layer_and_input(folders["deepseek_v3"], dtype, part="attention")
    (expected,) = layer.run((hidden,), 2, places)
    heads, nope, value = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    scale = np.random.default_rng(1).uniform(0.5, 2, (heads, value)).astype(np.float32)
    up, out = layer.self_attn.kv_b_proj.weight, layer.self_attn.o_proj.weight
    rows = up.asnumpy().reshape(heads, nope + value, -1).copy()
    rows[:, nope:] /= scale[:, :, None]
    up.set_data(Tensor(rows.reshape(up.shape)))
    out.set_data(Tensor(out.asnumpy() * scale.reshape(-1)))
    (moved,) = layer.run((hidden,), 2, places)
    np.testing.assert_allclose(moved.asnumpy(), expected.asnumpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_attention_part_is_the_layer_without_its_feed_forward_block(
    kind: str, folders: dict[str, Path], dtype: Any
) -> None:
    layer, hidden, places = layer_and_input(folders[kind], dtype)
    part, _, _ = layer_and_input(folders[kind], dtype, part="attention")
    assert list(part.step_of) == [name for name in STEPS[kind] if name not in ("gate_up", "down")]
    assert not hasattr(part, "mlp")
    (between,) = part.run((hidden,), 2, places)
    whole = layer.run((hidden,), 2, places, stop=layer.step_of["o"] + 1)[0]
    np.testing.assert_array_equal(between.asnumpy(), whole.asnumpy())
    np.testing.assert_array_equal(part(hidden.reshape(2, 7, 64), places).asnumpy().reshape(14, 64), between)
    rest = layer.mlp(layer.post_attention_layernorm(between))
    np.testing.assert_array_equal((between + rest).asnumpy(), layer.run((hidden,), 2, places)[0].asnumpy())


def test_the_attention_part_reads_nothing_else(folders: dict[str, Path], dtype: Any) -> None:
    config, source = read_config(folders["deepseek_v3"]), Checkpoint.open(folders["deepseek_v3"])
    for name in config.layer_shapes(1):
        if ".mlp." in name or "post_attention" in name:
            del source.weight_map[name]
    DecoderLayer(config, source, "model.layers.1", dtype, part="attention")
    with pytest.raises(CheckpointError, match="post_attention_layernorm"):
        DecoderLayer(config, source, "model.layers.1", dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_the_names_of_cells_are_those_of_the_tensors(kind: str, folders: dict[str, Path], dtype: Any) -> None:
    config, source = read_config(folders[kind]), Checkpoint.open(folders[kind])
    for index in range(2):
        layer = DecoderLayer(config, source, index, dtype, resident=True)
        for name, shape in config.layer_shapes(index).items():
            assert cell_of(layer, name.removeprefix(f"model.layers.{index}.")).shape == shape, name


@pytest.mark.parametrize("kind", KINDS)
def test_weights_go_with_their_layer(
    kind: str, folders: dict[str, Path], dtype: Any, no_garbage_collection: None
) -> None:
    layer, hidden, places = layer_and_input(folders[kind], dtype)
    layer.run((hidden,), 2, places)
    linears = [cell for _, cell in layer.cells_and_names() if isinstance(cell, nn.Dense)]
    weights = [weakref.ref(linear.weight) for linear in linears]
    del layer, linears
    assert [weight for weight in weights if weight() is not None] == []


def cell_of(layer: DecoderLayer, name: str) -> Any:
    cell: Any = layer
    for part in name.split("."):
        cell = getattr(cell, part)
    return cell


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 96}, r"mlp\.gate_proj\.weight has shape \[128, 64\].* \[96, 64\]"),
        ({"num_key_value_heads": 1}, r"self_attn\.k_proj\.weight has shape \[32, 64\].* \[16, 64\]"),
        ({"head_dim": 32}, r"self_attn\.q_proj\.weight has shape \[64, 64\].* \[128, 64\]"),
        ({"attention_bias": True}, r"self_attn\.q_proj has no bias, config\.json asks for one"),
        ({"mlp_bias": True}, r"mlp\.gate_proj has no bias, config\.json asks for one"),
        ({"vocab_size": 500}, r"model\.embed_tokens\.weight has shape \[512, 64\].* \[500, 64\]"),
        ({"num_hidden_layers": 3}, r"model\.layers\.2\."),
        ({"tie_word_embeddings": False}, r"lm_head\.weight"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_named(
    changes: dict[str, Any], message: str, tiny_llama: Path, tmp_path: Path, dtype: Any
) -> None:
    folder = with_config(tiny_llama, tmp_path / "model", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        CausalLM(read_config(folder), Checkpoint.open(folder), dtype)
    assert caught.value.remedy


def test_a_bias_that_the_config_does_not_know_is_named(tmp_path: Path, dtype: Any) -> None:
    source = write_tiny_llama(tmp_path / "source", layers=1, attention_bias=True)
    folder = with_config(source, tmp_path / "model", attention_bias=False)
    with pytest.raises(CheckpointError, match=r"q_proj has a bias, config\.json asks for none"):
        decoder_layer(folder, dtype)


def test_a_norm_of_the_wrong_size_is_named(tiny_llama: Path, tmp_path: Path, dtype: Any) -> None:
    folder = with_config(tiny_llama, tmp_path / "model", hidden_size=48)
    with pytest.raises(CheckpointError, match=r"input_layernorm\.weight has shape \[64\].* \[48\]"):
        decoder_layer(folder, dtype)


def test_a_final_norm_of_the_wrong_size_is_named(tiny_llama: Path, tmp_path: Path, dtype: Any) -> None:
    folder = with_config(tiny_llama, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:48]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[48\].* \[64\]"):
        CausalLM(read_config(folder), Checkpoint.open(folder), dtype)
