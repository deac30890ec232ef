"""`config.json` for MindFormers: published keys alone, and a `rope_scaling` that it cannot misread."""

import json
from typing import Any

import numpy as np
import pytest

from msquant.checkpoint.json_file import read_json
from msquant.formats.golden_stick.mindformers_config import published_form, refused_keys, rope_problems
from msquant.hub.published import configs_folder
from msquant.models.config_json import parse_config
from msquant.models.rope import rotary_tables, softmax_scale

PUBLISHED = {
    key: value
    for key, value in read_json(configs_folder() / "models" / "deepseek-v3.json").items()
    if key not in ("quantization_config", "auto_map")
}
YARN = PUBLISHED["rope_scaling"]
# What transformers 4.57.1 and 5 add or replace when they save the published file.
SAVED = {
    **{key: value for key, value in PUBLISHED.items() if key != "torch_dtype"},
    "dtype": "bfloat16",
    "head_dim": 64,
    "pretraining_tp": 1,
    "qk_head_dim": 192,
    "rope_interleave": True,
    "rope_scaling": {**YARN, "rope_type": "yarn"},
}
SAVED_5 = {key: value for key, value in SAVED.items() if key not in ("rope_scaling", "rope_theta")} | {
    "rope_parameters": {**YARN, "rope_type": "yarn", "rope_theta": 10000.0}
}
UNSCALED_5 = {**SAVED_5, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
NOTHING = {**PUBLISHED, "rope_scaling": None}
ALL = {"published": PUBLISHED, "4": SAVED, "5": SAVED_5, "5, unscaled": UNSCALED_5, "unscaled": NOTHING}


@pytest.mark.parametrize("name", ["published", "4", "5"])
def test_whatever_saved_it_the_published_form_is_written(name: str) -> None:
    assert published_form(ALL[name]) == PUBLISHED
    assert refused_keys(PUBLISHED, "1.9.0") == []


def test_refused_keys_are_found_by_version() -> None:
    assert refused_keys(SAVED, "1.7.0") == ["dtype", "pretraining_tp", "qk_head_dim", "rope_interleave"]
    halves = {**PUBLISHED, "rope_interleave": False}
    assert refused_keys(halves, "1.7.0") == []
    assert refused_keys(halves, "1.8.0") == ["rope_interleave"]


@pytest.mark.parametrize("name", list(ALL))
def test_the_form_says_the_same_to_our_own_reader(name: str) -> None:
    """Float32 rounds YaRN's sum of a part and the rest."""
    before, after = parse_config(ALL[name]), parse_config(published_form(ALL[name]))
    assert before.latent is not None
    assert softmax_scale(after, before.latent) == softmax_scale(before, before.latent)
    for ours, theirs in zip(rotary_tables(after, 0, 64), rotary_tables(before, 0, 64), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_unscaled_positions_stay_unscaled_in_transformers() -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

    def rotary(raw: dict[str, Any]) -> Any:
        return DeepseekV3RotaryEmbedding(AutoConfig.for_model(**json.loads(json.dumps(raw))))

    plain, written = rotary(NOTHING), rotary(published_form(NOTHING))
    assert written.attention_scaling == plain.attention_scaling == 1
    torch.testing.assert_close(written.inv_freq, plain.inv_freq, rtol=2e-7, atol=0)


@pytest.mark.parametrize(
    ("scaling", "key", "problem"),
    [
        (None, "rope_scaling", "factor 40"),
        ({"type": "linear", "factor": 2.0}, "rope_scaling", "'linear', and MindFormers takes it for YaRN"),
        ({**YARN, "attention_factor": 1.2}, "rope_scaling.attention_factor", "nothing that MindFormers"),
        ({**YARN, "factor": "x"}, "rope_scaling.factor", "'x', a number"),
        ({**YARN, "mscale_all_dim": 0.7}, "rope_scaling.mscale", "scales attention by the one"),
        (
            {key: value for key, value in YARN.items() if key != "original_max_position_embeddings"},
            "rope_scaling.original_max_position_embeddings",
            "seq_length",
        ),
    ],
)
def test_what_mindformers_would_misread_is_named(scaling: Any, key: str, problem: str) -> None:
    (found,) = rope_problems({"rope_scaling": scaling})
    assert found[0] == key
    assert problem in found[1]


def test_a_scaling_that_mindformers_does_not_know_is_kept_for_the_rules_to_name() -> None:
    linear = {"type": "linear", "factor": 2.0}
    assert published_form({**PUBLISHED, "rope_scaling": linear})["rope_scaling"] == linear
    assert list(rope_problems({"rope_scaling": YARN})) == []
