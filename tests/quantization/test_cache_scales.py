"""The scales of an int8 cache: its search against torch, golden-stick's rounding, and models that use it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mindspore import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.weights import CacheScale, with_cache
from msquant.errors import CalibrationError
from msquant.flows.engines import open_weights
from msquant.flows.pipeline import quantize
from msquant.formats.summary import summarize
from msquant.inference.cpu.cpu_model import CpuModel
from msquant.models.config_json import read_config
from msquant.models.device import use_device
from msquant.models.layers import DecoderLayer
from msquant.models.network import CausalLM
from msquant.models.positions import positions
from msquant.quantization.cache_scales import AttentionSample, CacheSearch, pair_turns, turned_bounds
from msquant.recipe.recipe import find_recipe
from tests.fixtures.tiny_families import write_tiny
from tests.fixtures.tiny_model import VOCABULARY_SIZE

S, T, GROUPS, HEADS, D, H = 4, 24, 2, 6, 8, 20
TYPICAL = np.ones(GROUPS * D, np.float32)
SCALE = D**-0.5
# The slowest pair does not come half round.
TURNS, LAST = np.array([1, 0.2, 0.04, 0.008]), 200
TOKENS = np.random.default_rng(3).integers(0, VOCABULARY_SIZE, (2, 40))


def samples(seed: int = 0) -> list[AttentionSample]:
    random = np.random.default_rng(seed)
    width = np.geomspace(0.1, 5, GROUPS * D).reshape(GROUPS, 1, D)
    places = np.arange(1, T, 3)
    return [
        AttentionSample(
            queries=random.normal(size=(HEADS, len(places), D)).astype(np.float32),
            places=places,
            keys=(random.standard_t(4, size=(GROUPS, T, D)) * width).astype(np.float32),
            values=(random.standard_t(4, size=(GROUPS, T, D)) * width).astype(np.float32),
            residual=random.normal(size=(len(places), H)).astype(np.float32),
        )
        for _ in range(S)
    ]


def search(given: list[AttentionSample]) -> CacheSearch:
    random = np.random.default_rng(9)
    output = random.normal(size=(H, HEADS * D)).astype(np.float32)
    typical = [random.uniform(0.5, 2, GROUPS * D).astype(np.float32) for _ in range(2)]
    return CacheSearch(given, output, SCALE, (typical[0], typical[1]), TURNS, LAST)


def torch_loss(
    found: CacheSearch, given: list[AttentionSample], name: str, floor: float, factor: float
) -> float:
    """The definition in cache_scales.py, written down once more in float64."""
    kind = found.keys if name == "keys" else found.values
    typical = torch.tensor(kind.typical, dtype=torch.float64)
    bounds = []
    for sample in given:
        if name == "keys":
            keys = torch.tensor(sample.keys, dtype=torch.float64)
            pairs = torch.complex(keys[..., : D // 2], keys[..., D // 2 :])
            # Every key at many places between the first position and the last.
            places = (
                torch.linspace(0, LAST, 20_001, dtype=torch.float64)[:, None, None] - torch.arange(T)[:, None]
            )
            turned = torch.polar(torch.ones(()).double(), places * torch.tensor(TURNS))
            both = [pairs[group] * turned for group in range(GROUPS)]
            reached = torch.cat([torch.cat([z.real, z.imag], -1).flatten(0, 1) for z in both], -1)
            bounds.append(torch.stack([reached.amin(0), reached.amax(0)]))
        else:
            reached = torch.tensor(sample.values, dtype=torch.float64).abs().amax(1).reshape(-1)
            bounds.append(torch.stack([-reached, reached]))
    total = tokens = 0.0
    for number, sample in enumerate(given):
        others = torch.stack([b for i, b in enumerate(bounds) if i % 2 != number % 2])
        low, high = others[:, 0].amin(0), others[:, 1].amax(0)
        middle, half = (low + high) / 2, (high - low) / 2
        if floor:
            half = torch.maximum(half, torch.quantile(half / typical, floor) * typical)
        half = torch.maximum(factor * half, (middle.abs() + factor * half) / 4)
        step = (half / 127).reshape(GROUPS, 1, D)
        moved = torch.round(-middle.reshape(step.shape) / step)
        queries, keys, values = (
            torch.tensor(part, dtype=torch.float64) for part in (sample.queries, sample.keys, sample.values)
        )

        def attention(keys: Any, values: Any, queries: Any = queries, sample: Any = sample) -> Any:
            keys, values = (part.repeat_interleave(HEADS // GROUPS, 0) for part in (keys, values))
            scores = queries @ keys.transpose(1, 2) * SCALE
            later = torch.arange(T) > torch.tensor(sample.places)[:, None]
            mixed = scores.masked_fill(later, -torch.inf).softmax(-1) @ values
            return (
                mixed.transpose(0, 1).reshape(len(sample.places), -1) @ torch.tensor(found._output).double().T
            )

        exact = attention(keys, values)
        rounded = [
            (torch.clamp(torch.round(part / step + moved), -128, 127) - moved) * step
            if name == which
            else part
            for which, part in (("keys", keys), ("values", values))
        ]
        read = exact + torch.tensor(sample.residual)
        error = attention(*rounded) - exact
        total += float((error.square().sum(1) / read.square().sum(1)).sum())
        tokens += len(error)
    return total / tokens


@pytest.mark.parametrize("name", ["keys", "values"])
@pytest.mark.parametrize(("floor", "factor"), [(0.0, 1.0), (0.75, 1.0), (0.5, 0.8)])
def test_the_loss_is_that_of_its_definition(name: str, floor: float, factor: float) -> None:
    given = samples()
    found = search(given)
    kind = found.keys if name == "keys" else found.values
    expected = torch_loss(found, given, name, floor, factor)
    # A value that lies half way between two integers may go either way.
    assert found.loss(kind, floor, factor) == pytest.approx(expected, rel=2e-3)


def test_the_best_candidate_wins() -> None:
    found = search(samples())
    for kind in (found.keys, found.values):
        cache, report = found.best(kind)
        assert report.name == kind.name
        assert report.loss == found.loss(kind, report.range_floor, report.factor)
        assert report.loss <= min(found.loss(kind, report.range_floor, factor) for factor in (0.7, 1.0, 1.5))
        assert cache.scale.shape == (GROUPS * D,)
        assert (cache.scale > 0).all()
        assert (cache.offset is None) == (kind is found.values)


def test_keys_do_not_leave_their_range_at_any_position() -> None:
    """What rotates within a pair stays within what was measured, however far it goes."""
    given = samples()
    found = search(given)
    cache = found.keys.scale(np.arange(S), 0.0, 1.0)
    assert cache.offset is not None
    scale, offset = (part.reshape(GROUPS, 1, D) for part in (cache.scale, cache.offset))
    for position in range(LAST + 1):
        angle = (position - np.arange(T))[:, None] * TURNS
        for sample in given:
            a, b = np.split(sample.keys, 2, axis=2)
            turned = np.concatenate(
                [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=2
            )
            assert (np.abs(turned / scale + offset) <= 127.501).all()


def test_channels_that_are_not_rotated_keep_their_own_range() -> None:
    """GLM-4.5 rotates the first half of a head's channels: pairs lie within that half."""
    keys = samples()[0].keys
    found = turned_bounds(keys, TURNS[:2], LAST).reshape(2, GROUPS, D)
    np.testing.assert_array_equal(found[0, :, 4:], keys[..., 4:].min(axis=1))
    np.testing.assert_array_equal(found[1, :, 4:], keys[..., 4:].max(axis=1))
    alone = turned_bounds(keys[..., :4], TURNS[:2], LAST).reshape(2, GROUPS, 4)
    np.testing.assert_array_equal(found[:, :, :4], alone)


