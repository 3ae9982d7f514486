"""Limits of the process and refusals of the kernel: fuyou takes the next-best way by itself and says so once, or says
what is short. Each in a process of its own, most as an ordinary user."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_tools import FIRST, open_or_skip, run_script

TRAIN = """
    import resource, shutil, signal, sys, warnings
    from pathlib import Path
    import fuyou
    from fault_tools import MIB, Memory, Training, assert_empty, plain, random_pages, same
    from fuyou.tiers.io import open_engine
    folder = Path(sys.argv[1])
    def train(io="auto", ram="1MiB"):
        expected, weights = plain(3)
        training = Training()
        with training.wrap(folder, io=io, ram=ram) as run:
            assert [training.step() for _ in range(3)] == expected
            notes = run.report().dict()["notes"]
        assert same(training.weights(), weights)
        assert_empty(run)
        shutil.rmtree(folder / "fuyou-store")  # its steps
        return notes
"""


ORDINARY = """
    import ctypes, os
    if os.geteuid() == 0:  # a Python that is closed to others can still be used: what it needs is imported by now
        train()
        for each in ("io_uring", "threads", "aiofiles"):
            try:
                open_engine(each).close()
            except fuyou.FuyouError:
                pass
        import aiofiles, torch._dynamo
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (8 << 20, 8 << 20))
        os.setgroups([]), os.setgid(65534), os.setuid(65534)
        assert ctypes.CDLL(None).prctl(4, 1, 0, 0, 0) == 0  # its own /proc is readable again
    sys.path_importer_cache.clear()
