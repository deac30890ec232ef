"""Datasets on a hub: a server on loopback that speaks the hubs' routes, read by the `datasets` library."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from msquant.calibration.domains import Domain
from msquant.calibration.sources import Reading, parse_source
from msquant.errors import CalibrationError, HubError, MsquantError
from tests.fixtures import hub_server
from tests.fixtures.hub_content import Blob
from tests.fixtures.hub_faults import Fault

NAME = "some-org/talk"


@pytest.fixture
def server() -> hub_server.Hub:
    return hub_server.Hub()


@pytest.fixture(params=["hf", "modelers"])
def hub(
    request: pytest.FixtureRequest, server: hub_server.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The prefix of sources on the server; without TLS, because it is on loopback."""
    from huggingface_hub import constants

    monkeypatch.setenv("MSQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MODELERS_TOKEN", raising=False)
    monkeypatch.setattr("msquant.hub.choose.huggingface_token", lambda: None)
    with hub_server.serve(server) as address:
        monkeypatch.setenv("OPENMIND_HUB_ENDPOINT", address)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        yield request.param


def _read(word: str, **options: Any) -> tuple[Domain, dict[str, str]]:
    source = parse_source(word)
    found = source.place.read(source.word, Reading(**options), 16)
    (domain,) = found.domains
    return domain, found.record


def _lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _parquet(path: Path, **columns: Any) -> Path:
    pd.DataFrame(columns).to_parquet(path, row_group_size=16)
    return path


def test_a_repository_of_json_lines(server: hub_server.Hub, hub: str) -> None:
    files = {"train.jsonl": _lines({"text": "eins"}, {"text": "二"}), "test.jsonl": _lines({"text": "no"})}
    commit = server.repository(NAME).push(files)
    domain, record = _read(f"{hub}:{NAME}")
    assert (domain.texts, domain.name) == (["eins", "二"], NAME)
    assert record["commit"] == commit
    assert (record["split"], record["repository"]) == ("train", NAME)
    assert _read(f"{hub}:{NAME}:test")[0].texts == ["no"]


def test_a_repository_of_parquet_with_configurations(
    server: hub_server.Hub, hub: str, tmp_path: Path
) -> None:
    card = b"---\nconfigs:\n- config_name: zh\n  data_files:\n  - {split: dev, path: a/*.parquet}\n---\n"
    table = _parquet(tmp_path / "a.parquet", question=["q"] * 3, answer=["1", "2", "3"])
    server.repository(NAME).push({"README.md": card, "a/x.parquet": Blob(table, lfs=True)})
    domain, _ = _read(f"{hub}:{NAME}:zh:dev")
    assert domain.texts == ["q\n\n1", "q\n\n2", "q\n\n3"]


def test_an_older_revision_stays_what_it_was(server: hub_server.Hub, hub: str) -> None:
    repository = server.repository(NAME)
    first = repository.push({"a.jsonl": _lines({"text": "old"})})
    repository.push({"a.jsonl": _lines({"text": "new, and longer"})})
    domain, record = _read(f"{hub}:{NAME}@{first}")
    assert (domain.texts, record["commit"]) == (["old"], first)
    assert _read(f"{hub}:{NAME}")[0].texts == ["new, and longer"]


