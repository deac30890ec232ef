"""Several files at once, large ones in ranges: fetched, hashed while they arrive, and put in their place."""

import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import requests

from msquant.errors import HubError
from msquant.hub.hashing import HashPool
from msquant.hub.job import Job
from msquant.hub.listing import Snapshot
from msquant.hub.retry import Stopped, Transient, WrongFile

Task = tuple[Job, int, int]
"""A job, a segment of it, and the generation of the job that the segment is of."""


@dataclass
class _Begun:
    pending: deque[Task]
    workers: int = 0


class Schedule:
    """Spreads workers over files: a second one comes to a file only when there is no other file left.

    A file that one worker fetches from its beginning is hashed as it comes, without reading it back. The
    caller locks.

    Args:
        jobs: in the order in which they are begun.
    """

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._fresh = deque(jobs)
        self._begun: dict[Job, _Begun] = {}

    def take(self) -> Task | None:
        """The next task; None if there is none now."""
        waiting = [job for job, begun in self._begun.items() if begun.pending]
        if not any(not self._begun[job].workers for job in waiting):
            while self._fresh:
                job = self._fresh.popleft()
                if tasks := _tasks(job):
                    self._begun[job] = _Begun(tasks)
                    waiting = [job]
                    break
        if not waiting:
            return None
        begun = self._begun[min(waiting, key=lambda job: self._begun[job].workers)]
        begun.workers += 1
        return begun.pending.popleft()

    def release(self, job: Job) -> None:
        """A worker has ended a task of a job."""
        begun = self._begun[job]
        begun.workers -= 1
        if not begun.pending and not begun.workers:
            del self._begun[job]

    def renew(self, job: Job) -> None:
        """A job was started over: its tasks are others now."""
        self._begun.setdefault(job, _Begun(deque())).pending = _tasks(job)

    def drop(self, job: Job) -> None:
        """A job was given up."""
        if job in self._begun:
            self._begun[job].pending.clear()


def _tasks(job: Job) -> deque[Task]:
    return deque((job, segment, job.generation) for segment in job.unfinished())


_PIECE = 1 << 20
_END_SECONDS = 0.6
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")


