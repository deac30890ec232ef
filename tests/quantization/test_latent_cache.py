"""The scale of latent attention's int8 cache: its search against torch, and models that use it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.weights import CacheScale, FloatLinear, with_cache
from msquant.errors import CalibrationError, RecipeError
from msquant.flows.engines import open_weights
from msquant.flows.pipeline import quantize
from msquant.formats.summary import summarize
from msquant.inference.cpu.cpu_model import CpuModel
from msquant.models.config_json import read_config
from msquant.models.device import use_device
from msquant.models.network import CausalLM
from msquant.quantization.cache_scales import AttentionSample
from msquant.quantization.latent_cache import LatentCacheSearch
from msquant.recipe.recipe import find_recipe
from tests.fixtures.tiny_families import write_tiny
from tests.fixtures.tiny_model import VOCABULARY_SIZE
from tests.quantization.test_cache_scales import Cached, _decoded

S, T, HEADS, RANK, ROPE, V, H = 4, 24, 3, 8, 4, 5, 20
SCALE = 0.2
TOKENS = np.random.default_rng(3).integers(0, VOCABULARY_SIZE, (2, 40))
# What vllm-ascend's cache is laid out in.
SIZES = {"kv_lora_rank": 32, "qk_rope_head_dim": 16}


def samples(seed: int = 0) -> list[AttentionSample]:
    random = np.random.default_rng(seed)
    width = np.geomspace(0.05, 5, RANK)
    places = np.arange(1, T, 3)
    made = []
    for _ in range(S):
        latent = (random.standard_t(4, size=(1, T, RANK)) * width).astype(np.float32)
        rotated = random.normal(size=(1, T, ROPE)).astype(np.float32)
        made.append(
            AttentionSample(
                queries=random.normal(size=(HEADS, len(places), RANK + ROPE)).astype(np.float32),
                places=places,
                keys=np.concatenate([latent, rotated], axis=2),
                values=latent,
                residual=random.normal(size=(len(places), H)).astype(np.float32),
            )
        )
    return made


def search(given: list[AttentionSample]) -> LatentCacheSearch:
    random = np.random.default_rng(9)
    up = random.normal(size=(HEADS, V, RANK)).astype(np.float32)
    output = random.normal(size=(H, HEADS * V)).astype(np.float32)
    return LatentCacheSearch(given, up, output, SCALE, random.uniform(0.5, 2, RANK).astype(np.float32))


def torch_loss(
    found: LatentCacheSearch, given: list[AttentionSample], alpha: float, floor: float, factor: float
) -> float:
    """The definition in latent_cache.py, written down once more in float64."""
    up, output, typical = (
        torch.tensor(part, dtype=torch.float64) for part in (found._up, found._output, found._typical)
    )
    ranges = [torch.tensor(sample.values[0]).double().abs().amax(0) for sample in given]
    total = tokens = 0.0
    for number, sample in enumerate(given):
        maxima = torch.stack([r for i, r in enumerate(ranges) if i % 2 != number % 2]).amax(0)
        if floor:
            maxima = torch.maximum(maxima, torch.quantile(maxima / typical, floor) * typical)
        away = maxima.log2() - maxima.log2().quantile(0.5)
        powers = 2 ** torch.round(alpha * away).clamp(-8, 8)
        step = factor * (maxima / powers).max() / 127
        latent, rotated, queries = (
            torch.tensor(part, dtype=torch.float64)
            for part in (sample.values[0], sample.keys[0][:, RANK:], sample.queries)
        )

        def attention(
            kept: Any, turned: Any, rotated: Any = rotated, queries: Any = queries, sample: Any = sample
        ) -> Any:
            scores = (turned @ kept.T + queries[..., RANK:] @ rotated.T) * SCALE
            later = torch.arange(T) > torch.tensor(sample.places)[:, None]
            mixed = scores.masked_fill(later, -torch.inf).softmax(-1) @ kept
            return torch.einsum("hnr,hvr->nhv", mixed, up).reshape(len(sample.places), -1) @ output.T

        exact = attention(latent, queries[..., :RANK])
        kept = torch.clamp(torch.round(latent / powers / step), -128, 127) * step
        turned = queries[..., :RANK] * powers
        size = turned.abs().amax(-1, keepdim=True) / 127
        error = attention(kept * powers, torch.round(turned / size) * size / powers) - exact
        read = exact + torch.tensor(sample.residual)
        total += float((error.square().sum(1) / read.square().sum(1)).sum())
        tokens += len(error)
    return total / tokens


@pytest.mark.parametrize(
    ("alpha", "floor", "factor"), [(0.0, 0.0, 1.0), (1.0, 0.5, 1.0), (0.5, 0.75, 0.7), (0.75, 0.25, 1.25)]
)
def test_the_loss_is_that_of_its_definition(alpha: float, floor: float, factor: float) -> None:
    given = samples()
    found = search(given)
    expected = torch_loss(found, given, alpha, floor, factor)
    # A value that lies half way between two integers may go either way.
    assert found.loss(alpha, floor, factor) == pytest.approx(expected, rel=5e-3)


def test_the_best_candidate_wins_and_channels_are_made_alike() -> None:
    found = search(samples())
    (powers, scale), report = found.best()
    assert report.name == "latent"
    assert report.alpha is not None
    assert report.loss == found.loss(report.alpha, report.range_floor, report.factor)
    assert report.loss < 0.5 * min(found.loss(0.0, floor, 1.0) for floor in (0.0, 0.5))
    np.testing.assert_array_equal(np.log2(powers), np.rint(np.log2(powers)))
    assert powers[-1] > powers[0]
    assert scale > 0
    reached = max(np.abs(s.queries[:, :, :RANK] * powers).max() for s in samples())
    assert found.query_scales(powers).max() == pytest.approx(reached / 127)


def test_a_latent_state_of_zeros_has_a_scale_and_nothing_finite_is_an_error() -> None:
    still = [replace(s, values=0 * s.values, keys=0 * s.keys) for s in samples()]
    (powers, scale), _ = search(still).best()
    assert (powers == 1).all()
    assert scale == 1
    broken = samples()
    broken[0].values[:] = np.nan
    with pytest.raises(CalibrationError, match="cached latent state gives a finite error"):
        search(broken).best()


def _of_rounded_latent(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float, **_: Any
) -> Any:
    """Attention of transformers' queries to what an int8 cache holds of its latent state."""
    nope, rank, step = module.qk_nope_head_dim, module.kv_lora_rank, module.step
    weight = module.kv_b_proj.weight.view(module.num_heads, -1, rank)
    kept = torch.clamp(torch.round(module.latent / step), -128, 127) * step
    turned = torch.einsum("bhtn,hnr->bhtr", query[..., :nope], weight[:, :nope])
    size = turned.abs().amax(-1, keepdim=True) / 127
    turned = torch.round(turned / size) * size
    scores = torch.einsum("bhtr,bsr->bhts", turned, kept)
    scores = (scores + query[..., nope:] @ key[..., nope:].transpose(2, 3)) * scaling
    later = torch.ones(scores.shape[2:]).triu(1).bool()
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    mixed = torch.einsum("bhts,bsr,hvr->bthv", weights, kept, weight[:, nope:])
    return mixed, weights


