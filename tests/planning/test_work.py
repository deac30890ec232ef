"""Counts of work, by hand."""

from msquant.hub.published import published_config
from msquant.models.config_json import parse_config
from msquant.planning.blocks import LayerBlocks, Tokens
from msquant.planning.work import Work, feed_forward_rounds, layer_work
from msquant.recipe.recipe import find_recipe


def blocks(name: str, index: int) -> LayerBlocks:
    return LayerBlocks(parse_config(published_config(name) or {}), find_recipe(name).quantization, index)


def test_a_dense_layer_that_is_quantized_as_a_whole() -> None:
    weights = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    together, apart = layer_work(blocks("llama-3.1-8b", 0), 100)
    assert together == Work(1, weights, 100 * weights)
    assert apart == Work(0, 0, 0)


def test_a_token_meets_few_experts_and_all_are_handled() -> None:
    attention = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
    expert = 3 * 7168 * 2048
    together, apart = layer_work(blocks("deepseek-r1", 3), 10)
    assert together == Work(1, attention, 10 * attention)
    assert apart == Work(257, 257 * expert, 10 * (8 + 1) * expert)
    # Read three times more to be computed, and once to be quantized.
    assert layer_work(blocks("deepseek-r1", 3), 10, rounds=3)[1].weights == 2 * 257 * expert
    assert together + apart == Work(258, attention + 257 * expert, 10 * (attention + 9 * expert))


def test_experts_are_read_for_as_many_tokens_as_memory_holds() -> None:
    config, tokens = parse_config(published_config("deepseek-r1") or {}), Tokens(32, 512, 1)
    assert feed_forward_rounds(config, tokens, 1 << 40) == 1
    batch = 3 * 4 * 512 * 7168
    assert feed_forward_rounds(config, tokens, 8 * batch) == 4
    assert feed_forward_rounds(config, tokens, 1) == 32
    assert (Tokens(5, 128, 4).batches, Tokens(5, 128, 4).first) == (2, 512)
