"""The sessions of all requests to hubs: ours, and those of the Hugging Face Hub's own client."""

from collections.abc import Mapping, MutableMapping
from typing import Any

import requests
from requests.auth import AuthBase

from msquant.hub.addresses import is_loopback

# An empty proxy is found before what the environment says, and means none.
_DIRECT = {"http": "", "https": "", "all": ""}


class _NoAuth(AuthBase):
    """Keeps requests from sending what ~/.netrc says in place of the token."""

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        return request


class HubSession(requests.Session):
    """A session that asks no proxy for this machine, and takes no password from ~/.netrc.

    Otherwise the environment holds: `HTTPS_PROXY`, `NO_PROXY`, `REQUESTS_CA_BUNDLE`. To a proxy for plain
    HTTP a request is readable; `HttpClient` lets no token go where that can happen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.auth = _NoAuth()

    def merge_environment_settings(self, url: Any, proxies: Any, *rest: Any) -> Any:
        """What the environment adds to a request; see requests."""
        return super().merge_environment_settings(url, dict(_DIRECT) if is_loopback(url) else proxies, *rest)

    def rebuild_proxies(
        self, prepared_request: requests.PreparedRequest, proxies: Mapping[str, str] | None
    ) -> MutableMapping[str, str]:
        """The proxies of a redirect; see requests."""
        if is_loopback(str(prepared_request.url)):
            return dict(_DIRECT)
        return super().rebuild_proxies(prepared_request, proxies)
