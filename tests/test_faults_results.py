"""Results that no drive gives on request: EIO in the middle, short transfers, EINTR, EAGAIN, operations that never end.

`faults/inject.c`, loaded before everything else in a process of its own, makes them on every engine: it changes what the
system calls return, and what an io_uring submits. The engines run as they are.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest
from fault_tools import FIRST, REPOSITORY, open_or_skip, run_script

PRELUDE = """
    import ctypes, errno, os, shutil, sys, time
    from pathlib import Path
    from fuyou.core.errors import DeadlineError, FuyouError, StorageIOError
    from fuyou.tiers.io import open_engine
    from fault_tools import Memory, MIB, PAGE, Training, assert_empty, plain, random_pages, same
    import pytest
    library = ctypes.CDLL(None)
    library.fuyou_inject.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int] + [ctypes.c_long] * 4
    library.fuyou_injected.restype = ctypes.c_long
    READ, WRITE, FLUSH = range(3)
    FAIL, SHORT, HANG = 1, 2, 3
    kind, folder = sys.argv[1], Path(sys.argv[2])
    def inject(which, action, value=0, skip=0, count=1, period=1, path="data"):
        library.fuyou_inject(path.encode(), which, action, value, skip, count, period)
    def injected(which):
        return library.fuyou_injected(which)
