"""GPTQ beside the method as its paper writes it, and what is done where its inputs say little."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import msquant
from msquant.algorithms import make_algorithm
from msquant.errors import CalibrationError
from msquant.kernels.gptq import (
    SCALE_RATIOS,
    InputMoments,
    best_parameters,
    gram_matrix,
    inverse_factor,
    shrunk,
)
from msquant.kernels.weight_rounding import RoundedWeight, quantize_weight
from msquant.schemes import Quant, parse_scheme

ROWS = 300
TIES = 5e-3
"""Of all integers; float32 sums round what lies halfway to either side, and what follows goes with it."""


def quant_of(word: str) -> Quant:
    quant = parse_scheme(word).weights
    assert quant is not None
    return quant


def example(columns: int, tokens: int = 600) -> tuple[Any, Any]:
    """A weight `[ROWS, K]` and correlated inputs `[T, K]`."""
    random = np.random.default_rng(0)
    mixed = np.eye(columns) + 0.1 * random.standard_normal((columns, columns))
    inputs = (random.standard_normal((tokens, columns)) @ mixed).astype(np.float32)
    return random.standard_normal((ROWS, columns)).astype(np.float32), inputs


def textbook(weight: Any, inputs: Any, quant: Quant, shrinkage: float, damping: float) -> Any:
    """The integers of Frantar et al., algorithm 1, one column at a time and in float64; the loudest first."""
    wide = inputs.astype(np.float64)
    hessian = wide.T @ wide / len(wide)
    diagonal = np.diag(np.diag(hessian))
    hessian = (1 - shrinkage) * hessian + shrinkage * diagonal
    # A column that no token has used counts as one that is alone.
    dead = np.diag(hessian) == 0
    hessian[dead, dead] = diagonal.trace() / len(diagonal)
    hessian += damping * diagonal.trace() / len(diagonal) * np.eye(len(diagonal))
    order = np.argsort(-diagonal.diagonal(), kind="stable")
    factor = np.linalg.cholesky(np.linalg.inv(hessian[order][:, order])).T
    left, integers = weight.astype(np.float64)[:, order], np.zeros(weight.shape, int)
    size = quant.group_size or weight.shape[1]
    for place, column in enumerate(order):
        group = weight[:, column // size * size :][:, :size].astype(np.float64)
        low, high = np.minimum(group.min(axis=1), 0), np.maximum(group.max(axis=1), 0)
        if quant.symmetric:
            scale = 2 * np.abs(group).max(axis=1) / (quant.high - quant.low)
            zero = 0.0
        else:
            scale = (high - low) / (quant.high - quant.low)
            zero = np.clip(np.rint(quant.low - low / scale), quant.low, quant.high)
        taken = np.clip(np.rint(left[:, place] / scale + zero), quant.low, quant.high)
        integers[:, column] = taken
        error = (left[:, place] - (taken - zero) * scale) / factor[place, place]
        left[:, place + 1 :] -= np.outer(error, factor[place, place + 1 :])
    return integers


def output_error(weight: Any, inputs: Any, rounded: RoundedWeight) -> float:
    groups = rounded.scale.reshape(ROWS, -1)
    repeat = weight.shape[1] // groups.shape[1]
    zeros = 0 if rounded.offset is None else np.repeat(rounded.offset.reshape(ROWS, -1), repeat, axis=1)
    kept = (rounded.weight - zeros) * np.repeat(groups, repeat, axis=1)
    return float(np.square(inputs @ (kept - weight).T).mean())


@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
@pytest.mark.parametrize(
    "word",
    [
        "W4A16_CHANNEL",
        "W4A16_CHANNEL_ASYM",
        "W4A16_G32",
        "W4A16_G64_ASYM",
        "W4A16_G96",
        "W4A16",
        "W8A8_DYNAMIC",
    ],
)
def test_the_integers_are_the_papers(word: str, shrinkage: float) -> None:
    quant = quant_of(word)
    weight, inputs = example(2 * (quant.group_size or 100))
    moments = InputMoments([inputs[:250], inputs[250:]], shrinkage, 0.01)
    rounded = moments.rounded(weight, "float32", quant)
    assert np.mean(rounded.weight != textbook(weight, inputs, quant, shrinkage, 0.01)) < TIES
    nearest = quantize_weight(weight, "float32", quant)
    assert output_error(weight, inputs, rounded) < 0.8 * output_error(weight, inputs, nearest)


@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
@pytest.mark.parametrize("word", ["W4A16_CHANNEL", "W4A16_G64_ASYM", "W8A8_DYNAMIC"])
def test_with_few_tokens_no_matrix_of_columns_is_made(word: str, shrinkage: float) -> None:
    quant = quant_of(word)
    weight, inputs = example(320, tokens=100)
    inputs[:, 7] = 0
    rounded = InputMoments([inputs[:40], inputs[40:]], shrinkage, 0.01).rounded(weight, "float32", quant)
    assert np.mean(rounded.weight != textbook(weight, inputs, quant, shrinkage, 0.01)) < TIES


@pytest.mark.parametrize("word", ["W4A16_CHANNEL", "W4A16_G64_ASYM", "W8A8_DYNAMIC"])
def test_wholly_shrunk_it_rounds_to_nearest(word: str) -> None:
    quant = quant_of(word)
    weight, inputs = example(128)
    moments = InputMoments([inputs], 1.0, 0.01)
    nearest = quantize_weight(weight, "bfloat16", quant)
    for rounded in (moments.rounded(weight, "bfloat16", quant), moments.nearest(weight, "bfloat16", quant)):
        for found, expected in zip(rounded, nearest, strict=True):
            np.testing.assert_array_equal(found, expected)
    searched = moments.nearest(weight, "bfloat16", quant, SCALE_RATIOS)
    for found, expected in zip(
        moments.rounded(weight, "bfloat16", quant, SCALE_RATIOS), searched, strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def test_a_searched_scale_has_the_least_weighted_error() -> None:
    weight, inputs = example(64)
    quant, loudness = quant_of("W4A16_CHANNEL"), gram_matrix([inputs]).diagonal()
    scale, _ = best_parameters(weight, loudness, "float32", quant, SCALE_RATIOS)

    def error(ratio: float) -> Any:
        step = (2 * np.abs(weight).max(axis=1, keepdims=True) * ratio / 15).astype(np.float32)
        kept = np.clip(np.rint(weight / step), -8, 7) * step
        return np.square(kept - weight) @ loudness

    errors = np.array([error(ratio) for ratio in SCALE_RATIOS])
    chosen = 2 * np.abs(weight).max(axis=1) * np.array(SCALE_RATIOS)[errors.argmin(axis=0)] / 15
    np.testing.assert_allclose(scale[:, 0], chosen, rtol=1e-5)
    assert errors.min(axis=0).sum() < errors[0].sum()


def test_the_factor_is_that_of_the_inverse() -> None:
    hessian = shrunk(gram_matrix([example(80)[1]]), 0.2, 0.01)
    factor = inverse_factor(hessian)
    assert np.array_equal(factor, np.triu(factor))
    np.testing.assert_allclose(factor.T @ factor @ hessian, np.eye(80), atol=2e-5)


def test_dead_channels_and_one_repeated_token() -> None:
    weight, inputs = example(64)
    inputs[:, 7] = 0
    quant = quant_of("W4A16_CHANNEL")
    rounded = InputMoments([inputs], 0.0, 0.01).rounded(weight, "float32", quant)
    # What no token has used is kept as well as it can be, and not set to zero: another text may use it.
    kept = rounded.weight[:, 7] * rounded.scale
    assert np.abs(kept - weight[:, 7]).max() <= rounded.scale.max() / 2 * 1.001
    same = np.repeat(inputs[:1], 300, axis=0)
    assert np.isfinite(InputMoments([same], 0.3, 0.01).rounded(weight, "float32", quant).scale).all()


def test_infinite_inputs_and_a_hessian_that_is_none() -> None:
    inputs = example(64)[1] * np.float32(1e25)
    with np.errstate(over="ignore", invalid="ignore"), pytest.raises(CalibrationError, match="too large"):
        shrunk(gram_matrix([inputs]), 0.3, 0.01)
    with pytest.raises(CalibrationError, match="positive definite"):
        inverse_factor(np.array([[1, 2], [2, 1]], np.float32))


def test_an_expert_without_inputs_is_rounded_from_its_weights() -> None:
    policy = make_algorithm(algorithm="gptq")
    weight, inputs = example(64)
    quant = quant_of("W4A8_DYNAMIC")
    alone = policy.rounder(inputs[:0])(weight, "bfloat16", quant)
    np.testing.assert_array_equal(alone.weight, quantize_weight(weight, "bfloat16", quant).weight)
    assert (policy.rounder(inputs)(weight, "bfloat16", quant).weight != alone.weight).any()


@pytest.mark.parametrize("algo", ["gptq", "awq"])
@pytest.mark.parametrize("word", ["W4A16_G32", "W4A16_CHANNEL"])
def test_both_beat_rounding_to_nearest_in_every_layer(
    tiny_llama: Path, tmp_path: Path, word: str, algo: str
) -> None:
    def errors(algo: str) -> list[float]:
        recipe = msquant.find_recipe(tiny_llama).adjusted(
            algo=algo, samples=4, sequence_length=64, formats="compressed-tensors", evaluate=False
        )
        recipe = recipe.replace("quantization", schemes=[{"lm_head": "FLOAT"}, {"*": word}])
        return [layer["error"] for layer in msquant.quantize(recipe, tmp_path / algo).layers]

    for ours, nearest in zip(errors(algo), errors("rtn"), strict=True):
        assert ours < 0.9 * nearest
