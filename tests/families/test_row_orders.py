"""Which rotary rows are reordered, and that the order can be undone."""

from typing import Any

import numpy as np
import pytest

from msquant.errors import CheckpointError
from msquant.families import row_orders
from msquant.families.row_orders import RowOrder

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "q_lora_rank": 12,
    "kv_lora_rank": 5,
    "qk_nope_head_dim": 2,
    "qk_rope_head_dim": 6,
}


def test_rope_rows_come_even_first_in_every_head() -> None:
    head = np.array([0, 1, 2, 4, 6, 3, 5, 7])
    order = row_orders(CONFIG).orders["self_attn.q_b_proj"]
    np.testing.assert_array_equal(order.deinterleaved(), np.concatenate([head, 8 + head, 16 + head]))
    latent = row_orders(CONFIG).orders["self_attn.kv_a_proj_with_mqa"]
    np.testing.assert_array_equal(latent.deinterleaved(), [0, 1, 2, 3, 4, 5, 7, 9, 6, 8, 10])


def test_the_rotation_by_halves_of_the_stored_rows_is_the_rotation_by_neighbours() -> None:
    rng = np.random.default_rng(0)
    row = rng.normal(size=6)
    angles = rng.normal(size=3)
    real, imaginary = row[0::2], row[1::2]
    turned = (real + 1j * imaginary) * np.exp(1j * angles)
    stored = row[RowOrder(1, 6, 6).deinterleaved()]
    cos, sin = np.cos(angles), np.sin(angles)
    halves = np.concatenate([stored[:3] * cos - stored[3:] * sin, stored[3:] * cos + stored[:3] * sin])
    back = halves[RowOrder(1, 6, 6).interleaved()]
    np.testing.assert_allclose(back[0::2] + 1j * back[1::2], turned, rtol=1e-12)


@pytest.mark.parametrize("order", [RowOrder(3, 8, 6), RowOrder(1, 9, 4), RowOrder(2, 4, 4)])
def test_one_order_undoes_the_other(order: RowOrder) -> None:
    rows = np.arange(order.rows)
    np.testing.assert_array_equal(order.deinterleaved()[order.interleaved()], rows)
    np.testing.assert_array_equal(order.interleaved()[order.deinterleaved()], rows)
    assert (order.deinterleaved() != rows).any()


def test_only_decoder_layers_are_reordered() -> None:
    rows = row_orders(CONFIG)
    assert rows.of("model.layers.1.self_attn.q_b_proj") == RowOrder(3, 8, 6)
    assert rows.of("model.layers.1.self_attn.kv_a_proj_with_mqa") == RowOrder(1, 11, 6)
    for name in (
        "model.layers.2.self_attn.q_b_proj",  # the multi-token-prediction layer
        "model.layers.1.self_attn.q_a_proj",
        "model.layers.1.self_attn.kv_b_proj",
        "model.layers.x.self_attn.q_b_proj",
        "q_b_proj",
    ):
        assert rows.of(name) is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"q_lora_rank": None}, {"self_attn.q_proj", "self_attn.kv_a_proj_with_mqa"}),
        ({"model_type": "deepseek_v2"}, {"self_attn.q_b_proj", "self_attn.kv_a_proj_with_mqa"}),
        ({"rope_interleave": True}, {"self_attn.q_b_proj", "self_attn.kv_a_proj_with_mqa"}),
        ({"rope_interleave": False}, set()),
        ({"model_type": "qwen3_moe"}, set()),
    ],
)
def test_the_architecture_decides(changes: dict[str, Any], expected: set[str]) -> None:
    assert set(row_orders({**CONFIG, **changes}).orders) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_rope_head_dim": 5}, "an even number"),
        ({"qk_rope_head_dim": None}, "qk_rope_head_dim is None, a positive integer"),
        ({"kv_lora_rank": "512"}, "kv_lora_rank is '512'"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"qk_nope_head_dim": -1}, "qk_nope_head_dim is -1"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    ],
)
def test_bad_sizes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        row_orders({**CONFIG, **changes})
    assert caught.value.where == "config.json"
