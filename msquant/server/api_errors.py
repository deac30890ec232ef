"""What a client is told when its request fails, in the shape that OpenAI's clients read."""

import json

# pydantic takes no other one before Python 3.12.
from typing_extensions import TypedDict

from msquant.errors import MsquantError

INVALID_REQUEST = "invalid_request_error"
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ErrorDetail(TypedDict):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorDocument(TypedDict):
    """The body of every answer that is an error, https://platform.openai.com/docs/guides/error-codes."""

    error: ErrorDetail


class ApiError(Exception):
    """A request that is refused, or that failed.

    Args:
        status: HTTP status.
        message: the fact and what to do, in one line.
        param: the field of the request that is wrong.
        code: a name for programs.
        headers: of the response, for example `Retry-After`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    @classmethod
    def of(cls, error: MsquantError, status: int = 400, param: str | None = None) -> "ApiError":
        """What a client may know of one of msquant's own errors: not the place, which names files here."""
        return cls(status, error.what + (f"; {error.remedy}" if error.remedy else ""), param=param)

    def document(self) -> ErrorDocument:
        """The body."""
        kind = _TYPES.get(self.status, INVALID_REQUEST if self.status < 500 else "server_error")
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code},
        }

    def body(self) -> bytes:
        """The document as ASCII JSON, so that even half a surrogate pair of the client's can be repeated."""
        return json.dumps(self.document()).encode("ascii")

    def raw_headers(self) -> list[tuple[bytes, bytes]]:
        """The response's headers, as ASGI takes them."""
        headers = {"content-type": "application/json", "content-length": str(len(self.body()))}
        return [(k.lower().encode(), v.encode()) for k, v in (headers | self.headers).items()]


def busy(message: str) -> ApiError:
    """The refusal of a request that may be repeated in a moment."""
    return ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": "1"})