def test_keys_far_from_zero_use_all_integers_and_no_softmax_sees_that_they_are_moved() -> None:
    """As the slow pairs of large models are: far to one side, and hardly turning."""
    random = np.random.default_rng(2)
    given = samples()
    for sample in given:
        sample.keys[:] = random.normal(size=sample.keys.shape)
        sample.keys[..., 3] += 12
    found = search(given)
    cache = found.keys.scale(np.arange(S), 0.0, 1.0)
    assert cache.offset is not None
    centred = 2 * np.abs(np.stack([sample.keys for sample in given])).max(axis=(0, 2)).reshape(-1) / 254
    loud = np.arange(3, GROUPS * D, D)
    assert (cache.scale[loud] < 0.75 * centred[loud]).all()
    sample = given[0]
    moved = cache.scale * cache.offset
    exact = sample.weights(sample.keys, SCALE)
    np.testing.assert_allclose(
        sample.weights(sample.keys + moved.reshape(GROUPS, 1, D), SCALE), exact, atol=1e-5
    )


def test_a_range_is_not_finer_than_the_engine_can_tell_apart() -> None:
    given = samples()
    for sample in given:
        # Neither pair turns.
        sample.keys[..., 1] = 100 + 0.01 * sample.keys[..., 1]
    found = CacheSearch(
        given, np.ones((H, HEADS * D), np.float32), SCALE, (TYPICAL, TYPICAL), 0 * TURNS, LAST
    )
    cache = found.keys.scale(np.arange(S), 0.0, 1.0)
    assert cache.scale[1] == pytest.approx(25 / 127, rel=0.02)
    assert cache.offset is not None
    assert np.abs(cache.offset).max() <= 512