"""


def run_inside(script: str, folder: Path, *, ordinary: bool = False) -> None:
    run_script("".join(textwrap.dedent(each) for each in (TRAIN, ORDINARY if ordinary else "", script)), str(folder))


def test_an_ordinary_user_with_eight_mebibytes_of_memlock_trains_and_is_told_once(lent: Path) -> None:
    open_or_skip("io_uring").close()
    run_inside("""
        assert os.geteuid() != 0 and resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] <= 8 * MIB
        engine = open_engine("io_uring")
        large = Memory(64 * MIB, random_pages(16384, seed=1))
        assert not engine.register(large.address, 64 * MIB)
        assert "memlock" in engine.registration_note and "Cannot allocate memory" in engine.registration_note
        file = engine.open(folder / "file")
        target = Memory(64 * MIB)
        engine.write(file, 0, large.address, 64 * MIB)
        engine.read(file, 0, target.address, 64 * MIB).wait()
        assert target.bytes() == large.bytes()
        engine.close()
        (folder / "file").unlink()
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            said = [note for note in train(io="io_uring") if "register" in note]
        assert len(said) <= 1, said
        print("OK")
    """, lent, ordinary=True)  # fmt: skip


def test_a_memlock_limit_too_small_for_the_arena_is_noted_once_and_costs_no_bit(nvme: Path) -> None:
    open_or_skip("io_uring").close()
    run_inside("""
        import ctypes, struct
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
        libc = ctypes.CDLL(None, use_errno=True)
        header = ctypes.create_string_buffer(struct.pack("=II", 0x20080522, 0))
        sets = ctypes.create_string_buffer(24)
        assert libc.capget(header, sets) == 0
        words = list(struct.unpack_from("=6I", sets))
        words[0] &= ~(1 << 14)  # CAP_IPC_LOCK, which root has and which lifts the limit
        struct.pack_into("=6I", sets, 0, *words)
        assert libc.capset(header, sets) == 0
        said = [note for note in train(io="io_uring") if "memlock" in note]
        assert len(said) == 1, said
        print("OK")
    """, nvme)  # fmt: skip


@pytest.mark.parametrize("answer", [1, 38], ids=["EPERM", "ENOSYS"])
def test_where_io_uring_is_refused_threads_take_over_and_that_is_said_once(nvme: Path, answer: int) -> None:
    if not os.path.exists("/proc/sys/kernel/seccomp"):
        pytest.skip("this kernel has no seccomp filters")
    run_inside(f"""
        import ctypes, os, struct
        op = lambda code, jt, jf, k: struct.pack("=HBBI", code, jt, jf, k)
        code = op(0x20, 0, 0, 0) + op(0x15, 0, 1, 425) + op(0x06, 0, 0, 0x00050000 | {answer}) + op(0x06, 0, 0, 0x7FFF0000)
        filters = ctypes.create_string_buffer(code)
        program = ctypes.create_string_buffer(struct.pack("@HP", 4, ctypes.addressof(filters)))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0
        said = [note for note in train() if "io_uring" in note]
        assert len(said) == 1 and said[0].startswith("threads, because io_uring is not available"), said
        assert os.strerror({answer}) in said[0], said
        print("OK")
    """, nvme)  # fmt: skip


@pytest.fixture
def io_uring_disabled() -> Iterator[None]:
    switch = Path("/proc/sys/kernel/io_uring_disabled")
    if os.geteuid() != 0 or not switch.exists():
        pytest.skip("kernel.io_uring_disabled cannot be set here: it takes root, and Linux 6.6")
    before = switch.read_text()
    try:
        switch.write_text("1")
    except OSError as error:
        pytest.skip(f"kernel.io_uring_disabled cannot be set here: {error}")
    try:
        yield
    finally:
        switch.write_text(before)


@pytest.mark.slow  # it changes the machine for the length of the test: other tests would meet it
def test_where_the_administrator_has_switched_io_uring_off(io_uring_disabled: None, lent: Path) -> None:
    run_inside("""
        said = [note for note in train() if "io_uring" in note]
        assert len(said) == 1 and "Operation not permitted" in said[0] and said[0].startswith("threads"), said
        print("OK")
    """, lent, ordinary=True)  # fmt: skip


def test_too_few_descriptors(nvme: Path) -> None:
    """At every number of free descriptors: a run that trains, or an error of ours, and nothing left behind."""
    run_inside("""
        import os
        train()  # whatever is opened once
        used = len(os.listdir("/proc/self/fd"))
        outcomes = []
        for free in (*range(16), 24, 39):
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + free, 20000))
            try:
                train()
                outcomes.append("trained")
            except fuyou.FuyouError as error:
                assert "Too many open files" in str(error) or "not available" in str(error), repr(error)
                outcomes.append(type(error).__name__)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (20000, 20000))
            assert os.listdir(folder) == [], (free, os.listdir(folder))
            assert len(os.listdir("/proc/self/fd")) <= used + 1, (free, os.listdir("/proc/self/fd"))
        assert outcomes[0] != "trained" and outcomes[-1] == "trained", outcomes
        print("OK")
    """, nvme)  # fmt: skip


def test_a_file_size_limit_is_refused_before_training(nvme: Path) -> None:
    run_inside("""
        import os
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        try:
            Training().wrap(folder)
        except fuyou.StoreError as error:
            assert "File too large" in str(error) and "are needed" in str(error), error
        else:
            raise SystemExit("a run began whose files cannot be made")
        assert os.listdir(folder) == []
        print("OK")
    """, nvme)  # fmt: skip


@pytest.mark.parametrize("kind", FIRST)
def test_no_thread_to_be_had(lent: Path, kind: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("the limit of processes counts those of the whole user: this needs a user of its own")
    open_or_skip(kind).close()
    run_inside(f"""
        train(io="{kind}")
        tasks = len(os.listdir("/proc/self/task"))
        resource.setrlimit(resource.RLIMIT_NPROC, (1, resource.getrlimit(resource.RLIMIT_NPROC)[1]))
        for attempt in (lambda: open_engine("{kind}"), lambda: Training().wrap(folder, io="{kind}")):
            try:
                attempt()
            except fuyou.FuyouError as error:
                assert "thread" in str(error), error
            else:
                raise SystemExit("threads were made where none may be")
        assert os.listdir(folder) == [] and len(os.listdir("/proc/self/task")) <= tasks
        resource.setrlimit(resource.RLIMIT_NPROC, (resource.getrlimit(resource.RLIMIT_NPROC)[1],) * 2)
        train(io="{kind}")
        print("OK")
    """, lent, ordinary=True)  # fmt: skip


def test_the_kernel_switch_is_where_the_test_looks_for_it() -> None:
    switch = Path("/proc/sys/kernel/io_uring_disabled")
    assert not switch.exists() or re.fullmatch(r"[012]\n", switch.read_text())
