"""Counts of the evaluation's work agree with what the code does."""

from pathlib import Path
from typing import Any

import pytest

from msquant.algorithms import make_algorithm
from msquant.calibration.evaluation import evaluation_domains
from msquant.checkpoint.float_rows import FloatRows
from msquant.comparison import builtin_texts, score_folders
from msquant.evaluation import lockstep
from msquant.evaluation.settings import EvaluationSettings
from msquant.hub.published import published_config
from msquant.models.config_json import parse_config
from msquant.models.layers import DecoderLayer
from msquant.planning import evaluation_costs as costs
from msquant.planning.blocks import LayerBlocks
from msquant.planning.work import Work
from msquant.recipes import find_recipe
from msquant.source import open_source
from tests.fixtures.tiny_families import write_tiny


def test_the_sizes_are_those_of_the_evaluation() -> None:
    assert len(evaluation_domains()) == costs.TEXTS
    for name in ("BATCH_TOKENS", "WIDE_BATCH_TOKENS", "WIDE", "OWN_TOKENS"):
        assert getattr(costs, name) == getattr(lockstep, name)


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
def test_two_models_are_read_and_computed_as_often_as_is_counted(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny(tmp_path / "model", model_type, dtype="bfloat16")
    source = open_source(str(folder))
    config = source.config
    settings = EvaluationSettings(sequences=2, sequence_length=48)
    tokens = costs.EvaluationTokens.of(settings, config)
    read = passes = computed = 0
    read_rows, run = FloatRows._read, DecoderLayer.run

    def counted_read(rows: FloatRows, ranges: Any) -> Any:
        nonlocal read
        values = read_rows(rows, ranges)
        read += values.size * rows._dtype.itemsize if rows._name.startswith("model.layers.") else 0
        return values

    def counted_run(layer: DecoderLayer, state: Any, *args: Any, **keywords: Any) -> Any:
        nonlocal passes, computed
        if "start" not in keywords:
            passes += 1
            computed += len(state[0])
        return run(layer, state, *args, **keywords)

    monkeypatch.setattr(FloatRows, "_read", counted_read)
    monkeypatch.setattr(DecoderLayer, "run", counted_run)

    # Twice the float model: what is read of the second stands for the bytes that were written.
    score_folders([folder, folder], builtin_texts(folder, 2, 48), "cpu")

    total, layers = Work(), config.num_hidden_layers
    for index in range(layers):
        stored = {name: source.checkpoint.nbytes(name) for name in config.layer_shapes(index)}
        blocks = LayerBlocks(config, make_algorithm(), index)
        total += costs.evaluation_work(blocks, tokens, stored, sum(stored.values()))
    assert read == pytest.approx(total.read, rel=0.001)
    assert passes == layers * tokens.passes
    assert computed == layers * (2 * tokens.count + tokens.own)


def test_a_layer_and_the_head_by_hand() -> None:
    config = parse_config(published_config("llama-3.1-8b") or {})
    blocks = LayerBlocks(config, find_recipe("llama-3.1-8b").quantization, 0)
    tokens = costs.EvaluationTokens.of(EvaluationSettings(), config)
    assert (tokens.count, tokens.own, tokens.batch) == (4 * 256, 4 * 128, 2)
    names = config.layer_shapes(0)
    work = costs.evaluation_work(blocks, tokens, dict.fromkeys(names, 10), 7)
    weights = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert work.read == 10 * len(names) + 7
    assert work.products == 2 * (2 * 1024 + 512) * weights
    assert work.streamed == 4 * 3 * weights
    head = costs.head_work(config, tokens, 5)
    assert head.read == 10
    assert head.products == 2 * 2 * 1024 * 128256 * 4096


def test_a_token_meets_few_experts_and_all_are_read() -> None:
    config = parse_config(published_config("deepseek-r1") or {})
    blocks = LayerBlocks(config, find_recipe("deepseek-r1").quantization, 3)
    tokens = costs.EvaluationTokens.of(EvaluationSettings(), config)
    work = costs.evaluation_work(blocks, tokens, {}, 0)
    expert = 3 * 7168 * 2048
    assert work.converted > 2 * 256 * expert
    assert work.products < 2 * (2 * tokens.count + tokens.own) * 2 * (8 + 1) * expert


def test_nothing_is_counted_where_nothing_is_evaluated() -> None:
    config = parse_config(published_config("llama-3.1-8b") or {})
    tokens = costs.EvaluationTokens.of(EvaluationSettings(sequences=0), config)
    blocks = LayerBlocks(config, make_algorithm(), 0)
    assert costs.evaluation_work(blocks, tokens, {"a": 1}, 1) == costs.head_work(config, tokens, 1) == Work()
