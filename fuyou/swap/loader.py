"""Bringing weights to the device: a thread that reads chunks ahead, across units, and queues their copies in order."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable

import torch

from fuyou.core.errors import DeadlineError, StateError
from fuyou.core.races import Races
from fuyou.core.ticket import DONE, Ticket, await_ended, list_text
from fuyou.swap.buffers import Buffers
from fuyou.swap.unit import Chunk, Unit
from fuyou.tiers.device import Device
from fuyou.tiers.host import Lease
from fuyou.tiers.worker import EXIT_S, before_exit


class Loading:
    """One fetch on its way: the ticket of its last chunk's copy being queued (on a CPU: of its last chunk being there).

    Cancelled, nothing more of it begins, and the unit's memory is somebody else's once what began has ended: `lock` is
    held around each beginning.
    """

    __slots__ = ("_ended", "_error", "_loader", "cancelled", "lock", "moves", "ready", "unit")

    def __init__(self, unit: Unit, ready: torch.cuda.Event | None, loader: Loader) -> None:
        self.unit = unit
        self.ready = ready  # the copies wait for the kernels that used the memory before
        self.cancelled = False
        self.lock = threading.Lock()
        self.moves: list[Ticket] = []  # reads straight into the unit's memory
        self._loader = loader
        self._ended = threading.Event()
        self._error: BaseException | None = None

    def end(self, error: BaseException | None = None) -> None:
        if not self._ended.is_set():
            self._error = error
            self._ended.set()

    def cancel(self) -> bool:
        """True: nothing moves the unit's memory any more. False: a drive still does."""
        with self.lock:  # a copy that has begun ends first; none begins later
            self.cancelled = True
        return all(move.done() for move in self.moves)

    def end_moves(self) -> None:
        """`cancel`, and wait for the drives. DeadlineError where one does not answer."""
        self.cancel()
        await_ended(self.moves, time.monotonic() + self._loader.deadline_s)

    def done(self) -> bool:
        return self._ended.is_set()

    def wait(self, timeout_s: float | None = None) -> None:
        timeout_s = self._loader.deadline_s if timeout_s is None else timeout_s
        if not self._ended.wait(timeout_s):
            raise DeadlineError(
                f"Waited {timeout_s:g} s for the weights of {self.unit.name}; {self._loader.busy_text()}."
            )
        if self._error is not None:
            raise self._error