"""


@pytest.fixture(scope="module")
def preload(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler here")
    if "FUYOU_SANITIZED" in os.environ:
        pytest.skip("the sanitizer's own library takes the place of the one that is loaded first")
    library = tmp_path_factory.mktemp("faults") / "inject.so"
    source = REPOSITORY / "tests" / "faults" / "inject.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl", "-pthread"], check=True)
    return str(library)


def inside(preload: str, kind: str, folder: Path, script: str) -> None:
    open_or_skip(kind).close()
    run_script(textwrap.dedent(PRELUDE) + textwrap.dedent(script), kind, str(folder), env={"LD_PRELOAD": preload})


@pytest.mark.parametrize("kind", FIRST)
def test_what_engines_recover_from_and_what_they_tell(preload: str, kind: str, nvme: Path) -> None:
    inside(preload, kind, nvme, """
        engine = open_engine(kind)
        file = engine.open(folder / "data")
        os.link(file.path, folder / "seen")  # a name that nothing is injected for
        size = 16 * MIB
        source, target = Memory(size), Memory(size)
        registered = engine.register(source.address, size)
        number = 0
        def both_ways():
            global number
            number += 1
            source.map[:] = random_pages(size // PAGE, seed=number)
            target.map[:] = bytes(size)
            writes = [engine.write(file, at, source.address + at, size // 4) for at in range(0, size, size // 4)]
            flush = engine.flush(file)
            reads = [engine.read(file, at, target.address + at, size // 2) for at in range(0, size, size // 2)]
            for ticket in (*writes, flush, *reads):
                ticket.wait(60)
            assert target.bytes() == source.bytes() == (folder / "seen").read_bytes()
        # Recovered from: a few times in a row, and over and over.
        for which in (READ, WRITE):
            for value in (PAGE, 3 * PAGE):
                inject(which, SHORT, value, count=3)
                both_ways()
                assert injected(which) == 3, (which, injected(which))
            for code in (errno.EINTR, errno.EAGAIN):
                inject(which, FAIL, code, count=3)
                both_ways()
                assert injected(which) == 3, (which, code, injected(which))
            for what in ((SHORT, PAGE), (FAIL, errno.EAGAIN), (FAIL, errno.EINTR)):
                inject(which, *what, count=10**6, period=2)
                both_ways()
                assert injected(which) > 1
            inject(which, 0)
        inject(WRITE, SHORT, 0, count=5)
        both_ways()
        for code in (errno.EINTR, errno.EAGAIN):
            inject(FLUSH, FAIL, code, count=3)
            both_ways()
            assert injected(FLUSH) == 3, (code, injected(FLUSH))
        # Told: the error's own number, the file, the place, what came through; the next operation works again.
        def told(start, which, code, words):
            inject(which, FAIL, code, skip=1 if which != FLUSH else 0, count=1)
            ticket = start()
            for _ in range(2):
                with pytest.raises(StorageIOError) as caught:
                    ticket.wait(60)
                assert caught.value.errno == code and file.path in str(caught.value), caught.value
                assert os.strerror(code) in str(caught.value) and words in str(caught.value), caught.value
            assert engine.in_flight() == [] and injected(which) == 1
            both_ways()
        for code in (errno.EIO, errno.ENOSPC, errno.EREMOTEIO):
            told(lambda: engine.read(file, 0, target.address, size), READ, code, f"read {size} bytes at 0 of")
            told(lambda: engine.write(file, 0, source.address, size), WRITE, code, f"write {size} bytes at 0 of")
            told(lambda: engine.flush(file), FLUSH, code, "flush of")
        # A drive that says EAGAIN for ever is an error in the end, not a hang.
        inject(READ, FAIL, errno.EAGAIN, count=10**9)
        started = time.monotonic()
        with pytest.raises(StorageIOError) as caught:
            engine.read(file, 0, target.address, PAGE).wait(60)
        assert caught.value.errno in (errno.EAGAIN, errno.EIO) and time.monotonic() - started < 60
        inject(READ, 0)
        both_ways()
        # Standing still: the deadline names it, close says so too, and it goes on when it is let go.
        for which, start in ((READ, lambda: engine.read(file, 0, target.address, MIB)),
                             (WRITE, lambda: engine.write(file, 0, source.address, MIB)),
                             (FLUSH, lambda: engine.flush(file))):
            inject(which, HANG)
            ticket = start()
            with pytest.raises(DeadlineError, match=("read", "write", "flush")[which] + ".*data.*in flight"):
                ticket.wait(0.2)
            library.fuyou_release()
            ticket.wait(60)
            both_ways()
        engine.close()
        print("OK")
    """)  # fmt: skip


@pytest.mark.parametrize("kind", ["io_uring", "threads"])
def test_a_program_ends_though_its_drive_never_answers(preload: str, kind: str, nvme: Path) -> None:
    """close() has waited its deadline and said so: neither dropping the engine nor the exit waits once more."""
    inside(preload, kind, nvme, """
        import gc, weakref
        engine = open_engine(kind, deadline_s=0.3)
        file = engine.open(folder / "data")
        memory = Memory(MIB, random_pages(MIB // PAGE, seed=1))
        inject(WRITE, HANG)
        engine.write(file, 0, memory.address, MIB, keep=memory)
        with pytest.raises(DeadlineError, match="to close the I/O engine.*write 1048576 bytes at 0"):
            engine.close()
        alive = weakref.ref(memory)
        del engine, file, memory
        gc.collect()
        assert alive() is not None  # the drive may still read it
        print("OK")
    """)  # fmt: skip


@pytest.mark.parametrize("kind", FIRST)
def test_training_through_a_drive_full_of_hiccups_has_the_bits_of_plain_pytorch(
    preload: str, kind: str, nvme: Path
) -> None:
    inside(preload, kind, nvme, """
        expected, weights = plain(4)
        training = Training()
        with training.wrap(folder, io=kind) as run:
            inject(READ, SHORT, PAGE, count=10**9, period=2)
            inject(WRITE, FAIL, errno.EAGAIN, count=10**9, period=3)
            losses = [training.step(), training.step()]
            assert injected(READ) > 20 and injected(WRITE) > 20, (injected(READ), injected(WRITE))
            inject(READ, FAIL, errno.EINTR, count=10**9, period=2)
            inject(WRITE, SHORT, PAGE, count=10**9, period=2)
            losses += [training.step(), training.step()]
        assert losses == expected and same(training.weights(), weights)
        assert_empty(run)
        print("OK")
    """)  # fmt: skip


@pytest.mark.parametrize("kind", FIRST)
def test_training_meets_one_error_at_any_place_and_never_a_wrong_bit(preload: str, kind: str, nvme: Path) -> None:
    """EIO at the nth operation: an error that names it, or the bits of plain PyTorch where nobody needed what was read:
    weights that were fetched for a forward that never came. A write is always told, and so are reads that all fail."""
    inside(preload, kind, nvme, """
        import warnings
        expected, weights = plain(3)
        for which, count in ((READ, 1), (READ, 10**9), (WRITE, 1)):
            for skip in (0, 7, 30):
                training = Training()
                run = training.wrap(folder, io=kind)
                losses = [training.step()]
                inject(which, FAIL, errno.EIO, skip=skip, count=count)
                problems = []
                try:
                    losses += [training.step(), training.step()]
                except FuyouError as error:  # StateError where nobody had waited for the update yet
                    assert "Errno 5" in str(error) and "data" in str(error) and "Input/output error" in str(error)
                    problems.append(error)
                hit = injected(which)
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        run.close()
                except FuyouError as error:
                    problems.append(error)
                inject(which, 0)
                for error in problems:
                    error.__traceback__ = error.__context__ = None
                assert hit, (which, skip)
                assert problems or (which, count) == (READ, 1), f"nobody was told of {which} {skip}"
                if not problems:
                    assert losses == expected and same(training.weights(), weights)
                assert losses == expected[:len(losses)], "a wrong loss"
                assert_empty(run)
                shutil.rmtree(folder / "fuyou-store", ignore_errors=True)  # a step that was complete
        print("OK")
    """)  # fmt: skip
