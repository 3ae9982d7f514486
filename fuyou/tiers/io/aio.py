"""The engine without native code: aiofiles on a thread pool of its own, with O_DIRECT into the caller's memory."""

from __future__ import annotations

import asyncio
import concurrent.futures
import ctypes
import errno
import io
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import aiofiles

from fuyou.core.errors import StateError
from fuyou.tiers.io.engine import Engine, Failure, IoTicket, Kind, Request
from fuyou.tiers.io.files import File

THREAD_COUNT = 4
CHUNK_BYTES = 8 << 20  # aiofiles costs two hops between threads a call: large chunks make that cheap
MOST_STALLS = 1000


class _Op(Request):
    """One operation: its ticket, its range, and the futures of the operations that it waits for."""

    __slots__ = ("address", "ended", "file", "future", "predecessors", "ticket")

    def __init__(self, kind: Kind, file: _OpenFile, offset: int, address: int, nbytes: int, ticket: IoTicket) -> None:
        super().__init__(kind, offset, nbytes)
        self.file = file
        self.address = address
        self.ticket = ticket
        self.predecessors: list[asyncio.Future[None]] = []
        self.ended = threading.Event()  # for waiters in other threads
        self.future: asyncio.Future[None]  # for successors, in the loop's thread


class _OpenFile:
    """A file with its idle aiofiles handles: each has a position of its own, so that chunks run side by side."""

    def __init__(self, file: File) -> None:
        self.file = file
        self.idle: deque[Any] = deque()  # only the loop's thread touches it
        self.active: dict[int, _Op] = {}  # under the engine's lock


