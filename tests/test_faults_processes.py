"""Forks with operations in flight, Ctrl-C in a wait, and a kill: parent and next start are whole, nothing hangs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from fault_tools import (
    FIRST,
    KINDS,
    MIB,
    PAGE,
    REPOSITORY,
    Memory,
    Place,
    Training,
    assert_empty,
    mounted,
    nothing_leaks,
    open_or_skip,
    plain,
    random_pages,
    run_script,
    same,
)

import fuyou
from fuyou.core.errors import DeadlineError, StateError


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    open_or_skip(request.param).close()
    return str(request.param)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with mounted(tmp_path, 48 * MIB) as made:
        yield made


def in_child(work) -> int:
    """Exit status of a forked child that runs `work`: 0 where that returned true. One that hangs is killed: 14."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(30)
        try:
            os._exit(0 if work() else 1)
        except BaseException as error:  # a child must not come back into pytest
            print(f"child: {error!r}", file=sys.stderr)
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def refuses(*uses) -> bool:
    for use in uses:
        try:
            use()
        except StateError:
            continue
        return False
    return True


def test_a_fork_with_operations_in_flight_on_a_drive_that_stands_still(kind: str, place: Place) -> None:
    """Every entry point refuses in the child, whose exit does not wait for the parent's drive."""
    with nothing_leaks(), open_or_skip(kind) as engine:
        file = engine.open(place.folder / "file")
        content = Memory(4 * MIB, random_pages(4 * MIB // PAGE, seed=1))
        target = Memory(4 * MIB)
        place.freeze()
        write = engine.write(file, 0, content.address, 4 * MIB, keep=content)
        read = engine.read(file, 0, target.address, 4 * MIB)

        def work() -> bool:
            engine.close()
            return refuses(
                lambda: engine.read(file, 0, target.address, PAGE),
                lambda: engine.write(file, 0, target.address, PAGE),
                lambda: engine.flush(file),
                lambda: engine.open(file.path),
                lambda: engine.close_file(file),
                lambda: engine.register(target.address, PAGE),
                lambda: engine.in_flight(),
                lambda: write.wait(),
                lambda: read.wait(1),
            )

        started = time.monotonic()
        assert in_child(work) == 0
        assert time.monotonic() - started < 20
        place.thaw()
        write.wait(60)
        read.wait(60)
        assert target.bytes() == content.bytes() == Path(file.path).read_bytes()


@pytest.mark.parametrize(
    ("settled", "ram"),
    [
        (False, "1MiB"),
        (True, "64MiB"),
        pytest.param(False, "64MiB", marks=pytest.mark.slow),
        pytest.param(True, "1MiB", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("kind", FIRST)
def test_a_forked_child_that_ends_as_programs_do(kind: str, settled: bool, ram: str, nvme: Path) -> None:
    """multiprocessing's fork, whose child runs Python's own exit with the engine, its tickets and the run in its memory. Updates
    are under way when it begins, or what is read lies in memory that it has not got."""
    run_script("""
        import multiprocessing, os, sys
        from pathlib import Path
        from fault_tools import Training, assert_empty, plain, same
        import fuyou
        def child(run, queue):
            refused = []
            weight = run.model[2].weight
            uses = [
                run.optimizer.step, run.settle, lambda: run.save_pretrained("/nowhere"), lambda: run.save("/nowhere/at/all"),
                lambda: run.model(None), lambda: weight.sum(), lambda: weight.data.fill_(1), run.optimizer.state_dict,
                lambda: run.optimizer.state[weight]["exp_avg"].sum(), run.model.state_dict,
            ]
            if weight.grad is not None:
                uses += [lambda: weight.grad.sum(), lambda: weight.grad.norm(1), lambda: weight.grad.mul_(2) * 1]
            for use in uses:
                try:
                    use()
                    refused.append("went through")
                except fuyou.StateError as error:
                    refused.append("refused" if "forked child" in str(error) else str(error))
                except Exception as error:
                    refused.append(repr(error))
            run.close()
            queue.put(refused)
        expected, weights = plain(4)
        training = Training()
        context = multiprocessing.get_context("fork")
        with training.wrap(Path(sys.argv[2]), io=sys.argv[1], ram=sys.argv[4]) as run:
            losses = [training.step() for _ in range(3)]  # the last one's writes are behind it
            if sys.argv[3] == "True":
                run.settle()
                losses.append(training.backward())  # gradients are there
            queue = context.SimpleQueue()
            process = context.Process(target=child, args=(run, queue))
            process.start()
            process.join(30)  # what it tells is little enough for a pipe
            refused = queue.get() if not queue.empty() else ["died"]
            assert process.exitcode == 0, process.exitcode
            assert refused == ["refused"] * len(refused), refused
            if sys.argv[3] == "True":
                training.optimizer.step()
            else:
                losses.append(training.step())
        assert losses == expected and same(training.weights(), weights)
        assert_empty(run)
        print("OK")
    """, kind, str(nvme), str(settled), ram)  # fmt: skip


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.randn(64, generator=torch.Generator().manual_seed(index))


def test_workers_forked_in_every_epoch_while_writes_are_under_way(kind: str, nvme: Path) -> None:
    def epochs(training: Training) -> list[float]:
        losses = []
        for _ in range(2):
            for batch in torch.utils.data.DataLoader(
                Rows(), batch_size=8, num_workers=2, multiprocessing_context="fork"
            ):
                loss = training.model(batch).square().mean()
                loss.backward()
                training.optimizer.step()
                training.optimizer.zero_grad()
                losses.append(loss.item())
        return losses

    oracle = Training()
    expected = epochs(oracle)
    training = Training()
    with nothing_leaks():
        with training.wrap(nvme, io=kind) as run:
            assert epochs(training) == expected
        assert same(training.weights(), oracle.weights())
        assert_empty(run)
    assert multiprocessing.active_children() == []


def test_a_fork_copies_nothing_of_registered_memory(nvme: Path) -> None:
    """Pinned pages are copied at a fork unless they are left out of it: a child would cost the arena once more."""
    training = Training()
    with training.wrap(nvme, io="auto", ram="256MiB") as run:
        training.step()
        run._tiers.arena.bytes.fill_(1)
        grown = []

        def work() -> bool:
            grown.append(psutil.Process().memory_info().rss)
            return (
                str(run._tiers.arena.address) != ""
                and f"{run._tiers.arena.address:x}-" not in Path("/proc/self/maps").read_text()
            )

        before = psutil.virtual_memory().available
        started = time.monotonic()
        assert in_child(work) == 0
        assert time.monotonic() - started < 5 and before > 0


def test_ctrl_c_in_a_wait_is_an_interrupt_and_the_operation_goes_on(kind: str, place: Place) -> None:
    with nothing_leaks(), open_or_skip(kind) as engine:
        file = engine.open(place.folder / "file")
        content = Memory(MIB, random_pages(MIB // PAGE, seed=2))
        place.freeze()
        write = engine.write(file, 0, content.address, MIB)
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
        try:
            started = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(KeyboardInterrupt):
                write.wait(60)
            assert time.monotonic() - started < 10
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGINT, handler)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
        with pytest.raises(DeadlineError):
            write.wait(0.1)
        place.thaw()
        write.wait(60)
        assert Path(file.path).read_bytes() == content.bytes()


KILLED = """
    import sys
    from pathlib import Path
    from fault_tools import Training
    training = Training()
    run = training.wrap(Path(sys.argv[2]), io=sys.argv[1])
    training.step()
    print("running", flush=True)
    while True:
        training.step()
"""


@pytest.mark.parametrize("kind", FIRST)
def test_a_killed_run_leaves_no_lock_in_the_way_and_its_steps_are_not_discarded_unasked(kind: str, nvme: Path) -> None:
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"}
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), kind, str(nvme)],
        stdout=subprocess.PIPE, text=True, env=environment, cwd=REPOSITORY,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == "running\n"
        time.sleep(0.2)
        process.kill()
    assert (nvme / "fuyou-store" / "data").exists()  # what it left
    expected, weights = plain(2)
    training = Training()
    for _ in range(2):
        with pytest.raises(
            StateError, match=r"holds step \d+ of a run that did not end in order: .*resume=True.*resume=False"
        ):
            training.wrap(nvme, io=kind)
    with training.wrap(nvme, io=kind, resume=False) as run:
        assert run.committed_step == 0
        assert [training.step(), training.step()] == expected
    assert same(training.weights(), weights)
    assert_empty(run)
    Training().wrap(nvme, io=kind).close()  # that one was closed in order, and this one has no step
    assert os.listdir(nvme) == []


def test_an_interrupt_while_a_run_waits_for_its_drive_leaves_it_closable(place: Place) -> None:
    training = Training()
    with nothing_leaks():
        run = training.wrap(place.folder, deadline_s=60)
        training.step()
        run.settle()
        place.freeze()
        signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            with pytest.raises(KeyboardInterrupt):
                for _ in range(20):
                    training.step()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
        place.thaw()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "half-way", where the interrupt came in the middle of an update
            run.close()
        assert_empty(run)
    assert isinstance(run, fuyou.Run)


def test_a_program_that_ends_with_an_error_in_the_middle_of_updates_says_its_own(nvme: Path) -> None:
    """Nobody closed the run: its threads are not met in native code by the interpreter's end, which would abort it."""
    script = """
        import sys
        from fault_tools import Training
        training = Training()
        run = training.wrap(sys.argv[1])
        for _ in range(3):
            training.step()
        raise LookupError("the user's own")
    """
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"}
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(nvme)], capture_output=True, text=True, env=environment, cwd=REPOSITORY
    )  # fmt: skip
    assert ended.returncode == 1 and ended.stderr.rstrip().endswith("LookupError: the user's own"), ended.stderr
