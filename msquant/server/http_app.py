"""The HTTP interface: OpenAI's paths, and its errors for everything that goes wrong."""

import secrets
import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response

from msquant import __version__
from msquant.inference.embedded import EmbeddedEngine
from msquant.server.api_errors import ApiError, ErrorDocument
from msquant.server.observed import Metrics
from msquant.server.pages import Pages
from msquant.server.reply import Reply
from msquant.server.requests import ChatRequest, CompletionRequest
from msquant.server.shapes import ChatShape, Shape
from msquant.server.steps import RequestLimits, chat, complete
from msquant.server.worker import AnswerWorker

# Of a client's own words in a message.
_SHOWN = 100
_MEDIA_TYPE = "send the body as JSON with the header Content-Type: application/json"


def build_app(
    engine: EmbeddedEngine,
    worker: AnswerWorker,
    model: str,
    limits: RequestLimits,
    metrics: Metrics,
    keyed: bool,
) -> FastAPI:
    """The application, without the guards of `Guard`; requests must have been through `Observed`.

    Args:
        engine: used in the worker's thread alone.
        worker: runs the requests.
        model: the id of the model.
        limits: what one request may ask for.
        metrics: what `/metrics` tells.
        keyed: whether clients must send a key.
    """
    app = FastAPI(
        title="msquant serve",
        version=__version__,
        description=f"OpenAI's HTTP interface to {model}",
        docs_url=None,
        redoc_url=None,
    )
    refused: dict[int | str, dict[str, Any]] = {
        "4XX": {"model": ErrorDocument, "description": "Refused, and why"}
    }
    created = int(time.time())

    def check_model(asked: str | None) -> None:
        if asked is not None and asked != model:
            raise ApiError(
                404,
                f"the model {asked[:_SHOWN]!r} is not here; this server has {model!r}",
                param="model",
                code="model_not_found",
            )

    longest = limits.longest_answer(engine.config.longest)
    pages = Pages(model, keyed, chats=bool(engine.tokenizer.chat_template), longest=longest)

    @app.get("/", include_in_schema=False)
    async def home(request: Request) -> Response:
        return pages.home(request.headers["host"])

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return pages.docs(app.openapi())

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Requests, tokens and times in Prometheus' text form."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    @app.get("/health")
    async def health() -> JSONResponse:
        """200 with the number of active requests; 503 when the engine has died."""
        status = "ok" if worker.alive else "the engine has stopped"
        document = {"status": status, "active_requests": worker.active}
        return JSONResponse(document, 200 if worker.alive else 503)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [_model(model, created)]}

    @app.get("/v1/models/{asked:path}", responses=refused)
    async def one_model(asked: str) -> dict[str, Any]:
        """The model, if it has this id."""
        check_model(asked)
        return _model(model, created)

    @app.post("/v1/completions", responses=refused)
    async def completions(body: CompletionRequest) -> Response:
        """Continue texts."""
        check_model(body.model)
        steps = complete(engine, body, limits, secrets.randbits(32))
        return Reply(worker, steps, Shape(model), stream=bool(body.stream), include_usage=body.include_usage)

    @app.post("/v1/chat/completions", responses=refused)
    async def chat_completions(body: ChatRequest) -> Response:
        """Answer a chat."""
        check_model(body.model)
        steps = chat(engine, body, limits, secrets.randbits(32))
        return Reply(
            worker, steps, ChatShape(model), stream=bool(body.stream), include_usage=body.include_usage
        )

    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    return app


def _model(model: str, created: int) -> dict[str, Any]:
    return {"id": model, "object": "model", "created": created, "owned_by": "msquant"}


def _response(error: ApiError) -> Response:
    headers = {"content-type": "application/json", **error.headers}
    return Response(error.body(), error.status, headers)


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _response(error)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _response(ApiError(error.status_code, error.detail, headers=dict(error.headers or {})))


async def _invalid(request: Request, error: Exception) -> Response:
    """A body that is no JSON, or not the one that the path takes; the first thing that is wrong is named."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [part for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return _response(ApiError(400, f"the body is not JSON: {first['ctx']['error']}", code="invalid_json"))
    if not place and first["type"] in ("model_attributes_type", "missing"):
        is_json = "json" in request.headers.get("content-type", "")
        return _response(
            ApiError(400, "the body must be a JSON object") if is_json else ApiError(415, _MEDIA_TYPE)
        )
    param = ".".join(str(part) for part in place)[:_SHOWN] or None
    if first["type"] == "extra_forbidden":
        return _response(ApiError(400, f"unknown parameter {param!r}", param=param, code="unknown_parameter"))
    named = f"{param}: " if param else ""
    return _response(ApiError(400, f"{named}{first['msg']}", param=param))