@pytest.mark.parametrize("family", ["glm4_moe", "qwen3"])
def test_keys_of_a_family_stay_within_the_ranges_of_their_first_position(family: str, tmp_path: Path) -> None:
    """By the model's own rotation, at every position that it has."""
    source = write_tiny(tmp_path / "model", family)
    config, device = read_config(source), use_device("cpu")
    layer = DecoderLayer(config, open_weights(source), 0, device, part="attention")
    last = 500
    x = np.random.default_rng(0).normal(size=(1, config.hidden_size)).astype(np.float32)
    rows = Tensor(np.repeat(x, last + 1, axis=0))
    keys = layer.mixer_block.project(rows, 1, positions(config, last + 1, device))[1].asnumpy()[0]
    low, high = turned_bounds(keys[:, :1], pair_turns(config), last).reshape(2, len(keys), 1, -1)
    assert (keys <= high + 1e-3).all()
    assert (keys >= low - 1e-3).all()
    assert (np.abs(keys).max(axis=1) > 1.1 * np.abs(keys[:, 0])).any()


def test_a_quiet_channel_has_a_floor_and_one_of_zeros_a_scale() -> None:
    given = samples()
    for sample in given:
        sample.values[0, :, 3] = 0
    found = search(given)
    bare, floored = (found.values.scale(np.arange(S), floor, 1.0).scale for floor in (0.0, 0.5))
    assert bare[3] == 1
    assert 0 < floored[3] < 1
    assert (floored >= np.where(np.arange(GROUPS * D) == 3, 0, bare)).all()


def test_a_search_that_finds_nothing_finite_is_an_error() -> None:
    given = samples()
    given[0].values[:] = np.nan
    found = search(given)
    with pytest.raises(CalibrationError, match="no scale of the cached values gives a finite error"):
        found.best(found.values)


def test_rounding_is_golden_sticks() -> None:
    """By the function that its own cells of a key-value cache call, whose cells run on an NPU alone."""
    import mindspore as ms
    from mindspore import ops

    from msquant.kernels import golden_stick

    golden_stick.load()
    from mindspore_gs.ptq.basic_functions.basic_quant_func import quant_tensor

    keys = (np.random.default_rng(1).standard_t(3, (64, 12)) * np.geomspace(0.01, 9, 12)).astype(np.float32)
    scale, offset, kept = quant_tensor(
        ms.Tensor(keys), ops.min, ops.max, False, True, False, 0, ms.int8, 1, True
    )
    assert not np.asarray(offset).any()
    scale = np.asarray(scale, np.float32).reshape(-1)
    # Its steps are the range over 255, msquant's over 254: no integer is -128.
    np.testing.assert_allclose(scale, np.abs(keys).max(axis=0) / 127.5, rtol=1e-6)
    cache = CacheScale.of(scale)
    expected = kept.asnumpy().astype(np.float32) * scale
    away = np.abs(cache.rounded(keys) - expected) / scale
    # Ties alone may go another way, because msquant multiplies by a reciprocal as the server does.
    assert np.count_nonzero(away > 1e-3) <= 2


