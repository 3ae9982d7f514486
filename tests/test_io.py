"""The I/O engines. One contract, checked on each of the three backends against the file's own bytes or a model of them.

Files lie on the disk under tmp_path: a tmpfs takes O_DIRECT without enforcing it, and would prove nothing.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from fuyou.core.errors import ConfigError, DeadlineError, StateError, StorageIOError
from fuyou.core.races import Races
from fuyou.core.ticket import Ticket
from fuyou.tiers.io import Engine, File, LateEngine, open_engine
from fuyou.tiers.io.tuning import Tuning

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = 4096
MIB = 1 << 20


class Memory:
    """Page-aligned memory, unmapped when nobody refers to it any more: I/O that outlives it would fail or crash."""

    def __init__(self, nbytes: int, content: bytes | None = None) -> None:
        self.map = mmap.mmap(-1, nbytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        if content is not None:
            self.map[:] = content

    def bytes(self) -> bytes:
        return self.map[:]


def small_pieces(kind: str) -> Engine:
    """An engine that cuts requests into pieces of 8 KiB and has room for few at a time: every queue fills up."""
    if kind == "aiofiles":
        from fuyou.tiers.io.aio import AiofilesEngine

        return AiofilesEngine(thread_count=3, chunk_bytes=8192)
    from fuyou.tiers.io.native import NativeEngine

    return NativeEngine(kind, tuning=Tuning(piece_bytes=8192, queue_depth=3, burst_bytes=16384))


def open_or_skip(kind: str, *, small: bool = False, tuning: Tuning | None = None) -> Engine:
    try:
        return small_pieces(kind) if small else open_engine(kind, tuning=tuning)
    except (ConfigError, OSError, ImportError) as error:
        pytest.skip(f"no {kind} engine on this machine: {error}")


@pytest.fixture(params=["io_uring", "threads", "aiofiles"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["usual", "small-pieces", "late"])
def engine(kind: str, request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine = open_or_skip(kind, small=request.param == "small-pieces")
    if request.param == "late":
        engine = LateEngine(engine, Races(0))
    yield engine
    engine.close()


@pytest.fixture
def file(engine: Engine, tmp_path: Path) -> Iterator[File]:
    file = engine.open(tmp_path / "data")
    if not file.direct:
        pytest.skip(f"{tmp_path} refuses O_DIRECT: this test would prove nothing there")
    yield file


def random_pages(count: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(count * PAGE)


def run_script(script: str, *arguments: str) -> str:
    """A Python script in a process of its own; what it prints. Its last line must be OK."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0 and result.stdout.endswith("OK\n"), result.stdout + result.stderr
    return result.stdout