class AiofilesEngine(Engine):
    """aiofiles with `opener` (O_DIRECT), buffering=0, and readinto/write on views of the caller's memory."""

    name = "aiofiles"

    def __init__(self, note: str = "", *, thread_count: int = THREAD_COUNT, chunk_bytes: int = CHUNK_BYTES) -> None:
        super().__init__(note)
        self._chunk_bytes = chunk_bytes
        self._numbers = itertools.count()
        self._lock = threading.Condition()  # guards _open_files, every `active`, _refusing; notified when one ends
        self._open_files: dict[int, _OpenFile] = {}
        self._refusing = False
        self._stopping = threading.Lock()  # guards _stopped: one thread at a time ends the threads
        self._stopped = False
        self._executor = ThreadPoolExecutor(thread_count, thread_name_prefix="fuyou-aiofiles")
        self._loop = asyncio.new_event_loop()
        self._slots = asyncio.Semaphore(thread_count)  # chunks at work at a time, over all files
        self._thread = threading.Thread(target=self._loop.run_forever, name="fuyou-aiofiles-loop", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            self._loop.close()
            raise OSError(errno.EAGAIN, f"no thread is to be had for it ({error}): see `ulimit -u`") from error

    def in_flight(self) -> list[str]:
        self._check_process()
        with self._lock:
            active = {n: op for open_file in self._open_files.values() for n, op in open_file.active.items()}
        return [active[number].ticket.text for number in sorted(active)]

    def poll(self, ticket: IoTicket) -> bool:
        self._check_process()
        return ticket.op.ended.is_set()

    def await_ticket(self, ticket: IoTicket, timeout_s: float) -> bool:
        self._check_process()
        return ticket.op.ended.wait(timeout_s)

    def _start(self, kind: Kind, file: File, offset: int, address: int, nbytes: int, keep: Any) -> IoTicket:
        ticket = IoTicket(self, kind, file, offset, nbytes, keep)
        with self._lock:
            open_file = self._open_files.get(file.key)
            if self._refusing or open_file is None:  # closed by another thread since we checked
                raise StateError(f"Cannot {ticket.text}: the file or the I/O engine is closed.")
            op = ticket.op = _Op(kind, open_file, offset, address, nbytes, ticket)
            op.future = self._loop.create_future()
            op.predecessors = [earlier.future for earlier in open_file.active.values() if op.must_follow(earlier)]
            number = next(self._numbers)
            open_file.active[number] = op
            self._spawn(self._run(number, op))
        return ticket

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _run(self, number: int, op: _Op) -> None:
        """One operation from its turn to its end. Runs in the loop's thread, as all below it."""
        failure: Failure | None = None
        began = time.perf_counter()
        try:
            for earlier in op.predecessors:
                await earlier  # never raises: a failed write's reader still runs
            op.predecessors.clear()
            began = time.perf_counter()
            failure = await (self._flush(op) if op.kind == "flush" else self._transfer(op))
        except Exception as error:
            failure = (getattr(error, "errno", None) or errno.EIO, f"{op.ticket.text} failed: {error}")
        op.ticket.settle(failure)
        op.ticket.record(began, time.perf_counter())
        with self._lock:
            del op.file.active[number]
            op.future.set_result(None)
            op.ended.set()
            self._lock.notify_all()

    async def _flush(self, op: _Op) -> Failure | None:
        async with self._slots:
            stalls = 0
            while True:
                try:
                    await self._loop.run_in_executor(self._executor, os.fdatasync, op.file.file.fd)
                    return None
                except OSError as error:
                    stalls += 1
                    if error.errno == errno.EAGAIN and stalls <= MOST_STALLS:
                        continue
                    code = error.errno or errno.EIO
                    return code, f"{op.ticket.text} failed: {os.strerror(code)} (errno {code})"
        return None

    async def _transfer(self, op: _Op) -> Failure | None:
        """All chunks side by side; the failure at the lowest offset, if any."""
        failures: dict[int, int] = {}  # offset -> errno

        async def chunk(start: int) -> None:
            async with self._slots:
                if not failures:  # nothing more is started once something has gone wrong
                    await self._move(op, start, min(self._chunk_bytes, op.nbytes - start), failures)

        # gather ends only when every chunk has: nobody touches the memory afterwards. _move does not raise.
        await asyncio.gather(*(chunk(start) for start in range(0, op.nbytes, self._chunk_bytes)))
        if not failures:
            return None
        at_offset = min(failures)
        code = failures[at_offset]
        why = "the file ends there" if code == errno.ENODATA else f"{os.strerror(code)} (errno {code})"
        return code, (
            f"{op.ticket.text} failed at offset {at_offset}: {why}; expected {op.nbytes} bytes, "
            f"got {at_offset - op.offset}"
        )

    async def _move(self, op: _Op, start: int, nbytes: int, failures: dict[int, int]) -> None:
        """One chunk through one handle, short transfers continued from the last aligned byte."""
        alignment = op.file.file.alignment_bytes
        memory = memoryview((ctypes.c_char * nbytes).from_address(op.address + start)).cast("B")
        done = 0
        stalls = 0
        handle = None
        try:
            handle = op.file.idle.pop() if op.file.idle else await self._new_handle(op.file.file)
            while done < nbytes:
                await handle.seek(op.offset + start + done)
                rest = memory[done:]
                answer = await (handle.readinto(rest) if op.kind == "read" else handle.write(rest))
                moved = answer or 0  # None: EAGAIN, which is no end of the file
                kept = moved if moved == len(rest) else moved - moved % alignment
                done += kept
                stalls = 0 if kept else stalls + 1
                if kept == 0 and op.kind == "read" and answer is not None:
                    done += moved
                    failures[op.offset + start + done] = errno.ENODATA
                    return
                if stalls > MOST_STALLS:
                    failures[op.offset + start + done] = errno.EIO
                    return
        except io.UnsupportedOperation:  # what Python says, without an errno, of writing to a read-only file
            failures[op.offset + start + done] = errno.EBADF
        except Exception as error:  # OSError, or RuntimeError from an interpreter that is shutting down
            failures[op.offset + start + done] = getattr(error, "errno", None) or errno.EIO
        finally:
            if handle is not None:
                op.file.idle.append(handle)

    async def _new_handle(self, file: File) -> Any:
        flags = os.O_CLOEXEC | (os.O_DIRECT if file.direct else 0) | (os.O_RDWR if file.writable else os.O_RDONLY)

        def reopen(path: str, _: int) -> int:
            # Through the descriptor: the same file even when its name has gone or means another one by now.
            return os.open(path, flags)

        mode = "r+b" if file.writable else "rb"
        path = f"/proc/self/fd/{file.fd}"
        return await aiofiles.open(path, mode, buffering=0, opener=reopen, loop=self._loop, executor=self._executor)

    def _attach(self, file: File) -> None:
        with self._lock:
            file.key = next(self._numbers)
            self._open_files[file.key] = _OpenFile(file)

    def _detach(self, file: File, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        with self._lock:
            open_file = self._open_files[file.key]
            if not self._lock.wait_for(lambda: not open_file.active, deadline - time.monotonic()):
                return False
        if not self._close_handles([open_file], deadline):
            return False
        with self._lock:
            self._open_files.pop(file.key, None)
        return True

    def _stop(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        with self._lock:
            self._refusing = True
            idle = lambda: not any(open_file.active for open_file in self._open_files.values())  # noqa: E731
            if not self._lock.wait_for(idle, deadline - time.monotonic()):
                return False
            open_files = list(self._open_files.values())
        with self._stopping:
            if self._stopped:
                return True
            if not self._close_handles(open_files, deadline):
                return False
            self._stopped = True
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._executor.shutdown()
            self._loop.close()
        return True

    def _close_handles(self, open_files: list[_OpenFile], deadline: float) -> bool:
        """False where the file system keeps a close(2) waiting."""

        async def close_all() -> None:
            for open_file in open_files:
                while open_file.idle:
                    await open_file.idle.pop().close()

        closing = asyncio.run_coroutine_threadsafe(close_all(), self._loop)
        return bool(concurrent.futures.wait([closing], max(0.0, deadline - time.monotonic())).done)
