"""What the server tells of its requests: a line of the access log each, and metrics in Prometheus' text form.

The names are vLLM's, with this program's prefix: a dashboard of the one shows the other.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ACCESS_LOG = "msquant.access"
"""The name of the logger that gets a line for each request, at the level INFO."""
CLIENT_CLOSED = 499
"""The status of a request whose client went away before its answer, as nginx logs it."""
# What clients may make up is no label: each value of one is kept for ever.
_OTHER = "other"
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
_SHOWN = 100
_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80)
_NEXT_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5)
_WHOLE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)


class Metrics:
    """Counts of one server.

    Args:
        model: label of everything that is about the engine.
    """

    def __init__(self, model: str) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        by_model = ["model_name"]

        def gauge(name: str, about: str) -> Gauge:
            return Gauge(f"msquant:{name}", about, by_model, registry=registry).labels(model)

        def counter(name: str, about: str) -> Counter:
            return Counter(f"msquant:{name}", about, by_model, registry=registry).labels(model)

        def seconds(name: str, about: str, buckets: Sequence[float]) -> Histogram:
            found = Histogram(f"msquant:{name}_seconds", about, by_model, registry=registry, buckets=buckets)
            return found.labels(model)

        self.running = gauge("num_requests_running", "Requests whose tokens are computed")
        self.waiting = gauge("num_requests_waiting", "Requests whose prompts are being tokenized")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of accepted prompts")
        self.generation_tokens = counter("generation_tokens", "New tokens")
        self.first_token = seconds("time_to_first_token", "From a request to its first token", _FIRST_TOKEN)
        self.next_token = seconds("inter_token_latency", "From a token to the next", _NEXT_TOKEN)
        self.whole = seconds("e2e_request_latency", "From a request to the end of its answer", _WHOLE)
        self._finished = Counter(
            "msquant:request_success", "Answers", [*by_model, "finished_reason"], registry=registry
        )
        self._model = model
        self._requests = Counter(
            "http_requests", "Answered requests", ["method", "handler", "status"], registry=registry
        )

    def answered(self, method: str, handler: str, status: int) -> None:
        """Count a request."""
        self._requests.labels(method, handler, str(status)).inc()

    def finished(self, reason: str) -> None:
        """Count an answer."""
        self._finished.labels(self._model, reason).inc()

    def text(self) -> bytes:
        """All of it, in Prometheus' text form 0.0.4."""
        return generate_latest(self._registry)


class Observation:
    """What is known of one request.

    Args:
        metrics: are told as it goes on.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._began = time.perf_counter()
        self._newest: tuple[int, float] | None = None
        self._gauge: Gauge | None = None
        self.prompt_tokens: int | None = None
        self.completion_tokens = 0

    @property
    def seconds(self) -> float:
        """Since its headers came."""
        return time.perf_counter() - self._began

    def taken(self) -> None:
        """The request has a place."""
        self._move(self._metrics.waiting)

    def started(self, prompt_tokens: int) -> None:
        """The engine works on it."""
        self._move(self._metrics.running)
        self.prompt_tokens = prompt_tokens
        self._metrics.prompt_tokens.inc(prompt_tokens)

    def piece(self, choice: int, tokens: int, reason: str | None) -> None:
        """So many tokens were added to a choice, which ended if there is a reason."""
        if tokens:
            now = self.seconds
            if self._newest is None:
                self._metrics.first_token.observe(now)
            elif self._newest[0] == choice:
                self._metrics.next_token.observe((now - self._newest[1]) / tokens)
            self._newest = choice, now
            self.completion_tokens += tokens
            self._metrics.generation_tokens.inc(tokens)
        if reason is not None:
            self._metrics.finished(reason)

    def left(self) -> None:
        """The request has no place any more."""
        self._move(None)
        if self.prompt_tokens is not None:
            self._metrics.whole.observe(self.seconds)

    def _move(self, gauge: Gauge | None) -> None:
        if self._gauge is not None:
            self._gauge.dec()
        if gauge is not None:
            gauge.inc()
        self._gauge = gauge


@dataclass(frozen=True)
class Observed:
    """An ASGI application around another one, whose requests have an `Observation` in their scope.

    Attributes:
        app: what is observed.
        metrics: of its requests.
        paths: that it has; others are not told apart in the metrics.
    """

    app: ASGIApp
    metrics: Metrics
    paths: frozenset[str]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a connection event as ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = CLIENT_CLOSED

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        observation = scope["observation"] = Observation(self.metrics)
        try:
            await self.app(scope, receive, watched)
        finally:
            self._tell(scope, status, observation)

    def _tell(self, scope: Scope, status: int, observation: Observation) -> None:
        method = scope["method"] if scope["method"] in _METHODS else _OTHER
        path = getattr(scope.get("route"), "path", scope["path"])
        handler = path if path in self.paths else _OTHER
        self.metrics.answered(method, handler, status)
        # The path as it came, percent-encoded, and without a query: neither text nor keys of a client's.
        shown = scope["raw_path"].decode("ascii", "backslashreplace")[:_SHOWN]
        fields = {"status": status}
        if observation.prompt_tokens is not None:
            fields["prompt_tokens"] = observation.prompt_tokens
            fields["completion_tokens"] = observation.completion_tokens
        written = " ".join(f"{name}={value}" for name, value in fields.items())
        logging.getLogger(ACCESS_LOG).info(
            "%s %s %s seconds=%.3f", scope["method"][:_SHOWN], shown, written, observation.seconds
        )
