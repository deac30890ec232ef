"""Decoding MXFP4, against transformers' own dequantization."""

import numpy as np
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from msquant.checkpoint.mxfp4 import decode, decoded_shape, scales_of


def test_all_codes_under_all_scales_are_those_of_transformers() -> None:
    blocks = np.arange(256, dtype=np.uint8).reshape(1, 16, 1, 16).repeat(254, axis=2)
    # 255 is NaN in the specification, and infinity in transformers.
    scales = np.arange(1, 255, dtype=np.uint8).reshape(1, 1, 254).repeat(16, axis=1)
    found = decode(blocks, scales)
    expected = convert_moe_packed_tensors(
        torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32
    )
    assert found.shape == (1, 16, 254 * 32) == decoded_shape(blocks.shape)
    np.testing.assert_array_equal(found, expected.transpose(1, 2).numpy())
    assert np.unique(np.abs(decode(blocks[:, :, :1], np.full((1, 16, 1), 127, np.uint8)))).tolist() == [
        *(0, 0.5, 1, 1.5, 2, 3, 4, 6)
    ]


def test_a_scale_of_255_is_nan() -> None:
    found = decode(np.zeros((2, 1, 16), np.uint8), np.array([[255], [127]], np.uint8))
    assert np.isnan(found[0]).all()
    assert (found[1] == 0).all()


def test_the_scales_lie_beside_the_codes() -> None:
    assert scales_of("model.layers.0.mlp.experts.down_proj_blocks") == (
        "model.layers.0.mlp.experts.down_proj_scales"
    )