class Loader:
    """Reads the chunks of units in the order in which they were asked for, `count` at once.

    A CPU's memory is read into as it is. For a GPU `buffers`, `count` of them, lie between: they are the loader's own, so
    that a fetch can never wait for memory that its waiter holds. `settle(chunk)` waits for an update of the chunk,
    `pending(chunk)` says whether it would.
    """

    def __init__(
        self,
        device: Device,
        buffers: Buffers | None,
        *,
        count: int,
        settle: Callable[[Chunk], None],
        pending: Callable[[Chunk], bool],
        in_flight: Callable[[], list[str]],
        races: Races | None = None,
    ) -> None:
        self.deadline_s = device.deadline_s
        self._device = device
        self._buffers = buffers
        self._count = count
        self._settle = settle
        self._pending = pending
        self._in_flight = in_flight
        self._races = races
        self._changed = threading.Condition()
        self._asked: deque[tuple[Loading, int]] = deque()  # (fetch, its next chunk) that are not read out
        self._reading: deque[tuple[Loading, int, Lease | None, Ticket]] = deque()  # the thread's own
        self._closing = False
        self._pid = os.getpid()
        self._thread: threading.Thread | None = None

    def load(self, unit: Unit, ready: torch.cuda.Event | None) -> Loading:
        """Start bringing a unit to the memory that it has; never waits."""
        loading = Loading(unit, ready, self)
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="fuyou-weights-in", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError as error:
                    self._thread = None
                    raise StateError(
                        f"No thread is to be had for fuyou-weights-in ({error}): raise the limit of `ulimit -u`."
                    ) from error
                before_exit(self._leave)
            self._asked.append((loading, 0))
            self._changed.notify()
        return loading

    def busy_text(self) -> str:
        """What is being brought and what moves, for a message."""
        loadings = [each[0] for each in [*self._reading]] + [each[0] for each in [*self._asked]]
        names = list(dict.fromkeys(loading.unit.name for loading in loadings))
        operations = self._in_flight()
        text = f"fuyou-weights-in brings: {list_text(names) or 'nothing'}"
        return text + (f"; {len(operations)} operations in flight: {list_text(operations)}" if operations else "")

    def close(self) -> None:
        """DeadlineError where an operation does not end: it may be called again."""
        with self._changed:
            self._closing = True
            for loading, _ in self._asked:
                loading.cancelled = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(self.deadline_s)
            if self._thread.is_alive():
                raise DeadlineError(f"Waited {self.deadline_s:g} s to close fuyou-weights-in; {self.busy_text()}.")
        if self._buffers is not None:
            self._buffers.close()

    def _leave(self) -> None:
        if self._thread is None or self._pid != os.getpid():
            return
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(EXIT_S)

    # The thread ------------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        with self._device.guard():
            while True:
                with self._changed:
                    while not (self._asked or self._reading or self._closing):
                        self._changed.wait()
                    if self._closing:
                        break
                if (self._reading and self._reading[0][3].done()) or not self._start_next():
                    self._finish_oldest()
        for loading, _, buffer, read in self._reading:
            self._put(buffer, [read])
            loading.end()
        self._reading.clear()

    def _start_next(self) -> bool:
        """Start reading one more chunk; False where what is being read comes first: there is no buffer, no chunk, or an
        update of the chunk is still to be made."""
        with self._changed:
            if not self._asked:
                return False
            loading, index = self._asked[0]
        chunk = loading.unit.chunks[index] if index < len(loading.unit.chunks) else None
        if loading.cancelled or chunk is None:
            with self._changed:
                self._asked.popleft()
            if loading.cancelled:
                loading.end()
            return True
        if self._reading and (self._pending(chunk) or len(self._reading) >= self._count):
            return False
        buffer = None
        if self._buffers is not None and not chunk.weights.on_host:
            buffer = self._buffers.try_take()
            if buffer is None and self._reading:
                return False
        try:
            self._settle(chunk)
            if buffer is None and self._buffers is not None and not chunk.weights.on_host:
                buffer = self._buffers.take()
            self._delay()
            read = self._read(loading, chunk, buffer)
        except BaseException as error:
            self._put(buffer, [])
            self._give_up(loading, error)
            return True
        with self._changed:
            self._asked[0] = (loading, index + 1)
        self._reading.append((loading, index, buffer, read))
        return True

    def _read(self, loading: Loading, chunk: Chunk, buffer: Lease | None) -> Ticket:
        home = chunk.weights.home
        if isinstance(home, Lease):
            return DONE
        if buffer is not None:
            return home.read(buffer.address, buffer)
        with loading.lock:
            if loading.cancelled:
                return DONE
            # Extents and a unit's memory are whole pages, and a chunk begins at one: what is read beyond its bytes is the
            # rest of its last page.
            memory = loading.unit.memory
            read = home.read(memory.address + chunk.start * loading.unit.dtype.itemsize, memory)
            loading.moves.append(read)
            return read

    def _finish_oldest(self) -> None:
        if not self._reading:
            return
        loading, index, buffer, read = self._reading[0]
        chunk, moves = loading.unit.chunks[index], [read]
        try:
            read.wait()
            moves = [self._copy(loading, chunk, buffer)]
            if index + 1 == len(loading.unit.chunks):
                loading.end()
        except BaseException as error:
            self._give_up(loading, error)
        self._reading.popleft()
        self._put(buffer, moves)

    def _copy(self, loading: Loading, chunk: Chunk, buffer: Lease | None) -> Ticket:
        """To the unit's memory from where the chunk is on the host, if it is not there by now."""
        unit = loading.unit
        nbytes = chunk.count * unit.dtype.itemsize
        source = chunk.weights.home if buffer is None else buffer
        if not isinstance(source, Lease):
            self._device.count_in(nbytes)
            return DONE
        with loading.lock:
            if loading.cancelled:
                return DONE
            start = chunk.start * unit.dtype.itemsize
            target = unit.memory.tensor[start : start + nbytes]
            unit.copied = self._device.copy_in(target, source.data[:nbytes], loading.ready)
            return unit.copied  # set under the lock: who cancels orders the memory behind it

    def _put(self, buffer: Lease | None, moves: list[Ticket]) -> None:
        if buffer is not None and self._buffers is not None:
            self._buffers.put(buffer, moves)

    def _give_up(self, loading: Loading, error: BaseException) -> None:
        loading.cancelled = True  # what else of it is being read is not copied
        loading.end(error)

    def _delay(self) -> None:
        if self._races is not None:
            self._races.delay()
