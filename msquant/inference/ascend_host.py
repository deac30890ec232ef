"""What Huawei's own tools and files say about the NPUs of this machine. Nothing of CANN is imported."""

import glob
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from msquant.errors import EngineError

ASCEND_FOLDER = Path("/usr/local/Ascend")
DEVICE_NODES = "/dev/davinci[0-9]*"
"""One device node for each NPU, made by its driver; Ray counts NPUs by them too (accelerators/npu.py)."""

# The compiler's own versions that MindSpore 2.7.1 accepts (mindspore/run_check/_check_version.py). They are
# not always CANN's: CANN 8.0 has a compiler 7.6.
COMPILER_VERSIONS = ("7.8", "8.2", "8.3")
_TOOL_FOLDERS = ("/usr/local/bin", "/usr/local/sbin", "/usr/local/Ascend/driver/tools")
_TOOL_SECONDS = 10.0
_BY_HAND = "run it by hand to see what it says"
_HOME_VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")

# | 0     910B3               | OK            | 93.4        33                0    / 0             |
_NPU_ROW = re.compile(r"^\|\s*(\d+)\s+(\S+)\s*\|\s*([A-Za-z]+)\s*\|")
# | 0                         | 0000:C1:00.0  | 0           0    / 0          3395 / 65536         |
# With Phy-ID (A3) or Device (310P) there is a second number. The last pair is the memory that models use.
_CHIP_ROW = re.compile(
    r"^\|\s*\d+(?:\s+(\d+|NA))?\s*\|\s*[0-9A-Fa-f]{4}:\S+\s*\|.*?(\d+)\s*/\s*(\d+)\s*\|\s*$"
)


@dataclass(frozen=True)
class AscendHost:
    """Where things are on this machine.

    Attributes:
        environment: of the process that will use the NPUs.
        ascend: where Huawei's installers put things.
        device_nodes: glob pattern of the NPUs' device nodes.
        npu_smi: name or path of the driver's tool.
        hccn_tool: name or path of the tool for the chips' own network.
        python: the interpreter that has the engine and Ray.
    """

    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    ascend: Path = ASCEND_FOLDER
    device_nodes: str = DEVICE_NODES
    npu_smi: str = "npu-smi"
    hccn_tool: str = "hccn_tool"
    python: str = sys.executable


@dataclass(frozen=True)
class Npu:
    """A chip as `npu-smi info` lists it.

    Attributes:
        index: the number that `ASCEND_RT_VISIBLE_DEVICES` takes: its place among the chips seen here.
        physical: the number that `hccn_tool -i` takes; another one in a container that sees a part of them.
        name: such as `910B3`.
        health: `OK`, `Warning`, `Alarm`, `Critical` or `UNKNOWN`.
        used_mb: memory in use, in MB.
        total_mb: its memory, in MB.
    """

    index: int
    physical: int
    name: str
    health: str
    used_mb: int
    total_mb: int


@dataclass(frozen=True)
class Cann:
    """An installation of CANN.

    Attributes:
        folder: where it is.
        version: CANN's own version, such as `8.3.RC1`; None if no file says it.
        compiler: the version of its compiler, which MindSpore checks; None likewise.
    """

    folder: Path
    version: str | None
    compiler: str | None

    @property
    def is_supported(self) -> bool:
        """Whether MindSpore 2.7.1 accepts it; True where nothing says otherwise, as MindSpore does."""
        return self.compiler is None or ".".join(self.compiler.split(".")[:2]) in COMPILER_VERSIONS


def device_nodes(pattern: str = DEVICE_NODES) -> list[Path]:
    """The NPUs' device nodes, by number."""
    return sorted(map(Path, glob.glob(pattern)), key=lambda path: int(re.findall(r"\d+", path.name)[-1]))


def installed_npus(program: str = "npu-smi") -> list[Npu]:
    """The chips that `npu-smi info` lists.

    Args:
        program: its name or its path.

    Raises:
        EngineError: it is not installed, it fails, or its table has another form.
    """
    npus = parse_npu_smi(run_tool([program, "info"]))
    if not npus:
        raise EngineError(
            "lists no NPU", where="npu-smi info", remedy="check the driver with: npu-smi info -l; dmesg"
        )
    return npus


def parse_npu_smi(text: str) -> list[Npu]:
    """The chips in the table of `npu-smi info`, of cards with one chip (A2, 310P) or two (A3)."""
    npus: list[Npu] = []
    card: re.Match[str] | None = None
    for line in text.splitlines():
        chip = _CHIP_ROW.match(line)
        if chip and card:
            physical = int(chip[1]) if (chip[1] or "NA") != "NA" else int(card[1])
            npus.append(Npu(len(npus), physical, card[2], card[3], int(chip[2]), int(chip[3])))
        card = None if chip else _NPU_ROW.match(line)
    return npus


def network_state(index: int, program: str = "hccn_tool") -> dict[str, str]:
    """What `hccn_tool` says of a chip's network port: `link status: UP`, `net health status: Success`.

    Raises:
        EngineError: it is not installed, or fails.
    """
    text = run_tool([program, "-i", str(index), "-link", "-g"])
    text += "\n" + run_tool([program, "-i", str(index), "-net_health", "-g"])
    lines = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name.strip().lower(): value.strip() for name, value in lines}


def find_cann(environment: Mapping[str, str], ascend: Path = ASCEND_FOLDER) -> Cann | None:
    """The CANN that the environment names, else the one in its usual place; None if there is none.

    Args:
        environment: `ASCEND_HOME_PATH` or `ASCEND_TOOLKIT_HOME` is set by CANN's `set_env.sh`.
        ascend: where CANN is installed by default.
    """
    named = [Path(environment[name]) for name in _HOME_VARIABLES if environment.get(name)]
    usual = [ascend / "ascend-toolkit" / "latest", ascend / "cann", ascend / "nnae" / "latest"]
    folder = next((path for path in (*named, *usual) if path.is_dir()), None)
    if folder is None:
        return None
    stated = [*sorted(folder.glob("*-linux/ascend_*_install.info")), folder / "ascend_nnae_install.info"]
    compiler = folder / "compiler" / "version.info"
    versions = [_value(path, "version") for path in stated] + [_value(compiler, "version_dir")]
    return Cann(folder, next((v for v in versions if v), None), _value(compiler, "version"))


def driver_version(ascend: Path = ASCEND_FOLDER) -> str | None:
    """The NPU driver's version; None if no driver is installed."""
    return _value(ascend / "driver" / "version.info", "version")


def run_tool(command: Sequence[str], seconds: float = _TOOL_SECONDS) -> str:
    """What a tool of the driver's or of Ray's prints.

    Raises:
        EngineError: it is not installed, takes too long or fails.
    """
    name = command[0]
    path = shutil.which(name) or shutil.which(name, path=os.pathsep.join(_TOOL_FOLDERS))
    if path is None:
        raise EngineError("is not installed", where=name, remedy=f"put {name} into PATH")
    shown = " ".join(command)
    try:
        done = subprocess.run(
            [path, *command[1:]], capture_output=True, text=True, errors="replace", timeout=seconds
        )
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"gave no answer in {seconds:.0f} s", where=shown, remedy=_BY_HAND) from error
    except OSError as error:
        raise EngineError(f"cannot be run: {error.strerror}", where=shown, remedy=_BY_HAND) from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise EngineError(f"fails: {said}", where=shown, remedy=_BY_HAND)
    return done.stdout


def _value(path: Path, key: str) -> str | None:
    """The value of a line `key=value`, of either case."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition("=")
        if name.strip().lower() == key and value.strip():
            return value.strip()
    return None
