"""The probe measures with the code that does the work, and leaves nothing behind."""

import math
from dataclasses import asdict
from pathlib import Path

import pytest

from msquant.checkpoint.reader import Checkpoint
from msquant.errors import OutputError
from msquant.hub.published import published_config
from msquant.models.config_json import parse_config, read_config
from msquant.planning.probe import measure_rates


def test_all_rates_are_those_of_a_machine(tiny_llama: Path, tmp_path: Path) -> None:
    config, checkpoint = read_config(tiny_llama), Checkpoint.open(tiny_llama)
    rates = asdict(measure_rates(config, tmp_path / "not" / "yet" / "out", checkpoint))
    assert all(math.isfinite(rate) and rate > 0 for rate in rates.values())
    # From what no machine is too slow for to what none is fast enough for.
    assert 1e8 < rates["products"] < 1e14
    for name in ("converted", "rounded", "quantized", "inputs"):
        assert 1e6 < rates[name] < 1e12
    assert list(tmp_path.iterdir()) == []


def test_an_fp8_model_without_weights(tmp_path: Path) -> None:
    config = parse_config(published_config("deepseek-r1") or {})
    rates = measure_rates(config, tmp_path / "out", None)
    assert rates.read > 1e6
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_cannot_be_written_is_named(tiny_llama: Path) -> None:
    with pytest.raises(OutputError, match="/proc"):
        measure_rates(read_config(tiny_llama), Path("/proc/out"), None)
