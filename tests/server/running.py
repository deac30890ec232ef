"""A server in a thread of the test's own process, so that its tasks and its engine can be looked at."""

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from openai import OpenAI

from msquant.inference.embedded import EmbeddedEngine
from msquant.server.address import bind
from msquant.server.http_server import HttpServer, ServerOptions

MODEL = "tiny"
# The server's own task, and the one of the function that counts.
IDLE_TASKS = 2


@dataclass
class RunningServer:
    """A server that clients can connect to."""

    server: HttpServer
    port: int
    loop: asyncio.AbstractEventLoop

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **options: Any) -> OpenAI:
        """The real client, which does not repeat failed requests here."""
        settings = {"api_key": "none", "max_retries": 0, "timeout": 60} | options
        return OpenAI(base_url=f"{self.url}/v1", **settings)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, timeout=60, trust_env=False, **options)

    def tasks(self) -> int:
        """How many asyncio tasks the server has."""

        async def count() -> int:
            return len(asyncio.all_tasks())

        return asyncio.run_coroutine_threadsafe(count(), self.loop).result(10)

    def wait_until_idle(self, seconds: float = 20) -> None:
        """Wait until no request, no task and no connection is left."""

        def idle() -> bool:
            return (
                self.server.worker.active == 0
                and not self.server.server_state.connections
                and self.tasks() <= IDLE_TASKS
            )

        wait_for(idle, seconds)


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until a condition holds, or fail."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def open_files() -> int:
    """How many file descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def running(engine: EmbeddedEngine, **options: Any) -> Iterator[RunningServer]:
    """Run a server with these `ServerOptions` until the block ends."""
    listener = bind("127.0.0.1", 0)
    ready = threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    def on_ready() -> None:
        loops.append(asyncio.get_running_loop())
        ready.set()

    with closing(listener):
        server = HttpServer(engine, MODEL, ServerOptions(**options), on_ready)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        assert ready.wait(20)
        try:
            yield RunningServer(server, listener.getsockname()[1], loops[0])
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()
