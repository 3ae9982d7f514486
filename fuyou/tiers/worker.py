"""One background thread that runs jobs in the order in which they were given."""

from __future__ import annotations

import atexit
import os
import queue
import threading
import weakref
from collections.abc import Callable

from fuyou.core.errors import DeadlineError, StateError
from fuyou.core.forked import refuse_forked
from fuyou.core.races import Races
from fuyou.core.ticket import DEADLINE_S, list_text

EXIT_S = 5.0  # that a program's end waits for a thread of a run that nobody closed


def before_exit(method: Callable[[], None]) -> None:
    """Call a bound method when the program ends, if its object still lives then. A thread that the interpreter's end meets in
    native code would abort the process."""
    reference = weakref.WeakMethod(method)

    def call() -> None:
        living = reference()
        if living is not None:
            living()

    atexit.register(call)


class Job:
    """The ticket of one job: `wait` raises what the job raised, any number of times."""

    __slots__ = ("_ended", "_error", "_name", "_run", "_worker")

    def __init__(self, run: Callable[[], None], name: str, worker: Worker) -> None:
        self._run: Callable[[], None] | None = run
        self._name = name
        self._worker = worker
        self._ended = threading.Event()
        self._error: BaseException | None = None

    def done(self) -> bool:
        return self._ended.is_set()

    def wait(self, timeout_s: float | None = None) -> None:
        timeout_s = self._worker.deadline_s if timeout_s is None else timeout_s
        if not self._ended.wait(timeout_s):
            raise DeadlineError(
                f"Waited {timeout_s:g} s for {self._name}, which has not ended; {self._worker.busy_text()}."
            )
        if self._error is not None:
            raise self._error

    def execute(self) -> None:
        run, self._run = self._run, None  # whatever the job holds goes with it
        try:
            if run is not None:
                run()
        except BaseException as error:
            self._error = error
        finally:
            self._worker.ended(self)
            self._ended.set()

    @property
    def name(self) -> str:
        return self._name


class Worker:
    """A daemon thread, so that an interpreter that dies does not hang on it; `close` runs what was given and joins.

    `deadline_s` is that of its jobs' waits and of `close`; `in_flight` names operations that a job may be waiting for, for
    the message of a DeadlineError. With `races` each job begins late.
    """

    def __init__(
        self,
        name: str,
        *,
        deadline_s: float = DEADLINE_S,
        in_flight: Callable[[], list[str]] | None = None,
        races: Races | None = None,
    ) -> None:
        self.deadline_s = deadline_s
        self._races = races
        self._in_flight = in_flight
        self._pid = os.getpid()
        self._lock = threading.Lock()  # guards _given
        self._given: dict[int, Job] = {}  # not ended, in the order in which they were given
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise StateError(f"No thread is to be had for {name} ({error}): raise the limit of `ulimit -u`.") from error
        before_exit(self._leave)

    def submit(self, run: Callable[[], None], name: str) -> Job:
        refuse_forked(self._pid, name)  # a lock may be held for ever by a thread that does not exist here
        if not self._thread.is_alive():
            raise StateError(f"{name}: the run is closed.")
        job = Job(run, name, self)
        with self._lock:
            self._given[id(job)] = job
            self._jobs.put(job)
        return job

    def close(self) -> None:
        """Idempotent. DeadlineError where a job has not ended in time: the thread then ends when it does."""
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join(self.deadline_s)
            if self._thread.is_alive():
                raise DeadlineError(f"Waited {self.deadline_s:g} s to close {self._thread.name}; {self.busy_text()}.")

    def _leave(self) -> None:
        if os.getpid() == self._pid:
            self._jobs.put(None)
            self._thread.join(EXIT_S)

    def ended(self, job: Job) -> None:
        """Called by Job only."""
        with self._lock:
            self._given.pop(id(job), None)

    def busy_text(self) -> str:
        """What this worker runs and what waits behind it, for a message."""
        with self._lock:
            running, *queued = [job.name for job in self._given.values()] or ["nothing"]
        text = f"{self._thread.name} runs: {running}" + (f"; queued behind it: {list_text(queued)}" if queued else "")
        operations = self._in_flight() if self._in_flight else []
        return text + (f"; {len(operations)} operations in flight: {list_text(operations)}" if operations else "")

    def _loop(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._races is not None:
                self._races.delay()
            job.execute()
            del job  # the last job's closure must not live until the next one comes