@pytest.mark.parametrize("query_rank", [48, None])
def test_both_engines_compute_what_transformers_does_with_such_a_cache(
    tmp_path: Path, query_rank: int | None
) -> None:
    """Coarse scales, whose change is far above the tolerance."""
    folder = write_tiny(tmp_path / "m", "deepseek_v3", q_lora_rank=query_rank)
    config, dtype = read_config(folder), use_device("cpu")
    steps = [0.25, 0.2]
    heads = np.ones(config.num_attention_heads, np.float32)
    scales = {
        f"model.layers.{i}.self_attn.kv_a_proj_with_mqa": CacheScale.of(np.array([step], np.float32), heads)
        for i, step in enumerate(steps)
    }
    source: Any = Cached(Checkpoint.open(folder), scales)
    AttentionInterface.register("rounded-latent", _of_rounded_latent)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="rounded-latent"
    )
    for layer, step in zip(model.model.layers, steps, strict=True):
        attention = layer.self_attn
        attention.step = step
        attention.kv_a_layernorm.register_forward_hook(
            lambda norm, inputs, output, attention=attention: setattr(attention, "latent", output)
        )
    cells = CausalLM(config, source, dtype).logits(TOKENS)
    plain = CausalLM(config, Checkpoint.open(folder), dtype).logits(TOKENS)
    for row, tokens in enumerate(TOKENS):
        with torch.inference_mode():
            expected = model(torch.tensor(tokens[None]), use_cache=False).logits[0].numpy()
        spread = np.sqrt((expected**2).mean())
        changed = np.sqrt(((plain[row] - expected) ** 2).mean()) / spread
        for found in (cells[row], _decoded(CpuModel(config, source), tokens)):
            away = np.sqrt(((found - expected) ** 2).mean()) / spread
            assert away < 2e-3 < 0.1 * changed


