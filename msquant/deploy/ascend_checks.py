"""Checks of an Ascend machine, with remedies: driver, NPUs, CANN, and what vLLM-MindSpore is made for."""

import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from msquant.errors import EngineError
from msquant.inference.ascend_host import (
    COMPILER_VERSIONS,
    AscendHost,
    device_nodes,
    driver_version,
    find_cann,
    installed_npus,
)

Status = Literal["ok", "note", "warning", "error"]


@dataclass(frozen=True)
class Check:
    """A line of a diagnosis.

    Attributes:
        section: what it belongs to, such as `packages`.
        subject: what was looked at, such as `numpy`.
        status: `ok`; `note`, missing but not needed here; `warning`, works but not as it should; `error`,
            something that is needed does not work.
        detail: what was found.
        remedy: what to do about it, unless it is `ok`.
    """

    section: str
    subject: str
    status: Status
    detail: str
    remedy: str | None = None

    def document(self) -> dict[str, Any]:
        """The same as plain data, for `--json`."""
        return asdict(self)


def failed(checks: Iterable[Check]) -> list[Check]:
    """Those that are errors."""
    return [check for check in checks if check.status == "error"]


SECTION = "ascend"
SET_ENV = "source /usr/local/Ascend/ascend-toolkit/set_env.sh"
INSTALL_GUIDE = (
    "https://www.mindspore.cn/vllm_mindspore/docs/en/master/getting_started/installation/installation.html"
)
# The guide's table for vLLM-MindSpore 0.5.1; MindFormers is only needed for its own backend, Ray only for it.
PACKAGES = {
    "vllm-mindspore": "==0.5.1",
    "vllm": "==0.11.0",
    "mindspore": "==2.7.1.post1",
    "msadapter": "==0.0.5",
    "mindformers": "==1.7.0",
    "mindone": "==0.5.0",
    "ms-custom-ops": "==0.1.0",
    "ray": ">=2.48",
    "transformers": "==4.57.1",
}
OPTIONAL = {"mindformers": "DeepSeek", "mindone": "models of MindONE", "ray": "several nodes"}


def ascend_checks(host: AscendHost | None = None) -> list[Check]:
    """Driver, NPUs and CANN, and the packages where vLLM-MindSpore is installed.

    On a machine without an NPU it is one note that says so, unless something of Ascend's is installed.

    Args:
        host: where things are; their usual places by default.
    """
    host = host or AscendHost()
    driver, cann = driver_version(host.ascend), find_cann(host.environment, host.ascend)
    if not device_nodes(host.device_nodes) and driver is None and cann is None:
        detail = f"no NPU, driver or CANN here (no {host.device_nodes}); only needed to serve on Ascend"
        return [Check(SECTION, "NPU", "note", detail, "everything else works on the CPU")]
    checks = [driver_check(driver), *npu_checks(host), cann_check(host)]
    if _installed("vllm-mindspore") is not None:
        checks += package_checks()
    return checks


def driver_check(driver: str | None) -> Check:
    """Whether the NPUs' driver is there."""
    if driver is None:
        remedy = "install the Ascend HDK driver, or mount /usr/local/Ascend/driver into the container"
        return Check(SECTION, "driver", "error", "is not installed", remedy)
    return Check(SECTION, "driver", "ok", driver)


def npu_checks(host: AscendHost) -> list[Check]:
    """Whether the device nodes may be used and every NPU is healthy: one line, or one for each bad NPU."""
    found = device_nodes(host.device_nodes)
    if not found:
        remedy = "check the card with: lspci; in a container pass --device=/dev/davinci0 and the others"
        return [Check(SECTION, "NPU", "error", "no device node /dev/davinci0, /dev/davinci1, ...", remedy)]
    if closed := [str(node) for node in found if not os.access(node, os.R_OK | os.W_OK)]:
        remedy = "add yourself to the driver's group: usermod -aG HwHiAiUser $USER, and log in again"
        return [Check(SECTION, "NPU", "error", f"{', '.join(closed)} may not be opened", remedy)]
    try:
        npus = installed_npus(host.npu_smi)
    except EngineError as error:
        return [Check(SECTION, "NPU", "error", f"{error.where} {error.what}", error.remedy)]
    checks = [
        Check(
            SECTION,
            f"NPU {npu.index}",
            "warning" if npu.health == "Warning" else "error",
            f"{npu.name}, health is {npu.health}",
            f"see: npu-smi info -t health -i {npu.physical}; leave it out with serving.devices, or reset it",
        )
        for npu in npus
        if npu.health != "OK"
    ]
    names = ", ".join(sorted({npu.name for npu in npus}))
    free = sum(npu.total_mb - npu.used_mb for npu in npus)
    total = sum(npu.total_mb for npu in npus)
    detail = f"{len(npus)} x {names}, {free / 1024:.0f} of {total / 1024:.0f} GiB free"
    return checks or [Check(SECTION, "NPU", "ok", detail)]


def cann_check(host: AscendHost) -> Check:
    """Whether CANN is there, of a version that MindSpore takes, and in the environment."""
    cann = find_cann(host.environment, host.ascend)
    if cann is None:
        return Check(SECTION, "CANN", "error", "is not installed", "install CANN 8.3.RC1: " + INSTALL_GUIDE)
    detail = f"{cann.version or cann.compiler or 'of an unknown version'} in {cann.folder}"
    if not cann.is_supported:
        wanted = ", ".join(COMPILER_VERSIONS)
        detail = f"{detail} has a compiler {cann.compiler}; MindSpore 2.7.1 takes {wanted}"
        return Check(SECTION, "CANN", "error", detail, "install CANN 8.3.RC1: " + INSTALL_GUIDE)
    if not host.environment.get("ASCEND_OPP_PATH"):
        return Check(SECTION, "CANN", "error", f"{detail}, but not in the environment", SET_ENV)
    return Check(SECTION, "CANN", "ok", detail)


def package_checks(needed: frozenset[str] = frozenset()) -> list[Check]:
    """The packages of vLLM-MindSpore's own version table: one line for each that is not as it says.

    Args:
        needed: of the optional ones, those that must be there.
    """
    from packaging.specifiers import SpecifierSet

    checks = []
    for name, wanted in PACKAGES.items():
        found = _installed(name)
        if found is None and name in OPTIONAL and name not in needed:
            detail = f"is not installed; only needed for {OPTIONAL[name]}"
            checks.append(Check(SECTION, name, "note", detail, f"see {INSTALL_GUIDE}"))
        elif found is None:
            checks.append(Check(SECTION, name, "error", "is not installed", f"see {INSTALL_GUIDE}"))
        elif found.split("+")[0] not in SpecifierSet(wanted, prereleases=True):
            detail = f"{found}; vLLM-MindSpore 0.5.1 is made for {wanted.removeprefix('==')}"
            checks.append(Check(SECTION, name, "warning", detail, f"see {INSTALL_GUIDE}"))
    if torch := [name for name in ("torch", "torchvision") if _installed(name)]:
        # The engine's FAQ: transformers then finds a torch that is not the one it imports.
        detail = f"{' and '.join(torch)} installed; vLLM-MindSpore brings its own in their place"
        checks.append(Check(SECTION, "torch", "warning", detail, f"pip uninstall {' '.join(torch)}"))
    if platform.machine() != "aarch64":
        detail = f"this is {platform.machine()}; vLLM-MindSpore's packages are for aarch64 only"
        checks.append(Check(SECTION, "processor", "error", detail, "use a machine with an aarch64 processor"))
    return checks or [Check(SECTION, "packages", "ok", "as vLLM-MindSpore 0.5.1 wants them")]


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