class TestContract:
    def test_overlapping_operations_act_as_if_run_in_the_order_of_submission(self, engine: Engine, file: File) -> None:
        pages = 64
        draw = random.Random(1)
        model = bytearray(random_pages(pages, seed=2))
        start = Memory(len(model), bytes(model))
        engine.write(file, 0, start.address, len(model))
        reads: list[tuple[Ticket, Memory, bytes]] = []
        writes: list[tuple[Ticket, Memory]] = []
        for i in range(300):  # nothing is waited for until all have been submitted
            first = draw.randrange(pages)
            count = draw.randint(1, pages - first)
            offset, nbytes = first * PAGE, count * PAGE
            if draw.random() < 0.5:
                memory = Memory(nbytes, random_pages(count, seed=10 + i))
                model[offset : offset + nbytes] = memory.bytes()
                writes.append((engine.write(file, offset, memory.address, nbytes), memory))
            else:
                memory = Memory(nbytes)
                expected = bytes(model[offset : offset + nbytes])
                reads.append((engine.read(file, offset, memory.address, nbytes), memory, expected))
        for ticket, memory, expected in reads:
            ticket.wait()
            assert memory.bytes() == expected
        for ticket, _ in writes:
            ticket.wait()
        engine.flush(file).wait()
        assert Path(file.path).read_bytes() == model

    def test_threads_may_share_a_file(self, engine: Engine, file: File) -> None:
        share = 16
        models = [bytearray(share * PAGE) for _ in range(4)]
        zeros = Memory(4 * share * PAGE, bytes(4 * share * PAGE))
        engine.write(file, 0, zeros.address, 4 * share * PAGE).wait()
        wrong: list[str] = []

        def work(index: int) -> None:
            draw = random.Random(index)
            base = index * share * PAGE
            for turn in range(40):
                first = draw.randrange(share)
                count = draw.randint(1, share - first)
                offset, nbytes = first * PAGE, count * PAGE
                source = Memory(nbytes, random_pages(count, seed=1000 * index + turn))
                models[index][offset : offset + nbytes] = source.bytes()
                written = engine.write(file, base + offset, source.address, nbytes)
                whole = Memory(share * PAGE)
                engine.read(file, base, whole.address, share * PAGE).wait()
                if whole.bytes() != models[index]:
                    wrong.append(f"thread {index}, turn {turn}")
                written.wait()

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert Path(file.path).read_bytes() == b"".join(models)

    def test_a_read_waits_for_the_write_before_it(self, engine: Engine, file: File) -> None:
        source = Memory(8 * MIB, random_pages(8 * MIB // PAGE, seed=3))
        last_page = Memory(PAGE)
        engine.write(file, 0, source.address, 8 * MIB)
        engine.read(file, 8 * MIB - PAGE, last_page.address, PAGE).wait()
        assert last_page.bytes() == source.bytes()[-PAGE:]

    def test_a_write_waits_for_the_reads_before_it(self, engine: Engine, file: File) -> None:
        before = random_pages(8 * MIB // PAGE, seed=4)
        source = Memory(8 * MIB, before)
        engine.write(file, 0, source.address, 8 * MIB).wait()
        target, after = Memory(8 * MIB), Memory(8 * MIB, random_pages(8 * MIB // PAGE, seed=5))
        read = engine.read(file, 0, target.address, 8 * MIB)
        engine.write(file, 0, after.address, 8 * MIB).wait()
        read.wait()
        assert target.bytes() == before
        assert Path(file.path).read_bytes() == after.bytes()

    def test_flush_ends_after_the_writes_before_it(self, engine: Engine, file: File) -> None:
        source = Memory(MIB, random_pages(MIB // PAGE, seed=6))
        writes = [engine.write(file, i * MIB, source.address, MIB) for i in range(16)]
        engine.flush(file).wait()
        assert all(write.done() for write in writes)

    def test_a_read_behind_a_failed_write_still_runs(self, engine: Engine, tmp_path: Path) -> None:
        content = random_pages(4, seed=7)
        (tmp_path / "read-only").write_bytes(content)
        file = engine.open(tmp_path / "read-only", writable=False)
        source, target = Memory(4 * PAGE), Memory(4 * PAGE)
        write = engine.write(file, 0, source.address, 4 * PAGE)
        engine.read(file, 0, target.address, 4 * PAGE).wait()
        assert target.bytes() == content
        with pytest.raises(StorageIOError):
            write.wait()

    def test_writing_to_a_file_opened_read_only(self, engine: Engine, tmp_path: Path) -> None:
        (tmp_path / "read-only").write_bytes(bytes(PAGE))
        file = engine.open(tmp_path / "read-only", writable=False)
        source = Memory(PAGE, b"x" * PAGE)
        with pytest.raises(StorageIOError) as caught:
            engine.write(file, 0, source.address, PAGE).wait()
        assert caught.value.errno == errno.EBADF
        assert "write 4096 bytes at 0" in str(caught.value) and file.path in str(caught.value)
        assert Path(file.path).read_bytes() == bytes(PAGE)

    def test_a_truncated_file_is_an_error_that_counts_the_bytes(self, engine: Engine, file: File) -> None:
        Path(file.path).write_bytes(b"y" * 10000)  # ends inside a sector
        target = Memory(8 * PAGE)
        ticket = engine.read(file, PAGE, target.address, 7 * PAGE)
        with pytest.raises(StorageIOError) as first:
            ticket.wait()
        message = str(first.value)
        assert first.value.errno == errno.ENODATA
        assert f"read {7 * PAGE} bytes at {PAGE} of {file.path}" in message and "the file ends there" in message
        assert f"expected {7 * PAGE} bytes, got {10000 - PAGE}" in message
        assert target.bytes()[: 10000 - PAGE] == b"y" * (10000 - PAGE)
        with pytest.raises(StorageIOError) as second:  # the same, as often as one asks
            ticket.wait()
        assert (str(second.value), second.value.errno) == (message, first.value.errno)
        assert ticket.done()

    def test_reading_wholly_past_the_end(self, engine: Engine, file: File) -> None:
        target = Memory(PAGE)
        with pytest.raises(StorageIOError, match="the file ends there; expected 4096 bytes, got 0"):
            engine.read(file, 64 * PAGE, target.address, PAGE).wait()

    @pytest.mark.parametrize("part", ["address", "offset", "size"])
    def test_unaligned_requests_are_refused_at_once(self, engine: Engine, file: File, part: str) -> None:
        memory = Memory(4 * PAGE)
        off = {"address": 0, "offset": 0, "size": 0} | {part: 24}
        with pytest.raises(StorageIOError, match=f"the {part} .* is 24 bytes past a multiple") as caught:
            engine.write(file, PAGE + off["offset"], memory.address + off["address"], PAGE + off["size"])
        assert caught.value.errno == errno.EINVAL
        assert f"multiples of {file.alignment_bytes} bytes" in str(caught.value)

    def test_senseless_requests_are_refused_at_once(self, engine: Engine, file: File) -> None:
        memory = Memory(PAGE)
        for offset, address, nbytes in [
            (-PAGE, memory.address, PAGE),
            (0, memory.address, 0),
            (0, memory.address, -PAGE),
            (0, 0, PAGE),
            (2**63 - PAGE, memory.address, PAGE),
        ]:
            with pytest.raises(StorageIOError):
                engine.read(file, offset, address, nbytes)

    def test_memory_that_is_not_there_is_an_error(self, engine: Engine, file: File) -> None:
        source = Memory(PAGE, b"z" * PAGE)
        engine.write(file, 0, source.address, PAGE).wait()
        with pytest.raises(StorageIOError) as caught:
            engine.read(file, 0, PAGE, PAGE).wait()  # page 1 is never mapped
        assert caught.value.errno == errno.EFAULT

    def test_opening_what_cannot_be_opened(self, engine: Engine, tmp_path: Path) -> None:
        with pytest.raises(StorageIOError, match="cannot open .*missing") as caught:
            engine.open(tmp_path / "missing", writable=False)
        assert caught.value.errno == errno.ENOENT

    def test_a_deadline_names_what_is_in_flight_and_the_operation_goes_on(self, engine: Engine, file: File) -> None:
        source = Memory(32 * MIB, random_pages(32 * MIB // PAGE, seed=8))
        for _ in range(50):  # until one has not ended by the time we ask: the first, on all but an idle machine
            ticket = engine.write(file, 0, source.address, 32 * MIB)
            try:
                ticket.wait(timeout_s=0)
            except DeadlineError as error:
                assert str(error).count(f"write {32 * MIB} bytes at 0 of {file.path}") >= 1
                assert "in flight" in str(error)
                break
        else:
            pytest.fail("50 writes of 32 MiB all ended within no time at all")
        ticket.wait()
        assert Path(file.path).read_bytes() == source.bytes()
        assert engine.in_flight() == []

    def test_memory_lives_until_its_operation_has_ended(self, engine: Engine, file: File) -> None:
        expected = b""
        alive = []
        for i in range(16):
            memory = Memory(MIB, random_pages(MIB // PAGE, seed=20 + i))
            expected += memory.bytes()
            alive.append(weakref.ref(memory))
            engine.write(file, i * MIB, memory.address, MIB, keep=memory)
            del memory  # the ticket is dropped as well: only the engine knows of it
        gc.collect()
        engine.flush(file).wait()
        assert Path(file.path).read_bytes() == expected
        engine.flush(file).wait()  # any later operation lets go of what has ended
        gc.collect()
        assert [reference() for reference in alive] == [None] * 16

    def test_a_closed_file_is_refused_and_its_operations_have_ended(self, engine: Engine, file: File) -> None:
        source = Memory(4 * MIB, random_pages(4 * MIB // PAGE, seed=9))
        ticket = engine.write(file, 0, source.address, 4 * MIB)
        engine.close_file(file)
        assert ticket.done()
        ticket.wait()
        assert Path(file.path).read_bytes() == source.bytes()
        for start in (engine.read, engine.write):
            with pytest.raises(StateError, match="the file is closed"):
                start(file, 0, source.address, PAGE)
        with pytest.raises(StateError, match="the file is closed"):
            engine.flush(file)
        engine.close_file(file)
        again = engine.open(file.path)
        engine.read(again, 0, source.address, PAGE).wait()

    def test_a_file_of_another_engine_is_refused(self, engine: Engine, file: File) -> None:
        memory = Memory(PAGE)
        other = open_engine("aiofiles")
        try:
            with pytest.raises(StateError, match="another I/O engine"):
                other.read(file, 0, memory.address, PAGE)
        finally:
            other.close()

    def test_registered_memory_reads_and_writes_the_same(self, engine: Engine, file: File) -> None:
        memory = Memory(4 * MIB, random_pages(4 * MIB // PAGE, seed=11))
        outside = Memory(4 * MIB)
        registered = engine.register(memory.address, 2 * MIB)  # half of it: one piece may touch both kinds
        assert registered or engine.registration_note
        engine.write(file, 0, memory.address, 4 * MIB)
        engine.read(file, 0, outside.address, 4 * MIB).wait()
        assert outside.bytes() == memory.bytes()
        engine.write(file, 4 * MIB, memory.address, 4 * MIB)
        engine.unregister(memory.address)  # while operations use it
        engine.read(file, 4 * MIB, outside.address, 4 * MIB).wait()
        assert outside.bytes() == memory.bytes()

    def test_a_forked_child_gets_an_error_and_harms_nothing(self, engine: Engine, file: File) -> None:
        memory = Memory(8 * MIB, random_pages(8 * MIB // PAGE, seed=12))
        pending = engine.write(file, 0, memory.address, 8 * MIB)
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # a child that hangs must not outlive the test
            refused = 0
            for use in (
                lambda: engine.read(file, 0, memory.address, PAGE),
                lambda: engine.open(file.path),
                lambda: engine.close_file(file),
                lambda: engine.in_flight(),
                lambda: engine.register(memory.address, PAGE),
            ):
                try:
                    use()
                except StateError:
                    refused += 1
            engine.close()
            if hasattr(engine, "_native"):
                del engine._native  # the destructor, in a process where its threads do not exist
            os._exit(0 if refused == 5 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        pending.wait()
        assert Path(file.path).read_bytes() == memory.bytes()


def threads_and_descriptors() -> tuple[set[str], dict[str, str]]:
    tasks = set(os.listdir("/proc/self/task"))
    descriptors = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            descriptors[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # the one that listed the folder
            pass
    return tasks, descriptors


@pytest.mark.parametrize("explicit", [True, False], ids=["close", "close-files-first"])
def test_close_drains_and_gives_everything_back(kind: str, tmp_path: Path, explicit: bool) -> None:
    open_or_skip(kind).close()  # whatever is imported and created once
    tasks_before, descriptors_before = threads_and_descriptors()
    engine = open_or_skip(kind)
    file = engine.open(tmp_path / "data")
    memory = Memory(16 * MIB, random_pages(16 * MIB // PAGE, seed=13))
    engine.register(memory.address, 16 * MIB)
    tickets = [engine.write(file, i * MIB, memory.address + i * MIB, MIB) for i in range(16)]
    tickets.append(engine.flush(file))
    if not explicit:
        engine.close_file(file)
    engine.close()
    assert all(ticket.done() for ticket in tickets)
    for ticket in tickets:
        ticket.wait()
    assert Path(file.path).read_bytes() == memory.bytes()
    for _ in range(1000):  # the kernel's own io_uring workers take a moment to go
        tasks, descriptors = threads_and_descriptors()
        if tasks <= tasks_before:
            break
        time.sleep(0.01)
    assert tasks <= tasks_before
    assert descriptors == descriptors_before
    engine.close()
    with pytest.raises(StateError, match="closed"):
        engine.open(tmp_path / "data")
    with pytest.raises(StateError):
        engine.write(file, 0, memory.address, MIB)


def test_an_engine_that_nobody_closed_does_not_hang_the_exit(kind: str, tmp_path: Path) -> None:
    open_or_skip(kind).close()
    run_script(
        """
        import mmap, ctypes, sys
        from fuyou.tiers.io import open_engine
        engine = open_engine(sys.argv[1])
        file = engine.open(sys.argv[2])
        memory = mmap.mmap(-1, 1 << 20)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        engine.write(file, 0, address, 1 << 20, keep=memory).wait()
        print("OK")
        """,
        kind, str(tmp_path / "data"),
    )  # fmt: skip


FULL_SCRIPT = """
    import ctypes, errno, mmap, resource, signal, sys
    from fuyou.core.errors import StorageIOError
    from fuyou.tiers.io import open_engine
    kind, path, limit, wanted = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    engine = open_engine(kind)
    file = engine.open(path)
    size = 4 << 20
    memory = mmap.mmap(-1, size)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    ticket = engine.write(file, 0, address, size)
    for _ in range(2):
        try:
            ticket.wait()
        except StorageIOError as error:
            assert error.errno == wanted, error
            assert f"write {size} bytes at 0 of {path}" in str(error) and f"expected {size} bytes" in str(error), error
        else:
            raise SystemExit("4 MiB were written where there is no room for them")
    engine.write(file, 0, address, 65536).wait()  # what there is room for still works
    engine.close()
    print("OK")
"""


def test_a_file_size_limit_is_told(kind: str, tmp_path: Path) -> None:
    open_or_skip(kind).close()
    run_script(FULL_SCRIPT, kind, str(tmp_path / "data"), str((1 << 20) + 65536), str(errno.EFBIG))


def test_a_full_disk_is_told(kind: str, tmp_path: Path) -> None:
    open_or_skip(kind).close()
    image, folder = tmp_path / "image", tmp_path / "mounted"
    folder.mkdir()
    with open(image, "wb") as made:
        made.truncate(3 * MIB)
    make = ["mkfs.ext4", "-q", "-O", "^has_journal", str(image)]
    if shutil.which("mkfs.ext4") and subprocess.run(make, capture_output=True).returncode == 0:
        mount = ["mount", "-o", "loop", str(image), str(folder)]
    else:
        mount = []
    if not mount or subprocess.run(mount, capture_output=True).returncode != 0:
        mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(folder)]
        result = subprocess.run(mount, capture_output=True, text=True)
        if result.returncode != 0:
            pytest.skip(f"no small file system can be mounted here: {result.stderr.strip()}")
    try:
        run_script(FULL_SCRIPT, kind, str(folder / "data"), "0", str(errno.ENOSPC))
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_where_direct_io_is_refused_the_file_is_buffered_and_that_is_said_once(kind: str) -> None:
    engine = open_or_skip(kind)
    content = Path("/proc/version").read_bytes()
    memory = Memory(PAGE)
    with pytest.warns(RuntimeWarning, match="refuses O_DIRECT") as warned:
        files = [engine.open("/proc/version", writable=False) for _ in range(2)]
    assert len(warned) == 1
    assert not files[0].direct and files[0].alignment_bytes == 1
    engine.read(files[0], 0, memory.address + 1, len(content)).wait()  # no alignment is asked for
    assert memory.bytes()[1 : 1 + len(content)] == content
    engine.close()


# ---- choosing an engine


def test_unknown_kind() -> None:
    with pytest.raises(ConfigError, match="'io-uring' is none of"):
        open_engine("io-uring")


def test_auto_takes_the_first_that_works() -> None:
    with open_engine() as engine:
        assert engine.name == "io_uring" or engine.note.startswith(f"{engine.name}, because io_uring is not available")


def test_without_the_extension_auto_takes_aiofiles_and_says_why() -> None:
    run_script(
        """
        import sys
        sys.modules["fuyou._native"] = None
        from fuyou.core.errors import ConfigError
        from fuyou.tiers.io import open_engine
        engine = open_engine("auto")
        assert engine.name == "aiofiles", engine.name
        assert "_native" in engine.note and "io_uring and threads are not available" in engine.note, engine.note
        engine.close()
        try:
            open_engine("threads")
        except ConfigError as error:
            assert "_native" in str(error), error
            print("OK")
        """
    )


def test_where_the_kernel_forbids_io_uring_auto_takes_threads_and_says_why() -> None:
    """A seccomp filter, as containers have it, answers io_uring_setup with EPERM."""
    if not os.path.exists("/proc/sys/kernel/seccomp"):
        pytest.skip("this kernel has no seccomp filters")
    run_script(
        """
        import ctypes, struct
        from fuyou.core.errors import ConfigError
        from fuyou.tiers.io import open_engine
        op = lambda code, jt, jf, k: struct.pack("=HBBI", code, jt, jf, k)
        EPERM, ERRNO, ALLOW, SETUP = 1, 0x00050000, 0x7FFF0000, 425
        code = op(0x20, 0, 0, 0) + op(0x15, 0, 1, SETUP) + op(0x06, 0, 0, ERRNO | EPERM) + op(0x06, 0, 0, ALLOW)
        filters = ctypes.create_string_buffer(code)
        program = ctypes.create_string_buffer(struct.pack("@HP", 4, ctypes.addressof(filters)))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.prctl(38, 1, 0, 0, 0) == 0
        assert libc.prctl(22, 2, program, 0, 0) == 0, ctypes.get_errno()
        engine = open_engine("auto")
        assert engine.name == "threads", engine.name
        assert "io_uring is not available" in engine.note and "Operation not permitted" in engine.note, engine.note
        engine.close()
        try:
            open_engine("io_uring")
        except ConfigError as error:
            assert "Operation not permitted" in str(error), error
            print("OK")
        """
    )


def test_where_memlock_forbids_registered_buffers_io_goes_on_without_them(tmp_path: Path) -> None:
    open_or_skip("io_uring").close()
    run_script(
        """
        import ctypes, mmap, os, resource, struct, sys
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
        libc = ctypes.CDLL(None, use_errno=True)
        header = ctypes.create_string_buffer(struct.pack("=II", 0x20080522, 0))
        sets = ctypes.create_string_buffer(24)
        assert libc.capget(header, sets) == 0
        words = list(struct.unpack_from("=6I", sets))
        words[0] &= ~(1 << 14)  # CAP_IPC_LOCK, which root has and which lifts the limit
        struct.pack_into("=6I", sets, 0, *words)
        assert libc.capset(header, sets) == 0
        from fuyou.tiers.io import open_engine
        engine = open_engine("io_uring")
        size = 8 << 20
        memory = mmap.mmap(-1, 2 * size)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        memory[:size] = os.urandom(size)
        assert not engine.register(address, size)
        assert "Cannot allocate memory" in engine.registration_note and "memlock" in engine.registration_note
        file = engine.open(sys.argv[1])
        engine.write(file, 0, address, size)
        engine.read(file, 0, address + size, size).wait()
        assert memory[:size] == memory[size:]
        engine.close()
        print("OK")
        """,
        str(tmp_path / "data"),
    )


def test_more_than_a_gigabyte_is_registered_in_parts(tmp_path: Path) -> None:
    engine = open_or_skip("io_uring")
    memory = Memory((1 << 30) + MIB)
    edge = (1 << 30) - MIB // 2
    memory.map[edge : edge + MIB] = random_pages(MIB // PAGE, seed=14)
    if not engine.register(memory.address, (1 << 30) + MIB):
        engine.close()
        pytest.skip(f"cannot register 1 GiB here: {engine.registration_note}")
    file = engine.open(tmp_path / "data")
    engine.write(file, 0, memory.address + edge, MIB).wait()  # over the edge between two registered buffers
    assert Path(file.path).read_bytes() == memory.map[edge : edge + MIB]
    engine.close()


@pytest.mark.parametrize("kind", ["io_uring", "threads"])
@pytest.mark.parametrize("flood", ["read", "write"])
def test_neither_reads_nor_writes_starve_behind_a_flood_of_the_other(kind: str, flood: str, tmp_path: Path) -> None:
    """What comes last, behind 128 MiB of the other kind, ends before they do: it waits for a burst, not for all."""
    tuning = Tuning(piece_bytes=MIB // 4, queue_depth=2, burst_bytes=MIB)
    with open_or_skip(kind, tuning=tuning) as engine:
        file = engine.open(tmp_path / "data")
        memory, other = Memory(16 * MIB, os.urandom(16 * MIB)), Memory(MIB, os.urandom(MIB))
        engine.write(file, 0, memory.address, 16 * MIB).wait()
        engine.write(file, 16 * MIB, other.address, MIB).wait()
        expected = memory.bytes()
        start, last = (engine.read, engine.write) if flood == "read" else (engine.write, engine.read)
        flooding = [start(file, part * MIB, memory.address + part * MIB, MIB) for _ in range(8) for part in range(16)]
        late = last(file, 16 * MIB, other.address, MIB)
        late.wait()
        assert not flooding[-1].done()
        for ticket in flooding:
            ticket.wait()
    assert (tmp_path / "data").read_bytes() == expected + other.bytes()
