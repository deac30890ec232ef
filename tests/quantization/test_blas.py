"""NumPy computes by the kernels that the processor can run, whatever its model number."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from msquant.kernels.blas import choose_core

AVX2 = "flags\t\t: fpu sse2 avx avx2 fma\n"
AVX512 = "flags\t\t: fpu sse2 avx avx2 fma avx512f avx512cd avx512bw avx512dq avx512vl amx_int8\n"


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has neither loaded NumPy nor chosen."""
    monkeypatch.delitem(sys.modules, "numpy", raising=False)
    # Set first, so that what a test lets `choose_core` set goes away with it.
    monkeypatch.setenv("OPENBLAS_CORETYPE", "")
    monkeypatch.delenv("OPENBLAS_CORETYPE")


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("flags", "core"),
    [
        (AVX512, "SkylakeX"),
        (AVX2, "Haswell"),
        (AVX512.replace(" avx512vl", ""), "Haswell"),
        ("flags\t\t: fpu sse2\n", None),
        ("Features\t: fp asimd\n", None),
        ("", None),
    ],
)
def test_the_core_is_chosen_by_what_the_processor_can_do(
    tmp_path: Path, flags: str, core: str | None
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel\t\t: 207\n{flags}")
    choose_core(tmp_path / "cpuinfo")
    assert os.environ.get("OPENBLAS_CORETYPE") == core


@pytest.mark.usefixtures("fresh")
def test_a_system_that_does_not_tell_is_left_alone(tmp_path: Path) -> None:
    choose_core(tmp_path / "none")
    assert "OPENBLAS_CORETYPE" not in os.environ


@pytest.mark.usefixtures("fresh")
def test_a_name_in_other_bytes_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_bytes(b"model name\t: \xff\xfe\n" + AVX2.encode())
    choose_core(tmp_path / "cpuinfo")
    assert os.environ["OPENBLAS_CORETYPE"] == "Haswell"


@pytest.mark.usefixtures("fresh")
def test_what_a_person_has_set_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Zen")
    (tmp_path / "cpuinfo").write_text(AVX512)
    choose_core(tmp_path / "cpuinfo")
    assert os.environ["OPENBLAS_CORETYPE"] == "Zen"


@pytest.mark.usefixtures("fresh")
def test_nothing_is_chosen_once_numpy_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", sys)
    (tmp_path / "cpuinfo").write_text(AVX512)
    choose_core(tmp_path / "cpuinfo")
    assert "OPENBLAS_CORETYPE" not in os.environ


def test_numpy_follows_the_choice() -> None:
    code = (
        "import msquant, numpy, json, os, threadpoolctl;"
        "print(json.dumps([os.environ.get('OPENBLAS_CORETYPE'), threadpoolctl.threadpool_info()]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_CORETYPE"}
    answer = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    )
    core, libraries = json.loads(answer.stdout)
    if core is None:
        pytest.skip("this processor is left alone")
    assert {library["architecture"] for library in libraries if library["internal_api"] == "openblas"} == {
        core
    }
