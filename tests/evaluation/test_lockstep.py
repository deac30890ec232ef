"""Models side by side against an independent simulation on torch."""

import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.hidden_states import HiddenStateStore
from msquant.errors import CalibrationError, ModelError, MsquantError
from msquant.evaluation import lockstep
from msquant.evaluation.domain_scores import LayerScore, ModelScore
from msquant.evaluation.inputs import Model, Text
from msquant.evaluation.lockstep import evaluate
from msquant.flows.engines import open_weights
from msquant.models.config_json import parse_config, read_config
from msquant.models.device import use_device
from tests.evaluation.folders import DEINTERLEAVED, POLICIES, write_both
from tests.fixtures import torch_simulation
from tests.fixtures.tiny_model import write_tiny_llama


@pytest.fixture(scope="module")
def dtype() -> Any:
    return use_device("cpu")


@pytest.fixture(scope="module")
def texts() -> list[Text]:
    return random_texts(0)


# Where an activation lies halfway between two integers, another summation order rounds it the other way, and
# in a random DeepSeek-V3 such a token may go to another expert. In the tokens of this seed there is none.
SEED = 0


def random_texts(seed: int) -> list[Text]:
    """Two texts of different lengths, in an odd number of sequences."""
    rng = np.random.default_rng(seed)
    shapes = {"long": (3, 40), "short": (1, 24)}
    return [Text(name, rng.integers(0, 512, shape).astype(np.int32)) for name, shape in shapes.items()]


def opened(folder: Path) -> Model:
    return Model(str(folder), read_config(folder), open_weights(folder))


def scored(
    models: list[Model], texts: list[Text], dtype: Any, folder: Path, budget: int = 10**9
) -> list[ModelScore]:
    return evaluate(models, texts, dtype, HiddenStateStore(folder, budget))


