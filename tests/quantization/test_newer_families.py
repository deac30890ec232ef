"""GLM-4 to 5, Kimi-K2 and DeepSeek-V3.2 from a float model to folders: every format, resumed, described."""

import gc
import json
import tracemalloc
import weakref
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.writer import file_sha256
from msquant.errors import CalibrationError, EngineError, RecipeError
from msquant.flows.comparison import compare
from msquant.flows.conversion import open_quantized
from msquant.flows.generation import load_engine
from msquant.flows.pipeline import QuantizeResult, quantize
from msquant.formats.registry import folder_format
from msquant.inference.engine_protocol import Sampling
from msquant.models.layers import DecoderLayer
from msquant.planning.quantization_plan import make_plan
from msquant.progress import Progress
from msquant.recipe.recipe import Recipe, find_recipe
from tests.fixtures.tiny_families import write_tiny

SPARSE = ("deepseek_v32", "glm_moe_dsa")
KINDS = ("kimi_k2", *SPARSE, "glm4_moe")


def recipe_for(folder: Path, algo: str = "osl", **quantization: Any) -> Recipe:
    """The family's own, with few tokens."""
    recipe = find_recipe(str(folder)).adjusted(algo=algo, samples=4, sequence_length=24, evaluate=False)
    options = {"smooth_alpha": [0.5]} if algo == "osl" else {}
    return recipe.replace("quantization", **(options | quantization))


