"""A machine with NPUs, as far as files and tools say so: device nodes, CANN, driver, npu-smi, hccn_tool.

It stands for the missing NPUs and for nothing else. The texts have the form that the tools really print.
"""

from pathlib import Path

LINE = "+" + "-" * 27 + "+" + "-" * 15 + "+" + "-" * 52 + "+"
HEAD_A2 = f"""{LINE}
| npu-smi 24.1.rc2                 Version: 24.1.rc2                                             |
{LINE}
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
{LINE.replace("-", "=")}
"""
NO_PROCESSES = f"""{LINE}
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
{LINE.replace("-", "=")}
| No running processes found in NPU 0                                                            |
{LINE}
"""


def a2_table(count: int = 8, first: int = 0, used_mb: int = 3395, health: str = "OK") -> str:
    """`npu-smi info` on an Atlas 800 A2; `health` is that of the last NPU."""
    rows = ""
    for i in range(first, first + count):
        state = health if i == first + count - 1 else "OK"
        rows += (
            f"| {i:<5} 910B3               | {state:<13} | 93.4        33                "
            f"0    / 0             |\n"
            f"| 0                         | 0000:{0xC1 + i:02X}:00.0  | 0           0    / 0          "
            f"{used_mb:<5}/ 65536         |\n{LINE.replace('-', '=')}\n"
        )
    return HEAD_A2 + rows + NO_PROCESSES


A3_TABLE = f"""{LINE}
| npu-smi 25.2.0                   Version: 25.2.0                                               |
{LINE}
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip  Phy-ID              | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
{LINE.replace("-", "=")}
| 1     Ascend910           | OK            | 211.3       43                0    / 0             |
| 0     2                   | 0000:9D:00.0  | 7           0    / 0          61609/ 65536         |
{LINE}
| 1     Ascend910           | Alarm         | -           44                0    / 0             |
| 1     3                   | 0000:9F:00.0  | 0           0    / 0          3412 / 65536         |
{LINE.replace("-", "=")}
"""
P310_TABLE = """+-------------------+-----------------+------------------------------------------------------+
| npu-smi 22.0.0                       Version:22.0.2                                        |
+-------------------+-----------------+------------------------------------------------------+
| NPU     Name      | Health          | Power(W)     Temp(C)           Hugepages-Usage(page) |
| Chip    Device    | Bus-Id          | AICore(%)    Memory-Usage(MB)                        |
+===================+=================+======================================================+
| 0       310P3     | OK              | 16.2         42                0    / 0              |
| 0       0         | 0000:86:00.0    | 0            994  / 21534                            |
+===================+=================+======================================================+
"""


def write_tool(path: Path, text: str, code: int = 0) -> Path:
    """A program that prints a text and ends with a code."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {code}\n")
    path.chmod(0o755)
    return path


def write_hccn_tool(path: Path, link: str = "UP", health: str = "Success") -> Path:
    """`hccn_tool -i N -link -g` and `hccn_tool -i N -net_health -g`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'#!/bin/sh\ncase "$3" in\n-link) echo "link status: {link}";;\n'
        f'-net_health) echo "net health status: {health}";;\n*) exit 1;;\nesac\n'
    )
    path.chmod(0o755)
    return path


def write_ascend(folder: Path, compiler: str = "8.3.0.1.200", version: str = "8.3.RC1") -> Path:
    """/usr/local/Ascend with a driver and a CANN toolkit."""
    cann = folder / "ascend-toolkit" / "latest"
    (cann / "compiler").mkdir(parents=True)
    (cann / "compiler" / "version.info").write_text(f"Version={compiler}\nversion_dir={version}\n")
    (cann / "aarch64-linux").mkdir()
    (cann / "aarch64-linux" / "ascend_toolkit_install.info").write_text(
        f"package_name=Ascend-cann-toolkit\nversion={version}\ninnerversion=V100R001C23\narch=aarch64\n"
    )
    (folder / "driver").mkdir()
    (folder / "driver" / "version.info").write_text("Version=24.1.rc2\nascendhal_version=7.35.23\n")
    return folder


def write_nodes(folder: Path, count: int = 8) -> str:
    """Device nodes, as plain files; returns their glob pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in [*(f"davinci{i}" for i in range(count)), "davinci_manager"]:
        (folder / name).touch()
    return str(folder / "davinci[0-9]*")