class Transfer:
    """Fetches jobs with several threads; the caller's thread waits, and shows what happens.

    Args:
        snapshot: what the files belong to.
        jobs: in the order in which they are begun.
        workers: connections at once.
        verified: called, by one thread at a time, with a job and the modification time of its file when that
            is in its place.

    Attributes:
        received: bytes that came from the hub.
        present: bytes of all jobs that are on disk; less after a file is started over.
        finished: how many files are verified and in their place.
        failed: the files whose content stayed wrong.
    """

    def __init__(
        self, snapshot: Snapshot, jobs: list[Job], workers: int, verified: Callable[[Job, int], None]
    ) -> None:
        self._snapshot = snapshot
        self._client = snapshot.hub.client
        self._limits = self._client.limits
        self._jobs = jobs
        self._workers = workers
        self._verified = verified
        self._recording = threading.Lock()
        self._changed = threading.Condition()
        self._left = len(jobs)
        self._error: BaseException | None = None
        self._not_before = 0.0
        self._schedule = Schedule(jobs)
        self.received = 0
        self.present = sum(job.partial.present for job in jobs)
        self.finished = 0
        self.failed: list[str] = []

    def run(self, tick: Callable[[], None]) -> None:
        """Fetch everything; once only. After an error the snapshot's hub answers nothing any more.

        Args:
            tick: called about ten times a second from this thread.

        Raises:
            HubError: the hub refuses, or does not answer any more. What is here stays.
            OutputError: the disk is full or cannot be written. What is here stays.
            KeyboardInterrupt: Ctrl-C. Every thread has ended, or ends before it touches anything.
        """
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self._workers)]
        hashes = HashPool(self._hash, self._fail)
        self._hashes = hashes
        try:
            for thread in threads:
                thread.start()
            for job in self._jobs:
                # What an earlier run has left is hashed like what arrives.
                self._wake(job)
            while self._wait():
                tick()
            if self._error is not None:
                raise self._error
        except BaseException:
            self._client.abort()
            raise
        finally:
            with self._changed:
                self._changed.notify_all()
            deadline = time.monotonic() + _END_SECONDS
            for thread in [*threads, *hashes.stop()]:
                thread.join(max(0.0, deadline - time.monotonic()))
            for job in self._jobs:
                job.close()
        tick()

    def _wait(self) -> bool:
        """Wait a moment; False at the end."""
        with self._changed:
            if self._left and self._error is None:
                self._changed.wait(0.1)
            return bool(self._left) and self._error is None

    def _work(self) -> None:
        try:
            while (task := self._next()) is not None:
                try:
                    self._fetch(*task)
                finally:
                    with self._changed:
                        self._schedule.release(task[0])
        except Stopped:
            pass
        except BaseException as error:
            self._fail(error)

    def _next(self) -> Task | None:
        with self._changed:
            while self._left and not self._client.stop.is_set():
                if (task := self._schedule.take()) is not None:
                    return task
                self._changed.wait(1)
        return None

    def _fetch(self, job: Job, segment: int, generation: int) -> None:
        failures = slow = 0
        while (missing := job.missing_range(segment, generation)) is not None:
            try:
                self._wait_for_hub()
                self._stream(job, segment, generation, *missing)
                return
            except WrongFile:
                self._start_over(job, generation, wrong=True)
                return
            except Transient as error:
                now = job.missing_range(segment, generation)
                # A byte a connection would be progress for ever.
                progress = now is None or now[0] - missing[0] >= self._limits.progress_bytes
                failures = 1 if progress else failures + 1
                slow += error.slow
                if failures >= self._limits.attempts or slow >= self._limits.slow_attempts:
                    raise self._client.unreachable(error) from error
                if error.wait is not None:
                    # It is the hub that is asked too much, not this one file.
                    self._not_before = max(self._not_before, time.monotonic() + error.wait)
                self._client.pause(error, failures)

    def _wait_for_hub(self) -> None:
        while (wait := self._not_before - time.monotonic()) > 0:
            if self._client.stop.wait(wait):
                raise Stopped

    def _stream(self, job: Job, segment: int, generation: int, start: int, end: int) -> None:
        """Fetch the bytes from `start` to `end`. Raises Transient, WrongFile, Stopped or an MsquantError."""
        ranged = start > 0 or end < job.file.size
        headers = {"Range": f"bytes={start}-{end - 1}"} if ranged else {}
        if job.attempts:
            headers["Cache-Control"] = "no-cache"
        url = self._snapshot.hub.file_url(self._snapshot, job.file.path)
        with self._client.open(url, headers) as response:
            if ranged and response.status_code != 206:
                self._start_over(job, generation, whole=True)
                return
            _check_length(response, start, end, job.file.size)
            while start < end:
                piece = self._client.read_piece(response, min(_PIECE, end - start))
                if not piece:
                    raise Transient("the connection was closed before the end")
                if not job.write(segment, generation, piece):
                    return
                start += len(piece)
                with self._changed:
                    self.received += len(piece)
                    self.present += len(piece)
                self._wake(job)

    def _wake(self, job: Job) -> None:
        if job.wants_hashing():
            self._hashes.put(job)

    def _hash(self, job: Job, buffer: bytearray) -> None:
        right = job.hash(buffer, self._client.stop)
        if right:
            modified = job.publish(self._client.stop)
            with self._recording:
                self._verified(job, modified)
            with self._changed:
                self.finished += 1
                self._end_one()
        elif right is False:
            self._start_over(job, job.generation, wrong=True)

    def _start_over(self, job: Job, generation: int, *, whole: bool = False, wrong: bool = False) -> None:
        """Forget a file's data, because it is wrong or because the server sends no ranges of it."""
        limit = self._limits.corrupt_attempts if job.file.size else 1
        lost = job.start_over(generation, whole=whole, wrong=wrong, limit=limit)
        if lost is None:
            return
        if job.generation >= self._limits.attempts:
            raise HubError(
                f"begun {job.generation} times: {self._client.title} sends no ranges and drops connections",
                where=job.file.path,
                remedy=f"try again later, or name a mirror in {self._client.variable}",
            )
        given_up = job.attempts >= limit
        with self._changed:
            self.present -= lost
            if given_up:
                self._schedule.drop(job)
                self.failed.append(job.file.path)
                self._end_one()
            else:
                self._schedule.renew(job)
            self._changed.notify_all()
        if wrong:
            self._check_branch()

    def _check_branch(self) -> None:
        """Where files cannot be had by commit, say so if the branch has moved: its files are others now."""
        snapshot = self._snapshot
        if snapshot.reference == snapshot.commit:
            return
        now = snapshot.hub.snapshot(snapshot.repository, snapshot.revision)
        if now.commit != snapshot.commit:
            raise HubError(
                f"{snapshot.revision} moved from {snapshot.commit[:10]} to {now.commit[:10]} meanwhile",
                where=snapshot.repository,
                remedy="run the same command again; files that did not change are kept",
            )

    def _end_one(self) -> None:
        self._left -= 1
        if not self._left:
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            if self._error is None and not self._client.stop.is_set():
                self._error = error
            self._changed.notify_all()


def _check_length(response: requests.Response, start: int, end: int, size: int) -> None:
    """Hold the headers of an answer against what was asked for. Raises WrongFile."""
    if response.status_code == 206:
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if found is None or (int(found[1]), int(found[2]), found[3]) not in (
            (start, end - 1, str(size)),
            (start, end - 1, "*"),
        ):
            raise WrongFile("another range than asked for")
    elif response.headers.get("Content-Length", str(size)) != str(size):
        raise WrongFile("it has another size than listed")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise WrongFile("it is compressed")
