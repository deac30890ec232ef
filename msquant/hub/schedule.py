"""Which piece of which file is fetched next."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from msquant.hub.job import Job

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