@pytest.mark.parametrize("family", POLICIES)
def test_scores_are_those_of_the_torch_simulation(
    family: str, dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    source, folder = write_both(tmp_path, family)
    texts = random_texts(SEED)
    # So small that everything comes in parts: batches, the experts' tokens, the vocabulary, the head's rows.
    small = {"BATCH_TOKENS": 80, "EXPERT_BYTES": 80_000, "LOGIT_ROWS": 30, "LOGIT_BYTES": 8 * 30 * 100}
    for name, value in small.items():
        monkeypatch.setattr(lockstep, name, value)
    floating, quantized = scored([opened(source), opened(folder)], texts, dtype, tmp_path / "s", budget=0)

    simulation = torch_simulation.load_simulation(folder, deinterleaved_rope=family in DEINTERLEAVED)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for text, ours, baseline in zip(texts, quantized.texts, floating.texts, strict=True):
        expected = torch_simulation.perplexity(simulation, text.tokens)
        assert ours.perplexity == pytest.approx(expected, rel=1e-3)
        assert baseline.perplexity == pytest.approx(torch_simulation.perplexity(model, text.tokens), rel=1e-4)
        assert ours.baseline_perplexity == baseline.perplexity
        divergence = torch_simulation.kl_divergence(simulation, model, text.tokens)
        assert ours.kl == pytest.approx(divergence, rel=1e-3)
        error = torch_simulation.relative_mse(simulation, model, text.tokens)
        assert ours.logit_error == pytest.approx(error, rel=1e-3)
    logs = [math.log(score.perplexity) for score in quantized.texts]
    predicted = [text.tokens.size - len(text.tokens) for text in texts]
    assert math.log(quantized.overall.perplexity) == pytest.approx(np.average(logs, weights=predicted))
    assert quantized.overall.tokens == 144
    assert [layer.index for layer in quantized.layers] == [0, 1]


def test_noise_of_layers_is_that_of_their_outputs_in_torch(
    dtype: Any, texts: list[Text], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states of transformers' own run of both; the first layer's inputs are the same in both."""
    import torch
    from transformers import AutoModelForCausalLM

    source, folder = write_both(tmp_path, "llama")
    text = texts[:1]
    monkeypatch.setattr(lockstep, "OWN_TOKENS", text[0].tokens.shape[1])
    seen: list[tuple[int, list[LayerScore]]] = []
    models = [opened(source), opened(folder), opened(source)]
    store = HiddenStateStore(tmp_path / "s", 10**9)
    _, quantized, same = evaluate(models, text, dtype, store, lambda i, layers: seen.append((i, layers)))

    simulation = torch_simulation.load_simulation(folder)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    ids = torch.as_tensor(text[0].tokens, dtype=torch.int64)
    with torch.inference_mode():
        ours, expected = (m(ids, output_hidden_states=True).hidden_states[1] for m in (simulation, model))
    noise = ((ours - expected).square().sum(-1) / expected.square().sum(-1)).double()
    first = quantized.layers[0]
    assert first.snr == pytest.approx(-10 * math.log10(noise.mean()), abs=0.05)
    assert first.own_snr == pytest.approx(-10 * math.log10(noise[0].mean()), abs=0.05)
    assert [index for index, _ in seen] == [0, 1]
    assert seen[1][1][0] == quantized.layers[1]
    assert quantized.layers[1].own_snr > quantized.layers[1].snr
    assert same.overall.kl == pytest.approx(0, abs=1e-12)
    assert same.overall.top1 == same.overall.top5 == 1
    # A layer's own noise is computed on fewer rows, which some processors sum in another order.
    assert [(layer.index, layer.snr) for layer in same.layers] == [(0, None), (1, None)]
    assert all(layer.own_snr is None or layer.own_snr > 120 for layer in same.layers)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_alone_has_a_perplexity(tied: bool, dtype: Any, texts: list[Text], tmp_path: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    folder = write_tiny_llama(tmp_path / "model", tie_word_embeddings=tied)
    (score,) = scored([opened(folder)], texts, dtype, tmp_path / "s")
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for text, found in zip(texts, score.texts, strict=True):
        expected = torch_simulation.perplexity(reference, text.tokens)
        assert found.perplexity == pytest.approx(expected, rel=1e-4)
        assert found.kl is None
    assert score.layers == ()


def test_memory_does_not_grow_with_layers(dtype: Any, texts: list[Text], tmp_path: Path) -> None:
    """Weights are read through NumPy, which tracemalloc sees: six times the layers, the same peak."""

    def peak(layers: int) -> int:
        folder = write_tiny_llama(
            tmp_path / str(layers), layers=layers, hidden_size=128, intermediate_size=1024
        )
        tracemalloc.start()
        try:
            models = [opened(folder), opened(folder)]
            scored(models, texts[1:], dtype, tmp_path / f"s{layers}", budget=0)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1)
    layer_bytes = 4 * 3 * 128 * 1024
    assert peak(12) - peak(2) < layer_bytes


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (np.zeros((0, 8), np.int32), r"\[0, 8\]"),
        (np.zeros((2, 1), np.int32), r"\[2, 1\]"),
        (np.zeros(8, np.int32), r"\[8\]"),
        (np.full((1, 4), 512, np.int32), "512 is outside"),
        (np.full((1, 4), -1, np.int32), "-1 is outside"),
        (np.zeros((1, 257), np.int32), "257 tokens are longer"),
    ],
)
def test_unusable_tokens(tiny_llama: Path, dtype: Any, bad: np.ndarray, what: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=what):
        scored([opened(tiny_llama)], [Text("bad", bad)], dtype, tmp_path / "s")


class Scaled(Checkpoint):
    """Multiplies one tensor."""

    scaled, factor = "", 1.0

    def tensor(self, name: str) -> Any:
        values = super().tensor(name).astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            return (values * (self.factor if name == self.scaled else 1)).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("model.norm.weight", 3e38),
        # Finite logits of which the perplexity is beyond float64.
        ("model.norm.weight", 1e6),
        ("model.norm.weight", np.nan),
        ("model.layers.1.input_layernorm.weight", np.nan),
    ],
)
def test_a_model_that_computes_nothing_finite_is_named(
    tiny_llama: Path, dtype: Any, texts: list[Text], name: str, factor: float, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    source = Scaled(checkpoint.folder, checkpoint.shards, checkpoint.weight_map)
    source.scaled, source.factor = name, factor
    models = [opened(tiny_llama), Model("the broken one", read_config(tiny_llama), source)]
    with pytest.raises(MsquantError, match="NaN or infinity") as caught:
        scored(models, texts, dtype, tmp_path / "s")
    assert caught.value.where == "the broken one"
    if "layers" in name:
        assert "model.layers.1 " in str(caught.value)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"vocab_size": 500}, "vocab_size is 500, but 512 in"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, but 2"),
        ({"rope_theta": 5.0}, "rope_theta is 5.0"),
        ({"model_type": "mistral"}, "family is mistral, but llama"),
    ],
)
def test_another_architecture_is_refused(
    tiny_llama: Path, dtype: Any, texts: list[Text], tmp_path: Path, change: dict[str, Any], what: str
) -> None:
    source = opened(tiny_llama)
    other = parse_config(source.config.raw | change)
    with pytest.raises(ModelError, match=what) as caught:
        scored([source, Model("other", other, source.source)], texts, dtype, tmp_path / "s")
    assert "--baseline" in str(caught.value)
