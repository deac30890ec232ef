"""One thread that owns the engine, and gives the requests their next step in turn."""

import asyncio
import logging
import threading
from collections.abc import Generator
from typing import Any, Generic, TypeVar

from msquant.server.api_errors import ApiError, busy

# A client that reads slower than its text is made holds so many steps, and then waits for nobody but itself.
QUEUED_STEPS = 32

_log = logging.getLogger("msquant.serve")
Step = TypeVar("Step")


class AnswerJob(Generic[Step]):
    """One request's steps as an asynchronous iterator; it raises what a step raised.

    It takes one of the worker's places until `close`, which also ends the work on it.
    """

    def __init__(self, worker: "AnswerWorker", steps: Generator[Step, None, None]) -> None:
        self.steps = steps
        self.unread = 0
        self.finished = False
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Step | Exception | None] = asyncio.Queue()

    def __aiter__(self) -> "AnswerJob[Step]":
        return self

    async def __anext__(self) -> Step:
        item = await self._queue.get()
        self._worker.taken(self)
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, Exception):
            raise item
        return item

    def put(self, item: Step | Exception | None) -> None:
        """Hand over a step, the error that ended the steps, or None at their end; from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
        except RuntimeError:  # The event loop is closed: nobody listens any more.
            _log.debug("a step came after the server's end")

    def close(self) -> None:
        """Give up the place, and the work if it is not finished."""
        self._worker.drop(self)


class AnswerWorker:
    """Runs at most `limit` jobs, one step of each after the other, in a thread of its own.

    Args:
        limit: so many requests at once; the next one is refused.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._jobs: list[AnswerJob] = []
        self._dropped: list[AnswerJob] = []
        self._stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def active(self) -> int:
        """How many requests have a place."""
        with self._changed:
            return len(self._jobs)

    @property
    def alive(self) -> bool:
        """Whether requests are still worked on."""
        return self._thread.is_alive() and not self._stopping

    def refusal(self) -> ApiError | None:
        """Why no request is taken now: 429 or 503, as of `submit`; None if there is a place."""
        with self._changed:
            if not self.alive:
                return _unavailable()
            if len(self._jobs) >= self._limit:
                return busy(f"the server works on {self._limit} requests already; try again later")
            return None

    def submit(self, steps: Generator[Step, None, None]) -> AnswerJob[Step]:
        """Take a request; its steps run in the worker's thread. To be called in an event loop.

        Raises:
            ApiError: 429 if all places are taken, 503 if the server is stopping or its engine has died.
        """
        with self._changed:
            refusal = self.refusal()
            if refusal is not None:
                raise refusal
            job = AnswerJob(self, steps)
            self._jobs.append(job)
            self._changed.notify()
        return job

    def taken(self, job: AnswerJob) -> None:
        """A step of a job was read."""
        with self._changed:
            job.unread -= 1
            self._changed.notify()

    def drop(self, job: AnswerJob) -> None:
        """Forget a job, whether or not it is finished."""
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
                self._dropped.append(job)
                self._changed.notify()

    def stop(self, timeout: float) -> None:
        """End every job with an error, and the thread, which may need `timeout` seconds for its step."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout)

    def _run(self) -> None:
        try:
            while not self._stopping:
                dropped, ready = self._next_round()
                for job in dropped:
                    job.steps.close()
                for job in ready:
                    self._advance(job)
        finally:
            with self._changed:
                self._stopping = True
                left = [job for job in self._jobs if not job.finished]
            for job in left:
                job.put(_unavailable())

    def _next_round(self) -> tuple[list[AnswerJob], list[AnswerJob]]:
        """Wait for something to do: the jobs to close, and those to advance."""

        def ready() -> list[AnswerJob]:
            return [job for job in self._jobs if not job.finished and job.unread < QUEUED_STEPS]

        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._dropped or ready())
            dropped, self._dropped = self._dropped, []
            return dropped, ready()

    def _advance(self, job: AnswerJob) -> None:
        item: Any
        try:
            item = next(job.steps)
        except StopIteration:
            item = None
        except Exception as error:
            item = error
        with self._changed:
            job.unread += 1
            job.finished = item is None or isinstance(item, Exception)
        job.put(item)


def _unavailable() -> ApiError:
    return ApiError(503, "the server is stopping, or its engine has died", code="unavailable")
