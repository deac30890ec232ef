"""What `msquant doctor` looks at: this machine, its packages, its NPUs, the engines, the hubs, the disk.

Packages are imported where they are used: a missing one must become a line of the diagnosis, not its end.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path

from msquant.checkpoint.cache import cache_folder
from msquant.deploy.ascend_checks import Check, Status
from msquant.flows.requirements import requirements_of, wanted

GIGABYTE = 10**9
LITTLE_DISK = 10 * GIGABYTE
LITTLE_MEMORY = 2 * GIGABYTE
_HUBS = {"huggingface": "HF_ENDPOINT", "modelers": "OPENMIND_HUB_ENDPOINT"}
_HUB_SECONDS = 2.5
_ENGINE_SECONDS = 30.0
# The smallest thing that needs all of MindSpore's CPU backend.
_PROBE = "import mindspore as ms; ms.set_device('CPU'); print(int(ms.ops.add(ms.Tensor([1]), 1)[0]))"

Look = Callable[[], list[Check]]


def diagnose() -> list[Check]:
    """Look at everything; what waits for something does so at the same time."""
    looks: dict[str, Look] = {
        "python": lambda: [python_check()],
        "packages": required_packages,
        "machine": lambda: [memory_check()],
        "disk": lambda: [disk_check("cache", cache_folder()), disk_check("this folder", Path.cwd())],
        "ascend": _ascend,
        "engines": lambda: [mindspore_check(), _embedded(), _vllm(), _vllm_mindspore()],
        "huggingface": lambda: [hub_check("huggingface")],
        "modelers": lambda: [hub_check("modelers")],
    }
    with ThreadPoolExecutor(len(looks)) as pool:
        return [check for checks in pool.map(_guarded, looks, looks.values()) for check in checks]


def python_check() -> Check:
    """Whether this is a Python that msquant runs on."""
    from packaging.specifiers import SpecifierSet

    found = platform.python_version()
    wanted = str(metadata("msquant").json["requires_python"])
    where = f"{found} on {platform.system()} {platform.machine()}, {sys.executable}"
    if found in SpecifierSet(wanted):
        return Check("python", "Python", "ok", where)
    return Check("python", "Python", "error", f"{where}; {wanted} is needed", "make an environment with it")


def required_packages() -> list[Check]:
    """One line for each package that is missing or of another version, or one line for all of them."""
    needed = requirements_of()
    problems = []
    for requirement in needed:
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            found = None
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            detail = f"{found or 'not installed'}; {wanted(requirement)} is needed"
            remedy = f"pip install '{wanted(requirement)}'"
            problems.append(Check("packages", requirement.name, "error", detail, remedy))
    detail = f"{version('msquant')}, with all {len(needed)} packages it needs"
    return problems or [Check("packages", "msquant", "ok", detail)]


def memory_check(little: int = LITTLE_MEMORY) -> Check:
    """How much memory is free, and whether that is less than `little` bytes."""
    import psutil

    memory = psutil.virtual_memory()
    detail = (
        f"{memory.available / GIGABYTE:.1f} of {memory.total / GIGABYTE:.1f} GB free, {os.cpu_count()} CPUs"
    )
    if memory.available < little:
        return Check("machine", "memory", "warning", detail, "end other programs; see: msquant plan MODEL")
    return Check("machine", "memory", "ok", detail)


def disk_check(subject: str, folder: Path, little: int = LITTLE_DISK) -> Check:
    """Whether a folder, which need not exist yet, can be written to, and has `little` bytes of room."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    remedy = "set MSQUANT_CACHE to another folder" if subject == "cache" else "go to another folder"
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
        free = shutil.disk_usage(existing).free
    except OSError as error:
        detail = f"{folder} cannot be written to: {error.strerror}"
        return Check("disk", subject, "error", detail, remedy)
    detail = f"{free / GIGABYTE:.1f} GB free for {folder}"
    if free < little:
        return Check("disk", subject, "warning", detail, f"free some space, or {remedy}")
    return Check("disk", subject, "ok", detail)


def mindspore_check(python: str = sys.executable) -> Check:
    """Whether MindSpore, which quantizing needs, computes here; a wrong one crashes its process.

    Args:
        python: the interpreter to ask.
    """
    command = [python, "-c", _PROBE]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_ENGINE_SECONDS,
            # As -P, which another interpreter may not know: nothing is imported from the current folder.
            env=os.environ | {"PYTHONSAFEPATH": "1"},
        )
    except subprocess.TimeoutExpired:
        detail = f"has not begun to compute in {_ENGINE_SECONDS:.0f} s"
        return Check("engines", "MindSpore", "warning", detail, "ask again when this machine is less busy")
    except OSError as error:
        failure = str(error)
    else:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        failure = "" if done.stdout.strip().endswith("2") else said[-1]
    if failure:
        pin = next(wanted(each) for each in requirements_of() if each.name == "mindspore")
        remedy = f"pip install --force-reinstall {pin}; its wheels need Linux"
        return Check("engines", "MindSpore", "error", f"does not compute here: {failure}", remedy)
    return Check("engines", "MindSpore", "ok", "computes on this CPU")


def hub_check(name: str, seconds: float = _HUB_SECONDS) -> Check:
    """Whether a hub answers.

    Args:
        name: `modelers` or `huggingface`.
        seconds: how long to wait for it.
    """
    from msquant.hub.reach import ask_hub

    answer = ask_hub(name, seconds)
    if answer.reached:
        return Check("hubs", name, "ok", answer.detail)
    if answer.offline:
        return Check("hubs", name, "note", answer.detail, "unset HF_HUB_OFFLINE to download")
    remedy = f"check the network, HTTPS_PROXY and {_HUBS[name]}; local folders work without"
    return Check("hubs", name, "warning", answer.detail, remedy)


def _ascend() -> list[Check]:
    from msquant.deploy.ascend_checks import ascend_checks

    return ascend_checks()


def _embedded() -> Check:
    from msquant.kernels.onednn import load_int8

    if load_int8() is None:
        detail = "multiplies in float32: oneDNN's int8 product is not there, or not exact on this processor"
        remedy = "nothing to do: it gives the same text, more slowly"
        return Check("engines", "embedded", "note", detail, remedy)
    return Check("engines", "embedded", "ok", "multiplies int8 with oneDNN")


def _vllm() -> Check:
    from msquant.errors import EngineError
    from msquant.inference.environments import VLLM_CPU, environment, require_ready

    found = environment(VLLM_CPU)
    try:
        require_ready(VLLM_CPU)
    except EngineError as error:
        status: Status = "note" if found.state == "not installed" else "warning"
        return Check("engines", "vllm", status, str(error.what), error.remedy)
    return Check("engines", "vllm", "ok", f"{found.version} in {found.path}; test it: msquant engine check")


def _vllm_mindspore() -> Check:
    from msquant.deploy.ascend_checks import INSTALL_GUIDE
    from msquant.inference.vllm_mindspore import NAME, available

    if reason := available():
        detail = f"{reason}; only needed to serve on Ascend"
        return Check("engines", NAME, "note", detail, f"install it there: {INSTALL_GUIDE}")
    return Check("engines", NAME, "ok", version("vllm-mindspore"))


def _guarded(section: str, look: Look) -> list[Check]:
    try:
        return look()
    except ImportError as error:
        remedy = "install msquant anew, in an environment of its own"
        return [Check(section, error.name or section, "error", str(error), remedy)]
