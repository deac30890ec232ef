"""The checks of an Ascend machine, on stand-ins for the NPUs and on real package metadata."""

import platform
from pathlib import Path

import packaging.specifiers
import pytest

from msquant.deploy.ascend_checks import PACKAGES, Check, ascend_checks, package_checks
from msquant.inference.ascend_host import AscendHost
from tests.inference.ascend_host import a2_table, write_ascend, write_nodes, write_tool
from tests.inference.packages import write_package

SOURCED = {"ASCEND_OPP_PATH": "/usr/local/Ascend/ascend-toolkit/latest/opp"}


def checks(tmp_path: Path, table: str, environment: dict[str, str] | None = None, **cann: str) -> list[Check]:
    return ascend_checks(
        AscendHost(
            SOURCED if environment is None else environment,
            write_ascend(tmp_path / "Ascend", **cann),
            write_nodes(tmp_path / "dev"),
            str(write_tool(tmp_path / "npu-smi", table)),
        )
    )


def by_subject(found: list[Check]) -> dict[str, Check]:
    return {check.subject: check for check in found}


def test_a_healthy_machine(tmp_path: Path) -> None:
    found = checks(tmp_path, a2_table())
    assert {check.subject: (check.status, check.detail.split(" in ")[0]) for check in found} == {
        "driver": ("ok", "24.1.rc2"),
        "NPU": ("ok", "8 x 910B3, 485 of 512 GiB free"),
        "CANN": ("ok", "8.3.RC1"),
    }


def test_a_machine_without_any_of_it_is_a_note(tmp_path: Path) -> None:
    [check] = ascend_checks(AscendHost({}, tmp_path / "none", str(tmp_path / "davinci*")))
    assert check.status == "note"
    assert "only needed to serve on Ascend" in check.detail


def test_a_sick_npu(tmp_path: Path) -> None:
    found = by_subject(checks(tmp_path, a2_table(health="Alarm")))
    assert found["NPU 7"].status == "error"
    assert "health is Alarm" in found["NPU 7"].detail
    assert "npu-smi info -t health -i 7" in str(found["NPU 7"].remedy)


def test_a_warning_of_an_npu_is_a_warning(tmp_path: Path) -> None:
    assert by_subject(checks(tmp_path, a2_table(health="Warning")))["NPU 7"].status == "warning"


def test_cann_that_is_not_in_the_environment(tmp_path: Path) -> None:
    check = by_subject(checks(tmp_path, a2_table(), {}))["CANN"]
    assert (check.status, "not in the environment" in check.detail) == ("error", True)
    assert "set_env.sh" in str(check.remedy)


def test_cann_that_is_too_old(tmp_path: Path) -> None:
    check = by_subject(checks(tmp_path, a2_table(), compiler="7.6.0.1.220", version="8.0.0"))["CANN"]
    assert check.status == "error"
    assert "8.0.0" in check.detail
    assert "compiler 7.6.0.1.220; MindSpore 2.7.1 takes 7.8, 8.2, 8.3" in check.detail


def test_device_nodes_without_driver_cann_and_tool(tmp_path: Path) -> None:
    nodes = write_nodes(tmp_path / "dev")
    found = by_subject(ascend_checks(AscendHost({}, tmp_path / "none", nodes, str(tmp_path / "npu-smi"))))
    assert [found[name].status for name in ("driver", "NPU", "CANN")] == ["error"] * 3
    assert all(check.remedy for check in found.values())


def test_a_driver_without_device_nodes(tmp_path: Path) -> None:
    found = by_subject(
        ascend_checks(AscendHost(SOURCED, write_ascend(tmp_path / "a"), str(tmp_path / "davinci*")))
    )
    assert found["NPU"].status == "error"
    assert "--device=/dev/davinci0" in str(found["NPU"].remedy)


def test_a_device_node_that_may_not_be_opened(tmp_path: Path) -> None:
    nodes = write_nodes(tmp_path / "dev", 1)
    # Root may open every file, so it is one that leads nowhere.
    (tmp_path / "dev" / "davinci1").symlink_to(tmp_path / "gone")
    found = by_subject(ascend_checks(AscendHost(SOURCED, write_ascend(tmp_path / "a"), nodes)))
    assert "davinci1 may not be opened" in found["NPU"].detail
    assert "HwHiAiUser" in str(found["NPU"].remedy)


def test_the_engine_s_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, wanted in PACKAGES.items():
        write_package(tmp_path, name, wanted.lstrip("=>").replace("0.11.0", "0.11.0+empty"))
    # Only these are seen, not those of this environment; what judges versions is loaded already.
    assert packaging.specifiers
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    aarch64 = [] if platform.machine() == "aarch64" else ["processor"]
    assert [check.subject for check in package_checks()] == (aarch64 or ["packages"])
    write_package(tmp_path, "torch", "2.13.0")
    found = by_subject(package_checks())
    assert (found["torch"].status, found["torch"].remedy) == ("warning", "pip uninstall torch")


def test_packages_of_other_versions_and_missing_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package(tmp_path, "vllm-mindspore", "0.4.0")
    write_package(tmp_path, "mindspore", "2.6.0")
    monkeypatch.syspath_prepend(tmp_path)
    found = by_subject(package_checks())
    assert (found["vllm-mindspore"].status, found["mindspore"].status) == ("warning", "warning")
    assert "2.6.0; vLLM-MindSpore 0.5.1 is made for 2.7.1.post1" in found["mindspore"].detail
    assert found["msadapter"].status == "error"
    assert found["mindformers"].status == "note"
    needed = by_subject(package_checks(frozenset({"mindformers"})))
    assert needed["mindformers"].status == "error"
