"""Adam's threads: the same bits for any number of them, on the cores that were chosen, and nothing left behind."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from adam_oracle import ADAMW, SCALES, Oracle, backends, odd_numbers, same_bits, scaled
from torch import Tensor

import fuyou
from fuyou.core.config import Config
from fuyou.core.errors import ConfigError
from fuyou.swap.adam import AdamKernels, load_kernels, native_problem, torch_tail_width
from fuyou.swap.adam_cores import AdamCores, choose_cores

needs_native = pytest.mark.skipif(bool(native_problem()), reason=native_problem() or "native kernels are here")
PATHS = [name.split("-")[2] for name in backends() if name.startswith("native-3-")]
COUNT = 5 * (1 << 17) + 16 * 7 + 5  # enough for five threads; what is left is neither a vector nor a piece


def state_of(kind: str, start: Tensor) -> list[Tensor]:
    zeros, low = torch.zeros(2, start.numel()), torch.empty(start.numel(), dtype=torch.int16)
    first, second = zeros[0].clone(), zeros[1].clone()
    if kind == "fp32":
        return [start.clone(), first, second]
    copy = torch.empty(start.numel(), dtype=torch.bfloat16)
    if kind == "copy":
        return [start.clone(), copy, first, second]
    load_kernels("torch").split(start, copy, low, second)
    return [copy, low, first, second]


def updated(kernels: AdamKernels, kind: str, start: Tensor, grad: Tensor, cuts: list[int]) -> list[Tensor]:
    state = state_of(kind, start)
    step = {"fp32": kernels.step_fp32, "copy": kernels.step_copy, "split": kernels.step_split}[kind]
    edges = sorted({0, *cuts, start.numel()})
    for first, last in zip(edges[:-1], edges[1:], strict=True):
        tail = start.numel() % torch_tail_width() if last == start.numel() else 0
        step(*(each[first:last] for each in (*state, grad)), tail=tail, scales=SCALES["two"], hyper=ADAMW, step=1)
    return state


@needs_native
@pytest.mark.parametrize("kind", ["fp32", "copy", "split"])
@pytest.mark.parametrize("path", PATHS)
def test_bits_depend_on_the_tensor_alone(kind: str, path: str) -> None:
    """Not on threads, chunk edges, vector width, nor on the address that decides about streaming stores."""
    generator = torch.Generator().manual_seed(2)
    rng = random.Random(path + kind)
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    start, grad = odd_numbers(COUNT, generator), odd_numbers(COUNT, generator).flip(0).contiguous().to(dtype)
    oracle = Oracle(start, ADAMW)
    oracle.step(scaled(grad, SCALES["two"]).float(), ADAMW.lr)
    expected = oracle.state()
    reference = updated(load_kernels("torch"), kind, start, grad, [])
    assert same_bits(reference[-2], expected["exp_avg"]) and same_bits(reference[0].float(), (
        expected["param"].bfloat16().float() if kind == "split" else expected["param"]
    ))  # fmt: skip
    for threads in (1, 2, 3, 4, 5):
        cuts = [16 * rng.randrange(COUNT // 16) for _ in range(rng.randrange(4))]
        got = updated(load_kernels("native", threads=threads, path=path), kind, start, grad, cuts)
        for one, other in zip(got, reference, strict=True):
            assert same_bits(one, other), (threads, cuts)


@needs_native
def test_copy_at_any_address() -> None:
    """A copy at no multiple of 32 bytes takes ordinary stores; what surrounds it is not written."""
    count = 3 * 64 + 5
    start, grad = torch.randn(count), torch.randn(count).bfloat16()
    for path in PATHS:
        for shift in range(33):
            room = torch.full((count + 64,), 7.0, dtype=torch.bfloat16)
            state = [start.clone(), room[shift : shift + count], torch.zeros(count), torch.zeros(count)]
            load_kernels("native", threads=1, path=path).step_copy(
                *state, grad, tail=count % torch_tail_width(), scales=[], hyper=ADAMW, step=1
            )
            assert same_bits(state[1], state[0].bfloat16()), (path, shift)
            assert bool((room[:shift] == 7).all() and (room[shift + count :] == 7).all()), (path, shift)


# --- cores ------------------------------------------------------------------------------------------------------------


def machine(root: Path, siblings: dict[int, str], quota: str = "max 100000") -> Path:
    """A /sys and /proc that say which CPUs share a core, and what the control group grants."""
    for cpu, text in siblings.items():
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(text + "\n")
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("0::/job\n")
    (root / "proc/self/mountinfo").write_text("30 20 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    (root / "sys/fs/cgroup/job").mkdir(parents=True)
    (root / "sys/fs/cgroup/job/cpu.max").write_text(quota + "\n")
    return root


@pytest.mark.parametrize(("cores", "expected"), [(1, 1), (2, 2), (3, 3), (4, 3), (8, 7), (15, 14), (16, 14), (64, 62)])
def test_a_share_of_the_cores(tmp_path: Path, cores: int, expected: int) -> None:
    root = machine(tmp_path, {cpu: str(cpu) for cpu in range(cores)})
    chosen = choose_cores(None, frozenset(range(cores)), root)
    bound = tuple(range(cores - expected, cores)) if expected < cores else ()
    assert chosen == AdamCores(expected, bound)


def test_one_hardware_thread_of_each_core(tmp_path: Path) -> None:
    """8 cores of two threads each, numbered as Linux does (0 and 8 share a core), and only some of them ours."""
    root = machine(tmp_path, {cpu: f"{cpu % 8},{cpu % 8 + 8}" for cpu in range(16)})
    assert choose_cores(None, frozenset(range(16)), root) == AdamCores(7, (1, 2, 3, 4, 5, 6, 7))
    assert choose_cores(None, frozenset({2, 3, 10, 11}), root) == AdamCores(2, (2, 3))
    assert choose_cores(None, frozenset({11}), root) == AdamCores(1, ())
    assert choose_cores(3, frozenset(range(16)), root) == AdamCores(3, (5, 6, 7))
    assert choose_cores(10, frozenset(range(16)), root) == AdamCores(10, (0, 1, 2, 3, 4, 5, 6, 7, 8, 9))
    assert choose_cores(99, frozenset(range(16)), root) == AdamCores(99, ())


@pytest.mark.parametrize(("quota", "expected"), [("250000 100000", 2), ("50000 100000", 1), ("9900000 100000", 7)])
def test_no_more_than_the_quota(tmp_path: Path, quota: str, expected: int) -> None:
    root = machine(tmp_path, {cpu: str(cpu) for cpu in range(8)}, quota)
    assert choose_cores(None, frozenset(range(8)), root).threads == expected


def test_config_overrides() -> None:
    assert Config().adam_threads is None and Config(adam_threads=5).adam_threads == 5
    for wrong in (0, -1, 1.5, "2", True):
        with pytest.raises(ConfigError, match="adam_threads"):
            Config(adam_threads=wrong)
    if not native_problem():
        assert load_kernels("native", threads=5).threads == 5
        assert load_kernels("native").threads == choose_cores().threads
        for given in (None, 3):
            model = torch.nn.Sequential(torch.nn.Linear(4, 4))
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)
            with fuyou.wrap(
                model, optimizer, nvme=None, ram="256MiB", gpu="256MiB", device="cpu", config=Config(adam_threads=given)
            ) as run:
                assert run._tiers.kernels.threads == (given or choose_cores().threads)


@needs_native
def test_only_the_threads_started_are_bound() -> None:
    """Seen from the system: while a long update runs, its other threads may use the given CPU alone."""
    from fuyou import _native

    cpu = max(os.sched_getaffinity(0))
    ours = os.sched_getaffinity(0)
    tensors = [torch.full((1 << 22,), 0.5) for _ in range(4)]
    addresses = [each.data_ptr() for each in tensors]
    seen: dict[str, set[str]] = {}
    done = threading.Event()

    def update() -> None:
        while not done.is_set():
            _native.adam_fp32(
                *addresses, 1 << 22, 0, [], 1e-3, 0.9, 0.999, 1e-8, 0.01, True, 1, threads=4, cpus=[cpu], path="scalar"
            )

    worker = threading.Thread(target=update)
    worker.start()
    try:
        for _ in range(4000):
            for task in Path("/proc/self/task").iterdir():
                try:
                    status = (task / "status").read_text()
                except OSError:  # it has ended
                    continue
                fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
                if fields["Name"] == "fuyou-adam":
                    seen.setdefault(fields["Cpus_allowed_list"], set()).add(task.name)
            if len(seen.get(str(cpu), ())) >= 6:
                break
        assert os.sched_getaffinity(worker.native_id or 0) == ours, "the caller's thread was bound"
    finally:
        done.set()
        worker.join()
    assert len(seen.get(str(cpu), ())) >= 6, seen
    assert os.sched_getaffinity(0) == ours
    assert not [t for t in Path("/proc/self/task").iterdir() if (t / "comm").read_text() == "fuyou-adam\n"]


@needs_native
def test_cpus_that_are_not_there() -> None:
    """Taken away since, or never there: the update runs all the same; nonsense is refused."""
    from fuyou import _native

    def step(cpus: list[int]) -> Tensor:
        tensors = [torch.full((1 << 19,), 0.5) for _ in range(4)]
        addresses = [each.data_ptr() for each in tensors]
        _native.adam_fp32(*addresses, 1 << 19, 0, [], 1e-3, 0.9, 0.999, 1e-8, 0.01, True, 1, threads=3, cpus=cpus)
        return tensors[0]

    assert torch.equal(step([9999]), step([]))
    for cpu in (-1, 10**6):
        with pytest.raises(ValueError, match="no CPU"):
            step([cpu])


# --- what surrounds them ----------------------------------------------------------------------------------------------

WITHOUT_THREADS = """
import resource, torch
from fuyou.swap.adam import AdamHyper, load_kernels
states = [[torch.full((2_000_000,), value) for value in (1.0, 0.1, 0.01, 0.3)] for _ in range(2)]
hyper = AdamHyper(1e-3, 0.9, 0.999, 1e-8, 0.01, True)
alone, many = load_kernels("native", threads=1), load_kernels("native", threads=4)
alone.step_fp32(*states[0], tail=0, scales=[], hyper=hyper, step=1)
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + (1 << 20), resource.RLIM_INFINITY))  # no room for a thread's stack
many.step_fp32(*states[1], tail=0, scales=[], hyper=hyper, step=1)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert all(torch.equal(one, other) for one, other in zip(*states))
"""


@needs_native
def test_no_thread_to_be_had() -> None:
    """Where the system gives no more threads the calling one does all."""
    subprocess.run([sys.executable, "-c", WITHOUT_THREADS], check=True)


FORK_IN_THE_MIDST = """
import os, threading, torch
from fuyou.swap.adam import AdamHyper, load_kernels
hyper = AdamHyper(1e-3, 0.9, 0.999, 1e-8, 0.01, True)
kernels = load_kernels("native", threads=4)

def updated():
    state = [torch.full((1 << 20,), value) for value in (1.0, 0.1, 0.01, 0.3)]
    kernels.step_fp32(*state, tail=0, scales=[], hyper=hyper, step=1)
    return state

expected = updated()
done = threading.Event()
def work():
    while not done.is_set():
        updated()
thread = threading.Thread(target=work)
thread.start()
children = []
for _ in range(8):
    pid = os.fork()
    if pid == 0:  # the kernels alone: torch's own threads do not survive a fork
        state = [torch.empty(0) for _ in range(4)]
        fresh = [each.clone() for each in expected]
        kernels.step_fp32(*fresh, tail=0, scales=[], hyper=hyper, step=2)
        os._exit(0)
    children.append(pid)
statuses = [os.waitpid(pid, 0)[1] for pid in children]
done.set()
thread.join()
assert statuses == [0] * 8, statuses
assert all(torch.equal(one, other) for one, other in zip(updated(), expected))
"""


@needs_native
def test_fork_while_threads_run() -> None:
    """A child forked in the midst of an update updates too: there is no pool for it to miss."""
    subprocess.run(
        [sys.executable, "-c", FORK_IN_THE_MIDST], check=True, timeout=60, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