def test_a_recipe_makes_a_valid_folder_that_says_what_was_chosen(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "m", "deepseek_v3", dtype="bfloat16", prediction_layers=1, **SIZES)
    recipe = find_recipe(str(source)).adjusted(
        algo="rtn", scheme="W8A8_DYNAMIC", formats="ascend", samples=4, sequence_length=32, evaluate=False
    )
    plain = open_weights(quantize(recipe, tmp_path / "plain").folder)
    result = quantize(recipe.adjusted(cache="int8"), tmp_path / "out")
    assert summarize(result.folder).findings == []
    for layer in read_json(result.folder / "msquant.json")["layers"]:
        (chosen,) = layer["cache"]
        assert chosen["name"] == "latent"
        assert 0 < chosen["loss"] < 1e-2
        assert 0 <= chosen["alpha"] <= 1
    weights = open_weights(result.folder)
    changed = False
    for index in range(2):
        block = f"model.layers.{index}.self_attn"
        down, up = (weights.linear(f"{block}.{part}") for part in ("kv_a_proj_with_mqa", "kv_b_proj"))
        assert down.cache is not None
        assert down.cache.scale.shape == (1,)
        assert down.cache.queries is not None
        before = plain.linear(f"{block}.kv_b_proj")
        assert isinstance(up, FloatLinear)
        assert isinstance(before, FloatLinear)
        norms = [source.tensor(f"{block}.kv_a_layernorm.weight") for source in (weights, plain)]
        # Powers of two go from the norm into the weight, and nothing is rounded.
        np.testing.assert_array_equal(up.weight * norms[0], before.weight * norms[1])
        changed = changed or bool((norms[0] != norms[1]).any())
        assert with_cache(down, None).scheme == plain.linear(f"{block}.kv_a_proj_with_mqa").scheme
    assert changed


def test_sparse_attention_and_static_inputs_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    options = {"cache": "int8", "samples": 2, "sequence_length": 16, "evaluate": False, "algo": "rtn"}
    for model_type, scheme, form, problem in (
        ("deepseek_v3", None, "ascend", "is W8A8: vllm-ascend fills an int8 latent cache with an operator"),
        ("deepseek_v2", "W8A8_DYNAMIC", "ascend", "from queries that are compressed"),
        ("deepseek_v32", "W8A8_DYNAMIC", "ascend", r"attention with an indexer \(index_topk\) by other code"),
        ("deepseek_v3", "W8A8_DYNAMIC", "compressed-tensors", "W8A8_DYNAMIC_C8, with an int8 key-value"),
    ):
        source = tmp_path / model_type
        if not source.exists():
            write_tiny(source, model_type, dtype="bfloat16", **SIZES)
        recipe = find_recipe(str(source)).adjusted(scheme=scheme, formats=form, **options)
        with pytest.raises(RecipeError, match=problem):
            quantize(recipe, tmp_path / "out")
        assert not (tmp_path / "out").exists()
