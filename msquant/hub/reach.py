"""Whether a hub answers at all."""

from dataclasses import dataclass

from msquant.errors import HubError
from msquant.hub.addresses import shown
from msquant.hub.choose import is_offline, make_hub


@dataclass(frozen=True)
class HubAnswer:
    """What came back.

    Attributes:
        reached: the hub answered, whatever it said.
        offline: it was not asked, because `HF_HUB_OFFLINE` is set.
        detail: for people: its address, and why it was not reached.
    """

    reached: bool
    offline: bool
    detail: str


def ask_hub(name: str, seconds: float) -> HubAnswer:
    """Ask a hub for its front page, without a token, and take any answer but a server's own failure.

    Args:
        name: `modelers` or `huggingface`.
        seconds: how long to wait for the connection, and then for the answer.
    """
    import requests

    from msquant.hub.session import HubSession

    try:
        endpoint = make_hub(name).client.endpoint
    except HubError as error:
        return HubAnswer(False, False, f"{error.where}: {error.what}" if error.where else error.what)
    if is_offline():
        return HubAnswer(False, True, f"{shown(endpoint)} is not asked: HF_HUB_OFFLINE is set")
    try:
        with (
            HubSession() as session,
            session.get(endpoint, timeout=seconds, stream=True, allow_redirects=False) as response,
        ):
            status = response.status_code
    except requests.RequestException as error:
        return HubAnswer(False, False, f"{shown(endpoint)} cannot be reached: {_reason(error)}")
    if status >= 500:
        return HubAnswer(False, False, f"{shown(endpoint)} answers with {status}")
    return HubAnswer(True, False, f"{shown(endpoint)} answers")


def _reason(error: Exception) -> str:
    """The innermost cause, in a few words."""
    text = str(error)
    for known in ("Name or service not known", "Temporary failure in name resolution", "Connection refused"):
        if known in text:
            return known.lower()
    return {"ConnectTimeout": "no answer in time", "ReadTimeout": "no answer in time"}.get(
        type(error).__name__, type(error).__name__
    )
