"""The registry of families, and what each gives a model without a recipe."""

from pathlib import Path

import numpy as np
import pytest

from msquant import families
from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.families import expected_shapes, find_family, model_types, register
from msquant.families.base import Family
from msquant.formats.registry import model_format
from msquant.formats.servers import Parallelism, ServedModel
from msquant.formats.verdicts import best_refusal, servers_of
from msquant.hub.published import HUB_IDS, published_config
from msquant.inference.cpu.cpu_model import CpuModel
from msquant.models.config_json import read_config
from msquant.models.device import use_device
from msquant.models.network import CausalLM
from msquant.recipe.recipe import default_recipe, find_recipe
from tests.extension.toys import toy_family, write_toy


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Family:
    """Llama with the names of its first release."""
    monkeypatch.setattr(families, "_REGISTERED", dict(families._REGISTERED))
    return register(toy_family())


@pytest.fixture
def toy_folder(tiny_llama: Path, tmp_path: Path, toy: Family) -> Path:
    """The tiny Llama with those names."""
    return write_toy(tiny_llama, tmp_path / "toy")


def test_an_unknown_type_has_no_family() -> None:
    assert find_family("gpt2") is None
    assert find_family(None) is None
    assert find_family(["llama"]) is None


def test_a_registered_family_is_known_everywhere(toy: Family) -> None:
    assert find_family("toy") is toy
    assert "toy" in model_types()
    assert families.fused_linears()["qkv_proj"] == ("wq", "wk", "wv")
    assert families.float_only() == {
        "lm_head": "the output head",
        "embed_tokens": "embeddings",
        "mlp.gate": "the router",
        "mlp.shared_expert_gate": "the gate of the shared expert",
        "linear_attn.in_proj_ba": "what makes decay and step size of the delta rule",
        "output": "the output head",
        "tok_embeddings": "embeddings",
        "ffn.gate": "the router",
    }
    assert families.folded_linears() == ("kv_b_proj",)
    assert default_recipe("x", {"model_type": "toy"}).quantization.scheme("output").is_float


def test_both_engines_compute_a_family_that_renames_every_tensor(toy_folder: Path, tiny_llama: Path) -> None:
    tokens, dtype, logits = np.arange(12), use_device("cpu"), []
    for folder in (toy_folder, tiny_llama):
        config, source = read_config(folder), Checkpoint.open(folder)
        model = CpuModel(config, source)
        logits.append(model.logits(model.new_cache(), tokens.tolist(), len(tokens)))
        logits.append(CausalLM(config, source, dtype).logits(tokens[None])[0])
    np.testing.assert_array_equal(logits[0], logits[2])
    np.testing.assert_array_equal(logits[1], logits[3])
    assert np.abs(logits[0]).max() > 0


WITH_FAMILY = [name for name in HUB_IDS if find_family((published_config(name) or {})["model_type"])]


@pytest.mark.parametrize("name", WITH_FAMILY)
def test_a_folder_without_a_recipe_gets_what_the_shipped_recipe_says(name: str) -> None:
    config, shipped = published_config(name), find_recipe(name)
    assert config is not None
    default = default_recipe(shipped.model, config)
    assert default.quantization == shipped.quantization
    assert default.format == shipped.format


@pytest.mark.parametrize("name", WITH_FAMILY)
def test_some_server_serves_each_format_that_a_family_names(name: str) -> None:
    config = published_config(name) or {}
    family = find_family(config["model_type"])
    assert family is not None
    recipe = family.default_recipe(config)
    floats = tuple(f"{end}.weight" for end in families.float_only() if end != "lm_head")
    # A layer is one of many alike, and 671 billion parameters have 90,000 tensors.
    linears = {
        tensor.removesuffix(".weight"): default_recipe("x", config).quantization.scheme(tensor)
        for tensor, shape in (expected_shapes(config | {"num_hidden_layers": 5}) or {}).items()
        if len(shape) == 2 and not tensor.endswith(floats)
    }
    # The 14 heads of Qwen2.5-0.5B are shared by two NPUs at most.
    split = Parallelism(4 if config["num_attention_heads"] % 4 == 0 else 2)
    for form in (model_format(name, config) for name in ("golden-stick", "ascend", "compressed-tensors")):
        written = form.adapted(config) | form.config_entries(linears, [], config)
        model = ServedModel(form.name, form.variant, written, linears)
        servers = servers_of(model, form.server)
        served = best_refusal(servers, model, split) is None
        assert served == (form.name in recipe.formats), form.name
        assert not served or list(form.check(linears, written)) == []


def test_queries_that_are_not_compressed_are_served_elsewhere() -> None:
    config = (published_config("deepseek-v3") or {}) | {"q_lora_rank": None}
    assert default_recipe("x", config).format == "ascend"
