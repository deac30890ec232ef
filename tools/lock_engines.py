"""Write the lock files of the engines: every package with the sha256 of the wheels that may be installed.

    make locks

`msquant/inference/NAME.txt` says which versions; `NAME.MACHINE.lock` beside it is what pip gets with
--require-hashes. Only wheels that CPython 3.11 can take on Linux with glibc are listed, so that a lock stays
small and a file of another kind is refused.
"""

import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from urllib.parse import unquote

from packaging.markers import Marker
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import parse_wheel_filename

FOLDER = Path(__file__).parents[1] / "msquant" / "inference"
ENGINES = ("vllm_cpu", "vllm_mindspore")
MACHINES = ("x86_64", "aarch64")
PYTHON = (3, 11)
_NEWEST_GLIBC = 45

# PyPI does not have these. The sha256 for x86_64 was computed from the file of download.pytorch.org; that for
# aarch64 is the one that two independent public lists give, of which one also has the former.
ELSEWHERE = {
    "torch==2.13.0+cpu": {
        "x86_64": "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",
        "aarch64": "84453b69508ec79902f899c5ed9495acb9e2bbe9fda5f1d5d6f19e3c3842e1a7",
    }
}


def requirements(path: Path, machine: str) -> list[str]:
    """The lines of a list of versions that hold on a machine, without their markers."""
    lines = (line.partition(";") for line in path.read_text(encoding="utf-8").splitlines() if line)
    return [
        requirement.strip()
        for requirement, _, marker in lines
        if not requirement.startswith("#")
        and (not marker or Marker(marker).evaluate({"platform_machine": machine}))
    ]


def wheels(path: Path) -> dict[str, list[tuple[str, str]]]:
    """Of each requirement that PyPI has: the names of its wheels and their sha256, as uv finds them."""
    with tempfile.TemporaryDirectory() as folder:
        wanted, locked = Path(folder) / "in.txt", Path(folder) / "pylock.toml"
        lines = {line for machine in MACHINES for line in requirements(path, machine)} - ELSEWHERE.keys()
        wanted.write_text("\n".join(sorted(lines)), encoding="utf-8")
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-config", "--universal"]
        command += ["--no-deps", "--only-binary=:all:", "--python-version", ".".join(map(str, PYTHON))]
        command += ["--format=pylock.toml", str(wanted), "--output-file", str(locked)]
        subprocess.run(command, check=True)
        packages = tomllib.loads(locked.read_text(encoding="utf-8"))["packages"]
    return {
        f"{package['name']}=={package['version']}": [
            (unquote(wheel["url"].rsplit("/", 1)[1]), wheel["hashes"]["sha256"])
            for wheel in package["wheels"]
        ]
        for package in packages
    }


def tags(machine: str) -> set[Tag]:
    """The tags of the wheels that CPython takes on Linux with glibc."""
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(5, _NEWEST_GLIBC)]
    platforms += [f"{name}_{machine}" for name in ("manylinux1", "manylinux2010", "manylinux2014", "linux")]
    own = cpython_tags(PYTHON, platforms=platforms)
    return {*own, *compatible_tags(PYTHON, "cp311", platforms=platforms)}


def lock(path: Path, machine: str, found: dict[str, list[tuple[str, str]]]) -> str:
    """The text of a lock file. Raises SystemExit if a package has no wheel for the machine."""
    fitting = tags(machine)
    lines = [f"# Made by `make locks` from {path.name}, for Linux on {machine}; do not edit."]
    for requirement in requirements(path, machine):
        if requirement in ELSEWHERE:
            hashes = [ELSEWHERE[requirement][machine]]
        else:
            hashes = [
                digest for name, digest in found[requirement] if fitting & parse_wheel_filename(name)[3]
            ]
        if not hashes:
            raise SystemExit(f"{path.name}: {requirement} has no wheel for {machine}")
        lines.append(" ".join([requirement, *(f"--hash=sha256:{digest}" for digest in sorted(hashes))]))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write all lock files, or none."""
    texts: dict[Path, str] = {}
    for engine in ENGINES:
        path = FOLDER / f"{engine}.txt"
        found = wheels(path)
        for machine in MACHINES:
            texts[path.with_suffix(f".{machine}.lock")] = lock(path, machine, found)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
