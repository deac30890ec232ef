"""What the driver's tools and CANN's files say; the stand-ins print what the real ones print."""

from pathlib import Path

import pytest

from msquant.errors import EngineError
from msquant.inference.ascend_host import (
    Npu,
    device_nodes,
    driver_version,
    find_cann,
    installed_npus,
    network_state,
    parse_npu_smi,
    run_tool,
)
from tests.inference.ascend_host import (
    A3_TABLE,
    P310_TABLE,
    a2_table,
    write_ascend,
    write_hccn_tool,
    write_nodes,
    write_tool,
)


def test_eight_npus_of_an_a2(tmp_path: Path) -> None:
    npus = installed_npus(str(write_tool(tmp_path / "npu-smi", a2_table())))
    assert [npu.index for npu in npus] == list(range(8))
    assert npus[7] == Npu(7, 7, "910B3", "OK", 3395, 65536)


def test_a_container_that_sees_one_npu_counts_it_as_the_first() -> None:
    assert parse_npu_smi(a2_table(1, first=5)) == [Npu(0, 5, "910B3", "OK", 3395, 65536)]


def test_two_chips_on_a_card_of_an_a3() -> None:
    assert parse_npu_smi(A3_TABLE) == [
        Npu(0, 2, "Ascend910", "OK", 61609, 65536),
        Npu(1, 3, "Ascend910", "Alarm", 3412, 65536),
    ]


def test_a_310p_has_no_column_for_hbm() -> None:
    assert parse_npu_smi(P310_TABLE) == [Npu(0, 0, "310P3", "OK", 994, 21534)]


@pytest.mark.parametrize("text", ["", "no such device\n", "| NPU | Name |\n| 0 |\n"])
def test_a_table_of_another_form_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(EngineError, match="lists no NPU"):
        installed_npus(str(write_tool(tmp_path / "npu-smi", text)))


def test_a_tool_that_fails_hangs_or_is_missing(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"fails: dcmi module initialize failed\. ret is -8005"):
        run_tool([str(write_tool(tmp_path / "a", "dcmi module initialize failed. ret is -8005", 1)), "info"])
    slow = tmp_path / "b"
    slow.write_text("#!/bin/sh\nexec sleep 30\n")
    slow.chmod(0o755)
    with pytest.raises(EngineError, match="gave no answer"):
        run_tool([str(slow)], seconds=0.2)
    with pytest.raises(EngineError, match="is not installed") as caught:
        run_tool(["no-such-tool", "info"])
    assert "put no-such-tool into PATH" in str(caught.value)
    (tmp_path / "c").write_bytes(b"\x7fELF")
    (tmp_path / "c").chmod(0o755)
    with pytest.raises(EngineError, match="cannot be run"):
        run_tool([str(tmp_path / "c")])


def test_a_chip_s_own_network(tmp_path: Path) -> None:
    good, bad = write_hccn_tool(tmp_path / "a"), write_hccn_tool(tmp_path / "b", "DOWN", "Fault")
    assert network_state(3, str(good)) == {"link status": "UP", "net health status": "Success"}
    assert network_state(3, str(bad)) == {"link status": "DOWN", "net health status": "Fault"}


def test_device_nodes_are_in_order_of_their_numbers(tmp_path: Path) -> None:
    assert [path.name for path in device_nodes(write_nodes(tmp_path, 12))] == [
        f"davinci{i}" for i in range(12)
    ]


def test_cann_where_it_is_installed_and_where_the_environment_says(tmp_path: Path) -> None:
    usual = write_ascend(tmp_path / "Ascend")
    cann = find_cann({}, usual)
    assert cann is not None
    assert (cann.version, cann.compiler, cann.is_supported) == ("8.3.RC1", "8.3.0.1.200", True)
    own = write_ascend(tmp_path / "own", "7.6.0.1.220", "8.0.0") / "ascend-toolkit" / "latest"
    chosen = find_cann({"ASCEND_HOME_PATH": str(own)}, usual)
    assert chosen is not None
    assert (chosen.folder, chosen.version, chosen.is_supported) == (own, "8.0.0", False)
    assert find_cann({"ASCEND_HOME_PATH": str(tmp_path / "gone")}, tmp_path / "none") is None


def test_cann_without_readable_files_is_taken_as_mindspore_takes_it(tmp_path: Path) -> None:
    (tmp_path / "cann").mkdir()
    cann = find_cann({}, tmp_path)
    assert cann is not None
    assert (cann.version, cann.is_supported) == (None, True)


def test_driver(tmp_path: Path) -> None:
    assert driver_version(write_ascend(tmp_path / "Ascend")) == "24.1.rc2"
    assert driver_version(tmp_path) is None
