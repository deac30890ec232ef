"""The model card says what msquant.json says, and nothing of the machine it was made on."""

from typing import Any

import pytest
import yaml

from msquant.flows.publishing import model_card

MANIFEST: dict[str, Any] = {
    "msquant": "0.1.0",
    "variant": "mindformers",
    "recipe": {
        "model": "deepseek-ai/DeepSeek-R1",
        "quantization": {"algorithm": "osl", "schemes": [{"lm_head": "FLOAT"}, {"*": "W8A8"}]},
        "calibration": {"source": "builtin", "samples": 16},
        "format": "golden-stick",
    },
    "layers": [
        {"index": index, "error": (index + 1) * 1e-4, "groups": [{"name": "qkv", "alpha": 0.55}]}
        for index in range(20)
    ],
    # Layer 3 has one of the smallest errors relative to what it adds, and most of the noise.
    "evaluation": {
        "layers": [{"index": i, "snr": 30.0, "own_snr": 25.0 if i == 3 else 50.0 - i / 10} for i in range(20)]
    },
}


def front(card: str) -> dict[str, Any]:
    _, text, _ = card.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def test_the_hubs_read_the_front() -> None:
    found = front(model_card(MANIFEST, "my-org/R1-W8A8", "mit"))
    assert found["license"] == "mit"
    assert found["base_model"] == "deepseek-ai/DeepSeek-R1"
    assert found["base_model_relation"] == "quantized"


def test_a_person_reads_how_to_serve_it_and_how_well_it_is() -> None:
    card = model_card(MANIFEST, "my-org/R1-W8A8", "mit")
    assert "msquant download my-org/R1-W8A8" in card
    assert "vllm-mindspore serve R1-W8A8 --quantization golden-stick" in card
    assert "export VLLM_MS_MODEL_BACKEND=MindFormers" in card
    assert "algorithm: osl" in card
    assert "| 20 | 1.00e-04 | 1.10e-03 | 2.00e-03 |" in card
    ranked = [line.split(" | ")[0].strip("| ") for line in card.splitlines() if "qkv 0.55 |" in line]
    assert ranked == ["3", "19", "18", "17", "16", "15", "14", "13"]
    assert "| 3 | 25.0 | 92.9% | qkv 0.55 |" in card


def test_layers_that_were_not_evaluated_are_not_ranked() -> None:
    card = model_card({k: v for k, v in MANIFEST.items() if k != "evaluation"}, "my-org/R1-W8A8", "mit")
    assert "| 20 | 1.00e-04 | 1.10e-03 | 2.00e-03 |" in card
    assert "qkv" not in card


@pytest.mark.parametrize("model", ["/home/me/secret/model", "./secret", "secret/", "~/secret"])
def test_paths_of_this_machine_are_left_out(model: str) -> None:
    recipe = MANIFEST["recipe"] | {"model": model, "calibration": {"source": "/home/me/secret.txt"}}
    card = model_card(MANIFEST | {"recipe": recipe}, "my-org/x", "other")
    assert "secret" not in card
    assert "base_model" not in front(card)


def test_sources_of_a_mix_are_shown_but_for_paths() -> None:
    section = {"source": ["builtin=25%", "hf:org/talk:train", "/home/me/secret.txt=3"]}
    card = model_card(MANIFEST | {"recipe": MANIFEST["recipe"] | {"calibration": section}}, "a/b", "other")
    assert "builtin=25%" in card
    assert "hf:org/talk:train" in card
    assert "secret" not in card


def test_a_bundled_model_has_its_real_name() -> None:
    recipe = MANIFEST["recipe"] | {"model": "smollm2-135m"}
    assert front(model_card(MANIFEST | {"recipe": recipe}, "a/b", "apache-2.0"))["base_model"] == (
        "HuggingFaceTB/SmolLM2-135M-Instruct"
    )


def test_an_empty_manifest_gives_a_card_all_the_same() -> None:
    assert front(model_card({}, "a/b", "other"))["license"] == "other"


@pytest.mark.parametrize(
    ("form", "engine", "command"),
    [
        ("compressed-tensors", "for vLLM.", "    vllm serve R1-W8A8\n"),
        ("ascend", "for vllm-ascend.", "    vllm serve R1-W8A8 --quantization ascend\n"),
    ],
)
def test_every_format_says_who_serves_it(form: str, engine: str, command: str) -> None:
    card = model_card({"format": form, "variant": "x"}, "org/R1-W8A8", "mit")
    assert engine in card
    assert command in card
    assert form in yaml.safe_load(card.split("---")[1])["tags"]
    assert "golden-stick" not in card


def test_what_was_measured_is_a_table() -> None:
    score = {"tokens": 256, "perplexity": 7.6066, "baseline_perplexity": 7.4263, "kl": 0.03243, "top1": 0.924}
    evaluation = {"texts": [score | {"text": "docs"}], "overall": score | {"text": "all"}}
    card = model_card(MANIFEST | {"evaluation": evaluation}, "a/b", "mit")
    assert "| docs | 256 | 7.426 | 7.607 | 0.0324 | 92.4% |" in card
    assert "| all | 256 |" in card
    alone = {"texts": [], "overall": {"text": "all", "perplexity": 7.6, "kl": None}}
    assert "float model" not in model_card(MANIFEST | {"evaluation": alone}, "a/b", "mit")


@pytest.mark.parametrize(
    ("word", "title", "tag"),
    [
        ("W8A8_DYNAMIC", "W8A8 (weights and activations in int8)", "w8a8"),
        ("W4A8_DYNAMIC", "W4A8 (weights in int4, activations in int8)", "w4a8"),
        ("W6A16_G64", "W6A16_G64 (weights in int6, groups of 64)", "w6a16-g64"),
    ],
)
def test_it_says_how_most_linears_are_computed(word: str, title: str, tag: str) -> None:
    quantization = {"algorithm": "rtn", "schemes": [{"lm_head": "FLOAT"}, {"*": word}]}
    card = model_card(MANIFEST | {"recipe": {"quantization": quantization}}, "my-org/x", "mit")
    assert title in card
    assert tag in front(card)["tags"]
