"""What is said to be left of a quantization, and that it covers all to the end."""

from collections.abc import Callable
from pathlib import Path

import pytest

from msquant.flows import forecast
from msquant.flows.forecast import MODELS, Forecast
from msquant.flows.pipeline import quantize
from msquant.hub.published import published_config
from msquant.models.config import ModelConfig
from msquant.models.config_json import parse_config
from msquant.progress import Part, Progress
from msquant.recipe.recipe import find_recipe


@pytest.fixture
def config() -> ModelConfig:
    """One dense layer and two with experts."""
    raw = published_config("deepseek-v2-lite") or {}
    return parse_config(raw | {"num_hidden_layers": 3, "n_routed_experts": 8})


@pytest.fixture
def take(monkeypatch: pytest.MonkeyPatch) -> Callable[[Forecast, Part, float], None]:
    """Lets a part take so many seconds."""
    now = 0.0
    monkeypatch.setattr(forecast.time, "monotonic", lambda: now)

    def take(watched: Forecast, part: Part, seconds: float) -> None:
        nonlocal now
        now += seconds
        watched.progress.lap(part)

    return take


def weights(config: ModelConfig, index: int) -> int:
    total = 0
    for shape in config.layer_shapes(index).values():
        count = 1
        for size in shape:
            count *= size
        total += count
    return total


def test_all_to_the_end_is_counted(
    config: ModelConfig, take: Callable[[Forecast, Part, float], None]
) -> None:
    left: list[float] = []
    watched = Forecast(Progress(left=left.append), config, 0, True, 1)
    dense, experts = weights(config, 0), weights(config, 1)
    layers, ends = dense + 2 * experts, 2 * 102400 * 2048 + 2048
    head = 102400 * 2048
    export = 4.0 / ends * (layers + ends)

    take(watched, "start", 100)
    take(watched, "ends", 4)
    take(watched, "start", 50)
    take(watched, "evaluation sample", 1)
    assert left == []
    evaluation = MODELS * 1.0 / dense * (layers + head)
    # A layer with experts is yet to come: it is counted at the pace of the dense one.
    take(watched, "layer", 10)
    assert left.pop() == pytest.approx(2 * 10 / dense * experts + evaluation + export)
    # An attention block is a part of its layer.
    take(watched, "attention", 3)
    assert left == []
    take(watched, "layer", 4)
    assert left.pop() == pytest.approx(7 + evaluation + export)
    take(watched, "layer", 9)
    assert left.pop() == pytest.approx(evaluation + export)
    take(watched, "start", 5)
    # Measured now, and no longer estimated.
    take(watched, "evaluated layer", 3)
    assert left.pop() == pytest.approx(3 / dense * (layers - dense + head) + export)
    take(watched, "evaluated layer", 3)
    take(watched, "evaluated layer", 3)
    assert left[-1] == pytest.approx(9 / layers * head + export)
    take(watched, "head", 2)
    assert left[-1] == pytest.approx(export)
    take(watched, "export", 2)
    assert left[-1] == 0


def test_a_continued_run_knows_no_pace_of_what_is_there(
    config: ModelConfig, take: Callable[[Forecast, Part, float], None]
) -> None:
    left: list[float] = []
    watched = Forecast(Progress(left=left.append), config, 2, False, 2)
    take(watched, "ends", 1e-9)
    take(watched, "layer", 5)
    assert left == [0]


def test_a_real_run_tells_of_every_part(tiny_llama: Path, tmp_path: Path) -> None:
    parts: list[Part] = []
    left: list[float] = []
    recipe = find_recipe(str(tiny_llama)).replace("quantization", algorithm="rtn")
    recipe = recipe.replace("calibration", samples=2, sequence_length=16)
    recipe = recipe.adjusted(formats="golden-stick,compressed-tensors")
    quantize(recipe, tmp_path / "out", progress=Progress(lap=parts.append, left=left.append))
    layers = ["layer"] * 2, ["evaluated layer"] * 2
    assert parts == [
        *("start", "ends", "start", "evaluation sample"),
        *(*layers[0], "start", *layers[1], "head", "export"),
    ]
    # With the last layer done, the evaluation and the other format are to come.
    assert left[1] > 0
    assert left[-1] == 0
