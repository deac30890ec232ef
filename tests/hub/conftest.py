"""A hub on loopback for both protocols: Hugging Face's without TLS, Modelers' with it."""

import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from msquant.hub.huggingface import HuggingFaceHub
from msquant.hub.listing import Hub
from msquant.hub.modelers import ModelersHub
from msquant.hub.retry import Limits
from tests.fixtures import hub_server

QUICK = Limits(
    connect_seconds=2,
    read_seconds=1,
    first_attempts=2,
    attempts=5,
    backoff_seconds=0.01,
    max_backoff_seconds=0.05,
)
REPOSITORY = "some-org/tiny"


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, Path]:
    """A server's TLS with a certificate of our own, and the authority's file for clients."""
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost", "127.0.0.1", "modelers.cn").configure_cert(context)
    path = tmp_path_factory.mktemp("authority") / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return context, path


@pytest.fixture
def server() -> hub_server.Hub:
    """What the servers of this test hold; change it to change them."""
    return hub_server.Hub()


@pytest.fixture(params=["huggingface", "modelers"])
def protocol(request: pytest.FixtureRequest) -> str:
    """The hub whose protocol is spoken; tests with it run once for each."""
    return str(request.param)


@pytest.fixture
def endpoint(
    protocol: str,
    server: hub_server.Hub,
    authority: tuple[ssl.SSLContext, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[str]:
    """The address of a server that speaks the protocol."""
    for variable in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.lower(), raising=False)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(authority[1]))
    with hub_server.serve(server, authority[0] if protocol == "modelers" else None) as address:
        yield address


def connect(protocol: str, endpoint: str, token: str | None = None, limits: Limits = QUICK) -> Hub:
    """A client of ours for a server of that protocol."""
    return (ModelersHub if protocol == "modelers" else HuggingFaceHub)(endpoint, token, limits)
