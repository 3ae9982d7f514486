"""One background thread that runs jobs in the order in which they were given."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from fuyou.core.errors import DeadlineError, StateError
from fuyou.core.ticket import DEADLINE_S


class Job:
    """The ticket of one job: `wait` raises what the job raised, any number of times."""

    __slots__ = ("_ended", "_error", "_name", "_run")

    def __init__(self, run: Callable[[], None], name: str) -> None:
        self._run: Callable[[], None] | None = run
        self._name = name
        self._ended = threading.Event()
        self._error: BaseException | None = None

    def done(self) -> bool:
        return self._ended.is_set()

    def wait(self, timeout_s: float = DEADLINE_S) -> None:
        if not self._ended.wait(timeout_s):
            raise DeadlineError(f"Waited {timeout_s:.0f} s for {self._name}.")
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
            self._ended.set()


class Worker:
    """A daemon thread, so that an interpreter that dies does not hang on it; `close` runs what was given and joins."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    def submit(self, run: Callable[[], None], name: str) -> Job:
        if not self._thread.is_alive():
            raise StateError(f"{name}: the run is closed.")
        job = Job(run, name)
        self._jobs.put(job)
        return job

    def close(self) -> None:
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join(DEADLINE_S)

    def _loop(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.execute()
            del job  # the last job's closure must not live until the next one comes
