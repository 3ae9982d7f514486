"""How many threads the AdamW kernels run on, and on which cores."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fuyou.core.limits import cpu_quota

ALL_UP_TO = 3  # cores: with no more than these an update takes them all
TWO_LEFT_FROM = 16  # cores: from here on two are left for I/O and Python, below one


@dataclass(frozen=True)
class AdamCores:
    """`threads` with the caller's own, which is bound to nothing; the others are bound to `cpus` (empty: to nothing)."""

    threads: int
    cpus: tuple[int, ...]


def choose_cores(
    threads: int | None = None, allowed: frozenset[int] | None = None, root: Path = Path("/")
) -> AdamCores:
    """`threads` None: one for each physical core that this process may run on (a second hardware thread has no vector
    unit of its own), less one from 4 cores on and two from 16 on, which are left for I/O and Python; no more than the
    control groups' quota pays for. The cores left free are the first, where interrupts are served. A given count is
    taken as it is, on physical cores as long as they last.
    """
    allowed = _allowed() if allowed is None else allowed
    first, second = _by_hardware_thread(allowed, root)
    if threads is None:
        left = 0 if len(first) <= ALL_UP_TO else 1 if len(first) < TWO_LEFT_FROM else 2
        cpus = first[left:]
        quota = cpu_quota(root)
        threads = len(cpus) if quota is None else max(1, min(len(cpus), int(quota)))
    else:
        cpus = (first[-threads:] + second)[: max(threads, 1)]
    bound = threads > 1 and len(cpus) < len(allowed)
    return AdamCores(threads, tuple(sorted(cpus)) if bound else ())


def _allowed() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def _by_hardware_thread(allowed: frozenset[int], root: Path) -> tuple[list[int], list[int]]:
    """(the lowest allowed CPU of each physical core, the others), each in order."""
    seen: set[str] = set()
    first: list[int] = []
    second: list[int] = []
    for cpu in sorted(allowed):
        try:
            core = (root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
        except OSError:
            core = str(cpu)
        (second if core in seen else first).append(cpu)
        seen.add(core)
    return first, second