def digests(result: QuantizeResult) -> dict[str, str]:
    return {
        str(path.relative_to(folder.parent)): file_sha256(path)
        for folder in result.folders.values()
        for path in sorted(folder.iterdir())
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("algo", ["osl", "gptq"])
def test_every_format_is_written_and_an_interrupted_run_ends_with_equal_bytes(
    algo: str, kind: str, tmp_path: Path
) -> None:
    source = write_tiny(tmp_path / "source", kind, dtype="bfloat16", prediction_layers=1)
    recipe = recipe_for(source, algo).adjusted(formats="ascend,compressed-tensors")
    plan = make_plan(recipe, tmp_path / "whole" / "out")
    result = quantize(recipe, tmp_path / "whole" / "out", remember=False)
    stored = sum(path.stat().st_size for f in result.folders.values() for path in f.glob("*.safetensors"))
    assert plan.output_bytes == stored
    for folder in result.folders.values():
        form = folder_format(folder)
        assert form is not None
        assert form.validate(folder, verify_hashes=True) == []
        schemes = {str(scheme) for scheme in open_quantized(folder).linears.values()}
        # kv_b_proj stays in floating point where there is one.
        assert schemes == {"W8A8_DYNAMIC"} | ({"FLOAT"} if kind != "glm4_moe" else set())
    assert [layer["index"] for layer in result.layers] == [0, 1, 2]
    assert all(0 < layer["error"] < 0.02 for layer in result.layers)

    def interrupt(record: dict[str, Any]) -> None:
        if record["index"] == 1:
            raise KeyboardInterrupt

    again = tmp_path / "again" / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(recipe, again, progress=Progress(layer=interrupt), remember=False)
    seen: list[tuple[int, int]] = []
    progress = Progress(layers=lambda *counts: seen.append(counts))
    assert digests(quantize(recipe, again, progress=progress, remember=False)) == digests(result)
    assert seen == [(3, 2)]


@pytest.mark.parametrize(
    "kind",
    ["llama", "glm4", "glm4_moe", "deepseek_v3", "kimi_k2", "deepseek_v32", "glm_moe_dsa", "qwen3_next"],
)
def test_memory_does_not_grow_with_layers(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights go in and out through NumPy, which tracemalloc sees; of MindSpore's, layers are counted."""
    alive, most, begin = weakref.WeakSet[DecoderLayer](), [0], DecoderLayer.__init__

    def counted(layer: DecoderLayer, *arguments: Any, **options: Any) -> None:
        alive.add(layer)
        most[0] = max(most[0], len(alive))
        begin(layer, *arguments, **options)

    monkeypatch.setattr(DecoderLayer, "__init__", counted)
    expert, sizes = 3 * 64 * 256, {"intermediate_size": 8 * 256, "moe_intermediate_size": 256}

    def peak(layers: int) -> tuple[int, int]:
        folder = write_tiny(tmp_path / f"{layers}", kind, layers=layers, dtype="bfloat16", **sizes)
        recipe = recipe_for(folder, "rtn")
        most[0] = 0
        gc.collect()
        tracemalloc.start()
        try:
            quantize(recipe, tmp_path / f"out{layers}", remember=False, memory_budget=0)
            return tracemalloc.get_traced_memory()[1], most[0]
        finally:
            tracemalloc.stop()

    # What is loaded by the first run stays.
    peak(2)
    (few, held), (many, still_held) = peak(3), peak(7)
    # Four more layers in int8 would be eight times as much.
    assert many - few < 8 * expert // 2
    assert still_held <= max(held, 2)


@pytest.mark.parametrize("kind", SPARSE)
def test_the_indexer_reads_what_it_read_before_smoothing(kind: str, tmp_path: Path) -> None:
    """Its weights take the scales of what feeds it, and so it picks the same tokens."""
    source = write_tiny(tmp_path / "source", kind, prediction_layers=1)
    schemes = [{"lm_head": "FLOAT"}, {"kv_b_proj": "FLOAT"}, {"mlp.": "W8A8_DYNAMIC"}, {"*": "W8A8"}]
    recipe = recipe_for(source, schemes=schemes).adjusted(formats="ascend")
    folder = quantize(recipe, tmp_path / "out", remember=False).folder
    before, after = Checkpoint.open(source), Checkpoint.open(folder)
    words = json.loads((folder / "quant_model_description.json").read_text())
    assert "indexer_quant_type" not in words
    for layer in (f"model.layers.{index}" for index in range(3)):
        indexer = f"{layer}.self_attn.indexer"
        readers = {
            "wk": "input_layernorm",
            "weights_proj": "input_layernorm",
            "wq_b": "self_attn.q_a_layernorm",
        }
        for part, norm in readers.items():
            old, new = (
                each.tensor(f"{indexer}.{part}.weight") * each.tensor(f"{layer}.{norm}.weight")
                for each in (before, after)
            )
            # Norm and weight are each rounded to bfloat16.
            np.testing.assert_allclose(new, old, rtol=2**-7, atol=1e-6)
            assert not np.allclose(
                after.tensor(f"{layer}.{norm}.weight"), before.tensor(f"{layer}.{norm}.weight"), rtol=0.1
            )
            assert words[f"{indexer}.{part}.weight"] == "FLOAT"
        for part in ("k_norm.weight", "k_norm.bias"):
            np.testing.assert_allclose(
                after.tensor(f"{indexer}.{part}"), before.tensor(f"{indexer}.{part}"), rtol=2**-8
            )
            assert words[f"{indexer}.{part}"] == "FLOAT"


@pytest.mark.parametrize("kind", SPARSE)
def test_sequences_that_the_indexer_would_thin_out_are_refused_before_any_work(
    kind: str, tmp_path: Path
) -> None:
    source = write_tiny(tmp_path / "source", kind, index_topk=40)
    recipe = recipe_for(source).replace("calibration", sequence_length=41)
    for attempt in (make_plan, quantize):
        with pytest.raises(RecipeError, match=r"is 41: .* attends to 40 tokens \(index_topk\)") as caught:
            attempt(recipe, tmp_path / "out")
        assert caught.value.where == "calibration.sequence_length"
        assert "--sequence-length 40" in (caught.value.remedy or "")
    assert not list(tmp_path.glob("out*"))
    make_plan(recipe.replace("calibration", sequence_length=40), tmp_path / "out")
    with pytest.raises(CalibrationError, match=r"41 tokens .* \(index_topk = 40\)"):
        compare([str(source)], baseline=str(source), sequences=1, sequence_length=41)
    with closing(load_engine(source, "embedded")) as engine:
        with pytest.raises(EngineError, match=r"computes 40 tokens of the model \(index_topk\)"):
            engine.generate(["I am what I am. " * 20], Sampling(max_tokens=4))
        (done,) = engine.generate(["I am"], Sampling(max_tokens=100, ignore_eos=True))
    assert len(done.token_ids) < 40


@pytest.mark.parametrize("kind", ["glm4_moe", "glm_moe_dsa"])
def test_a_prediction_layer_without_ends_gets_those_of_the_model(kind: str, tmp_path: Path) -> None:
    """As GLM-4.6 and later are published; vllm-ascend looks for a description of both."""
    from safetensors.torch import load_file, save_file

    source = write_tiny(tmp_path / "source", kind, dtype="bfloat16", prediction_layers=1)
    path = source / "model.safetensors"
    shared = {
        "model.layers.2.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.2.shared_head.head.weight": "lm_head.weight",
    }
    kept = {name: tensor for name, tensor in load_file(path).items() if name not in shared}
    save_file(kept, path, metadata={"format": "pt"})
    recipe = recipe_for(source, "rtn").adjusted(formats="ascend")
    plan = make_plan(recipe, tmp_path / "out")
    result = quantize(recipe, tmp_path / "out", remember=False)
    assert plan.output_bytes == sum(path.stat().st_size for path in result.folder.glob("*.safetensors"))
    assert [layer["index"] for layer in result.layers] == [0, 1, 2]
    written = Checkpoint.open(result.folder)
    words = json.loads((result.folder / "quant_model_description.json").read_text())
    for own, end in shared.items():
        np.testing.assert_array_equal(written.tensor(own), written.tensor(end))
        assert words[own] == "FLOAT"
    form = folder_format(result.folder)
    assert form is not None
    assert form.validate(result.folder, verify_hashes=True) == []


@pytest.mark.parametrize("schemes", [{}, {"schemes": [{"lm_head": "FLOAT"}, {"*": "W8A8"}]}])
@pytest.mark.parametrize("algo", ["osl", "gptq"])
def test_norms_behind_the_blocks_and_gate_up_in_one_linear(
    algo: str, schemes: dict[str, Any], tmp_path: Path
) -> None:
    """GLM-4 per token, where its feed-forward block comes apart, and static, where it does not."""
    source = write_tiny(tmp_path / "source", "glm4", dtype="bfloat16")
    recipe = recipe_for(source, algo, **schemes).adjusted(formats="compressed-tensors")
    plan = make_plan(recipe, tmp_path / "whole" / "out")
    result = quantize(recipe, tmp_path / "whole" / "out", remember=False)
    assert plan.output_bytes == sum(path.stat().st_size for path in result.folder.glob("*.safetensors"))
    form = folder_format(result.folder)
    assert form is not None
    assert form.validate(result.folder, verify_hashes=True) == []
    assert all(0 < layer["error"] < 0.02 for layer in result.layers)
    before, after = Checkpoint.open(source), Checkpoint.open(result.folder)
    for layer in ("model.layers.0", "model.layers.1"):
        for norm in ("post_self_attn_layernorm", "post_mlp_layernorm"):
            name = f"{layer}.{norm}.weight"
            np.testing.assert_array_equal(after.tensor(name), before.tensor(name))
    assert after.shape("model.layers.0.mlp.gate_up_proj.weight") == (192, 64)
    found = compare([str(result.folder)], baseline=str(source), sequences=1, sequence_length=64)
    assert found.score.overall.kl is not None
    assert found.score.overall.kl < 0.05

    def interrupt(record: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    again = tmp_path / "again" / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(recipe, again, progress=Progress(layer=interrupt), remember=False)
    assert digests(quantize(recipe, again, remember=False)) == digests(result)


def test_a_description_that_vllm_ascend_does_not_find_is_refused(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source", "glm4", dtype="bfloat16")
    with pytest.raises(RecipeError, match="gate_proj and up_proj, which are one tensor, gate_up_proj"):
        make_plan(recipe_for(source, "rtn").adjusted(formats="ascend"), tmp_path / "out")