class Cached:
    """A source with scales of a cache for its keys and values."""

    def __init__(self, source: Any, scales: dict[str, CacheScale]) -> None:
        self._source, self._scales = source, scales

    def __contains__(self, name: str) -> bool:
        return name in self._source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def linear(self, module: str) -> Any:
        return with_cache(self._source.linear(module), self._scales.get(module))


class RoundedCache(DynamicCache):
    """transformers' cache, which gives back what int8 holds of keys and values."""

    scales: dict[str, CacheScale]

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **options: Any) -> Any:
        made = []
        for states, part in ((key_states, "k"), (value_states, "v")):
            scales = self.scales[f"model.layers.{layer_idx}.self_attn.{part}_proj"]
            moved = np.zeros_like(scales.scale) if scales.offset is None else scales.offset
            step, offset = (
                torch.from_numpy(each).reshape(1, states.shape[1], 1, -1) for each in (scales.scale, moved)
            )
            # Taken off again here, as no engine does.
            made.append((torch.clamp(torch.round(states / step + offset), -128, 127) - offset) * step)
        return super().update(made[0], made[1], layer_idx, *args, **options)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Cached]:
    """A float model and coarse scales: what they change is far above the tolerance."""
    folder = write_tiny(tmp_path_factory.mktemp("model") / "qwen3", "qwen3")
    random = np.random.default_rng(0)
    names = [f"model.layers.{i}.self_attn.{part}_proj" for i in range(2) for part in "kv"]
    scales = {
        name: CacheScale.of(
            random.uniform(0.05, 0.2, 64).astype(np.float32),
            offset=random.integers(-60, 60, 64).astype(np.float32) if name.endswith("k_proj") else None,
        )
        for name in names
    }
    return folder, Cached(Checkpoint.open(folder), scales)


def test_both_engines_compute_what_transformers_does_with_such_a_cache(cached: tuple[Path, Cached]) -> None:
    folder, source = cached
    dtype = use_device("cpu")
    config = read_config(folder)
    cells = CausalLM(config, source, dtype).logits(TOKENS)
    plain = CausalLM(config, Checkpoint.open(folder), dtype).logits(TOKENS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    for row, tokens in enumerate(TOKENS):
        cache = RoundedCache()
        cache.scales = source._scales
        with torch.inference_mode():
            expected = model(torch.tensor(tokens[None]), past_key_values=cache).logits[0].numpy()
        spread = np.sqrt((expected**2).mean())
        changed = np.sqrt(((plain[row] - expected) ** 2).mean()) / spread
        # A tie that goes another way is one step of a channel.
        for found in (cells[row], _decoded(CpuModel(config, source), tokens)):
            away = np.sqrt(((found - expected) ** 2).mean()) / spread
            assert away < 2e-3 < 0.1 * changed


def _decoded(model: CpuModel, tokens: Any) -> Any:
    """A prompt in pieces and token by token: a cache that is read is the same as one that is filled."""
    cache, rows, past = model.new_cache(), [], 0
    for step in (7, 12, *[1] * (len(tokens) - 19)):
        rows.append(model.logits(cache, tokens[past : past + step].tolist(), step))
        past += step
    return np.concatenate(rows)


def test_a_recipe_makes_a_valid_folder_that_says_what_was_chosen(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "qwen2", "qwen2", dtype="bfloat16", num_attention_heads=2)
    recipe = find_recipe(str(source)).adjusted(
        algo="rtn",
        scheme="W8A8_DYNAMIC",
        cache="int8",
        formats="ascend",
        samples=4,
        sequence_length=32,
        evaluate=False,
    )
    result = quantize(recipe, tmp_path / "out")
    assert summarize(result.folder).findings == []
    layers = read_json(result.folder / "msquant.json")["layers"]
    for layer in layers:
        assert [chosen["name"] for chosen in layer["cache"]] == ["keys", "values"]
        assert all(0 < chosen["loss"] < 1e-2 for chosen in layer["cache"])
    linear = open_weights(result.folder).linear("model.layers.1.self_attn.k_proj")
    assert linear.cache is not None
    assert linear.cache.scale.shape == (64,)