def test_parts_of_a_large_file_are_read_by_ranges(server: hub_server.Hub, hub: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [f"{i} " + "".join(map(chr, rng.integers(0x4E00, 0x9FFF, 4000))) for i in range(2048)]
    table = _parquet(tmp_path / "big.parquet", text=texts)
    server.repository(NAME).push({"big.parquet": Blob(table, lfs=True)})
    domain, _ = _read(f"{hub}:{NAME}", characters=40_000)
    assert 10 <= len(domain.texts) <= 16
    assert set(domain.texts) <= set(texts)
    asked = [headers["Range"] for verb, _, _, headers in server.requests if "Range" in headers]
    ends = [tuple(map(int, re.findall(r"\d+", each))) for each in asked]
    assert sum(end - start + 1 for start, end in ends) < table.stat().st_size / 2
    again, _ = _read(f"{hub}:{NAME}", characters=40_000)
    assert again.texts == domain.texts
    numbers = [int(text.split()[0]) for text in domain.texts]
    others, _ = _read(f"{hub}:{NAME}", characters=40_000, seed=5)
    assert numbers != [int(text.split()[0]) for text in others.texts]


def test_a_connection_that_breaks_within_a_file_is_tried_again(server: hub_server.Hub, hub: str) -> None:
    server.repository(NAME).push({"a.jsonl": _lines(*({"text": f"{i}" * 50} for i in range(99)))})
    server.faults.once("a.jsonl", Fault(drop_after=1000))
    assert len(_read(f"{hub}:{NAME}")[0].texts) == 99


def test_a_gated_set_without_a_token(server: hub_server.Hub, hub: str) -> None:
    server.repository(NAME).push({"a.jsonl": _lines({"text": "x"})})
    server.repository(NAME).gated = True
    with pytest.raises(HubError, match=r"access|token") as caught:
        _read(f"{hub}:{NAME}")
    assert f"{hub}:{NAME}" in str(caught.value.where)
    assert "HF_TOKEN" in str(caught.value) or "MODELERS_TOKEN" in str(caught.value)


def test_a_gated_set_with_its_token(
    server: hub_server.Hub, hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.repository(NAME).push({"a.jsonl": _lines({"text": "x"})})
    server.repository(NAME).gated = True
    monkeypatch.setenv("MODELERS_TOKEN", server.token)
    monkeypatch.setattr("msquant.hub.choose.huggingface_token", lambda: server.token)
    assert _read(f"{hub}:{NAME}")[0].texts == ["x"]


def test_a_revision_that_has_vanished(server: hub_server.Hub, hub: str) -> None:
    server.repository(NAME).push({"a.jsonl": _lines({"text": "x"})})
    with pytest.raises(HubError, match=r"no such (revision|branch)"):
        _read(f"{hub}:{NAME}@{'0' * 40}")


def test_a_set_that_is_a_script(server: hub_server.Hub, hub: str, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    server.repository(NAME).push({"talk.py": f"open({str(trap)!r}, 'w')".encode()})
    with pytest.raises(CalibrationError, match="no file that can be read"):
        _read(f"{hub}:{NAME}")
    assert not trap.exists()


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([{"text": "fine"}, {"text": 3}], "cannot be read|holds int"),
        ([{"body": "fine"}], "no column is known"),
        ([], "holds no text"),
    ],
)
def test_bad_rows_are_named(server: hub_server.Hub, hub: str, rows: list[Any], what: str) -> None:
    server.repository(NAME).push({"a.jsonl": _lines(*rows)})
    with pytest.raises(CalibrationError, match=what) as caught:
        _read(f"{hub}:{NAME}")
    assert f"{hub}:{NAME}" in str(caught.value.where)


def test_mixed_encodings(server: hub_server.Hub, hub: str) -> None:
    content = _lines({"text": "fine"}) + '{"text": "Grüße"}\n'.encode("latin-1")
    server.repository(NAME).push({"a.jsonl": content})
    with pytest.raises(CalibrationError, match="cannot be read as json"):
        _read(f"{hub}:{NAME}")


def test_no_network_says_what_to_download_and_that_copy_is_read(
    server: hub_server.Hub, hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The remedy is followed: the command that it names, into the place that it names."""
    from typer.testing import CliRunner

    from msquant.cli.app import app

    commit = server.repository(NAME).push({"train.jsonl": _lines({"text": "x"}), "test.jsonl": _lines({})})
    with pytest.raises(CalibrationError, match="not on this machine") as caught:
        _read(f"{hub}:{NAME}", offline=True)
    remedy = caught.value.remedy or ""
    command = re.search(r"msquant (download .*?);", remedy)
    place = re.search(r"bring FOLDER here as (\S+):", remedy)
    assert command
    assert place
    arguments = command[1].replace("FOLDER", place[1]).split()
    assert CliRunner().invoke(app, arguments).exit_code == 0
    domain, record = _read(f"{hub}:{NAME}", offline=True)
    assert (domain.texts, record["commit"]) == (["x"], commit)


def test_a_hub_that_is_gone(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("OPENMIND_HUB_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(MsquantError, match=r"cannot be reached") as caught:
        _read(f"{hub}:{NAME}")
    assert "msquant download" in (caught.value.remedy or "")


def test_a_short_name_knows_where_and_how(
    server: hub_server.Hub, hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if hub != "hf":
        pytest.skip("the short names are of the Hugging Face Hub")
    rows = [{"question": "1+1?", "answer": "2", "title": "x"}]
    server.repository("openai/gsm8k").push({"main/train.jsonl": _lines(*rows)})
    domain, record = _read("gsm8k")
    assert domain.texts == ["1+1?\n\n2"]
    assert record["licence"] == "MIT"
    squad = {"context": "c", "question": "q?", "answers": {"text": ["a"], "answer_start": [0]}}
    server.repository("rajpurkar/squad").push({"train.jsonl": _lines(squad)})
    assert _read("squad")[0].texts == ["c\n\nq?\n\na"]
