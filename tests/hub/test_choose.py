"""Which hub is asked, in which order, and with whose token."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from msquant.errors import HubError, ModelError
from msquant.hub.choose import find_snapshot, make_hub, token_from_file
from msquant.hub.retry import UnreachableError
from tests.fixtures.hub_faults import Fault
from tests.fixtures.hub_server import Hub, serve
from tests.hub.conftest import QUICK

LIVES_THERE, ELSEWHERE = "MindSpore-Lab/DeepSeek-R1-W8A8", "Qwen/Qwen3-8B"
NOWHERE = "http://127.0.0.1:9"
SECRET = "om_0123456789secret"


@pytest.fixture
def modelers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Modelers, on loopback, which needs no TLS there; without a token."""
    monkeypatch.delenv("MODELERS_TOKEN", raising=False)
    with serve(hub := Hub()) as address:
        monkeypatch.setenv("OPENMIND_HUB_ENDPOINT", address)
        yield hub


@pytest.fixture
def huggingface(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The Hugging Face Hub; huggingface_hub reads its environment once, when it is imported."""
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    with serve(hub := Hub()) as address:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        yield hub


def find(repository: str, hub: str = "auto", **options: Path) -> tuple[str, list[str]]:
    notes: list[str] = []
    snapshot = find_snapshot(repository, hub=hub, limits=QUICK, note=notes.append, **options)
    return snapshot.hub.name, notes


def test_auto_asks_where_the_organisation_lives(modelers: Hub, huggingface: Hub) -> None:
    for hub in (modelers, huggingface):
        for name in (LIVES_THERE, ELSEWHERE):
            hub.repository(name).push({"a": b"x"})
    assert find(LIVES_THERE) == ("modelers", [])
    assert huggingface.requests == []
    modelers.requests.clear()
    assert find(ELSEWHERE) == ("huggingface", [])
    assert modelers.requests == []
    assert find(ELSEWHERE, "modelers") == ("modelers", [])


@pytest.mark.parametrize(("name", "taken"), [(LIVES_THERE, "huggingface"), (ELSEWHERE, "modelers")])
def test_auto_falls_back_and_says_so(name: str, taken: str, modelers: Hub, huggingface: Hub) -> None:
    {"modelers": modelers, "huggingface": huggingface}[taken].repository(name).push({"a": b"x"})
    hub, notes = find(name)
    assert hub == taken
    assert len(notes) == 1
    assert "taken from" in notes[0]
    assert "no such repository" in notes[0]


def test_auto_falls_back_from_a_hub_that_is_away(huggingface: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENMIND_HUB_ENDPOINT", NOWHERE)
    huggingface.repository(LIVES_THERE).push({"a": b"x"})
    hub, notes = find(LIVES_THERE)
    assert hub == "huggingface"
    assert "cannot be reached" in notes[0]


def test_auto_does_not_fall_back_from_a_refusal(modelers: Hub, huggingface: Hub) -> None:
    modelers.repository(LIVES_THERE).push({"a": b"x"})
    modelers.repository(LIVES_THERE).private = True
    huggingface.repository(LIVES_THERE).push({"a": b"evil"})
    with pytest.raises(HubError, match="asks for a token"):
        find(LIVES_THERE)
    assert huggingface.requests == []


def test_on_neither_hub(modelers: Hub, huggingface: Hub) -> None:
    with pytest.raises(HubError, match=r"found on neither hub: Modelers: .*; Hugging Face Hub: ") as caught:
        find(LIVES_THERE)
    assert caught.value.where == LIVES_THERE


def test_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENMIND_HUB_ENDPOINT", NOWHERE)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", NOWHERE)
    with pytest.raises(UnreachableError, match="no hub can be reached") as caught:
        find(LIVES_THERE)
    assert "HTTPS_PROXY" in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("repository", "revision", "hub", "words"),
    [
        ("../evil", "main", "auto", "organisation/name"),
        ("gpt2", "main", "auto", "organisation/name"),
        (ELSEWHERE, "../x", "auto", "--revision"),
        (ELSEWHERE, "", "auto", "--revision"),
        (ELSEWHERE, "--x", "auto", "--revision"),
        (ELSEWHERE, "main", "gitcode", "modelers, huggingface"),
    ],
)
def test_wrong_options(repository: str, revision: str, hub: str, words: str) -> None:
    with pytest.raises(ModelError) as caught:
        find_snapshot(repository, revision, hub)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "address", ["modelers.cn", "ftp://modelers.cn", "https://name:word@modelers.cn", "https://"]
)
def test_an_address_that_is_none(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENMIND_HUB_ENDPOINT", address)
    with pytest.raises(HubError, match="not one of the form") as caught:
        make_hub("modelers")
    assert caught.value.where == "OPENMIND_HUB_ENDPOINT"
    assert "word" not in str(caught.value)


# Tokens.


def sent(hub: Hub) -> set[str | None]:
    return {headers.get("Authorization") for *_, headers in hub.requests}


def test_each_hub_gets_its_own_token(
    modelers: Hub, huggingface: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELERS_TOKEN", modelers.token)
    monkeypatch.setenv("HF_TOKEN", "for-hugging-face")
    huggingface.token = "for-hugging-face"
    huggingface.repository(LIVES_THERE).push({"a": b"x"})
    assert find(LIVES_THERE)[0] == "huggingface"
    assert sent(modelers) == {f"Bearer {modelers.token}"}
    assert sent(huggingface) == {"Bearer for-hugging-face"}


def test_the_token_that_hf_auth_login_stored_is_found(huggingface: Hub, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(huggingface.token + "\n")
    huggingface.repository(ELSEWHERE).push({"a": b"x"})
    huggingface.repository(ELSEWHERE).private = True
    assert find(ELSEWHERE)[0] == "huggingface"


def test_a_token_file_names_its_hub(modelers: Hub, huggingface: Hub, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text(modelers.token + "\n")
    modelers.repository(LIVES_THERE).push({"a": b"x"})
    modelers.repository(LIVES_THERE).private = True
    assert find(LIVES_THERE, "modelers", token_file=tmp_path / "mine")[0] == "modelers"
    with pytest.raises(HubError, match="for one hub") as caught:
        find(LIVES_THERE, token_file=tmp_path / "mine")
    assert "--hub modelers" in str(caught.value.remedy)


@pytest.mark.parametrize(
    "content", [b"", b"\n", SECRET.encode() + b"\nmore", b"\xff" * 9, SECRET.encode() * 300]
)
def test_a_file_that_holds_no_token_is_not_shown(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(HubError) as caught:
        token_from_file(tmp_path / "t")
    assert SECRET not in str(caught.value)
    assert caught.value.where == str(tmp_path / "t")


def test_no_token_file(tmp_path: Path) -> None:
    with pytest.raises(HubError, match="No such file"):
        token_from_file(tmp_path / "t")


def test_a_wrong_token_is_in_no_error(
    modelers: Hub, huggingface: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("MODELERS_TOKEN", "HF_TOKEN"):
        monkeypatch.setenv(variable, SECRET)
    for hub, name in ((modelers, "modelers"), (huggingface, "huggingface")):
        hub.repository(ELSEWHERE).push({"a": b"x"})
        hub.repository(ELSEWHERE).private = True
        hub.faults.always("revision", Fault(status=401, headers={"X-Error-Message": f"bad {SECRET}"}))
        with pytest.raises(HubError) as caught:
            find(ELSEWHERE, name)
        assert SECRET not in repr(caught.value) + str(caught.value)


def test_netrc_takes_no_part(modelers: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password word\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    modelers.repository(LIVES_THERE).push({"a": b"x"})
    find(LIVES_THERE)
    monkeypatch.setenv("MODELERS_TOKEN", modelers.token)
    find(LIVES_THERE)
    assert sent(modelers) == {None, f"Bearer {modelers.token}"}
    assert os.environ["NETRC"]
