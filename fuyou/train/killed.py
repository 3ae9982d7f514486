"""Why a launched script ended as it did, in words: what the signal means here, with the numbers that speak for it."""

from __future__ import annotations

import signal
from collections.abc import Mapping

from fuyou.core.environment import GPU, NVME, NVME_LIMIT, RAM
from fuyou.core.limits import Memory, MemoryGroup, killed_for_memory
from fuyou.core.sizes import format_bytes
from fuyou.train.child import End

_BUDGETS = (("ram", RAM), ("gpu", GPU), ("nvme_limit", NVME_LIMIT))
_SENTENCES = {
    signal.SIGSEGV: "It read or wrote memory that is not its own: a fault of native code (an extension, a driver, "
    "mismatched builds of torch and its extensions), seldom of Python. PYTHONFAULTHANDLER=1 in the environment makes "
    "Python print the line at which it happens.",
    signal.SIGILL: "It ran an instruction that this CPU does not have: some extension was built for another CPU. "
    "PYTHONFAULTHANDLER=1 in the environment shows which line it was called from; install that package's ordinary wheel, "
    "or build it on this machine.",
    signal.SIGFPE: "It divided an integer by zero in native code. PYTHONFAULTHANDLER=1 in the environment makes Python "
    "print the line at which it happens.",
    signal.SIGABRT: "It aborted itself: native code met something that it does not go on from (a C++ exception, a CUDA "
    "assertion, a damaged heap); the reason stands above, if it gave one.",
}


def explain(
    end: End, before: Memory, after: Memory, environment: Mapping[str, str], shared: tuple[int, int] | None
) -> str:
    """A paragraph for a script that a signal ended, or that failed while the kernel killed for memory; else ''.

    `shared`: (size, free) of /dev/shm when the script ended.
    """
    killed = killed_for_memory(before, after)
    if end.code == -signal.SIGINT:
        return ""  # Ctrl-C, by the person who reads this
    if end.code >= 0:
        return _worker_killed(end, killed) if end.code and killed else ""
    number = -end.code
    known = {each.value: each for each in signal.Signals}.get(number)
    name = known.name if known else f"signal {number}"
    begin = f"The script was killed by {name} (signal {number}; exit status {end.exit_status}). "
    if number == signal.SIGKILL:
        return begin + _out_of_memory(end, killed, after, environment)
    if number == signal.SIGBUS:
        return begin + _bus_error(shared)
    return (begin + _SENTENCES.get(known, "")).strip() if known else begin.strip()


def _out_of_memory(end: End, killed: MemoryGroup | bool, after: Memory, environment: Mapping[str, str]) -> str:
    if isinstance(killed, MemoryGroup):
        cause = f"It was out of memory: the kernel has counted the kill in the control group {killed.folder}."
    elif killed:
        cause = "It was out of memory: the kernel has counted such a kill on this machine during the run."
    else:
        cause = (
            "Most likely it was out of memory, although the kernel has counted no such kill that can be seen from here; "
            "else somebody sent it kill -9."
        )
    return (
        f"{cause} It held {format_bytes(end.peak_rss_bytes)} at its highest. {_budgets(environment)} {_limits(after)} "
        "Give a lower --ram, and on a CPU --gpu too, so that the budgets, about 1 GiB for Python and torch, and what the script "
        "holds beside fuyou (data, DataLoader workers) stay below that; without budgets fuyou takes 80 % of what is free."
    )


def _budgets(environment: Mapping[str, str]) -> str:
    given = ", ".join(
        f"{name}={environment[variable]}" if environment.get(variable) else f"{name} left to fuyou.wrap"
        for name, variable in _BUDGETS
    )
    return f"Budgets of this launch: {given}, nvme={environment.get(NVME) or 'left to fuyou.wrap'}."


def _limits(memory: Memory) -> str:
    machine = (
        f"the machine has {format_bytes(memory.total_bytes)}, {format_bytes(memory.available_bytes)} of it free now"
    )
    group = memory.tightest()
    if group is None:
        return f"No control group limits memory below the machine's: {machine}."
    used = "" if group.used_bytes is None else f", {format_bytes(group.used_bytes)} in use now"
    peak = "" if group.peak_bytes is None else f", {format_bytes(group.peak_bytes)} at its highest"
    return (
        f"The control group {group.folder} is limited to {format_bytes(group.limit_bytes or 0)}{used}{peak}; {machine}."
    )


def _bus_error(shared: tuple[int, int] | None) -> str:
    state = "there is no /dev/shm here"
    if shared is not None:
        size, free = shared
        state = f"/dev/shm has {format_bytes(size)}, {format_bytes(size - free)} of it in use now"
    return (
        f"Most likely /dev/shm was full: DataLoader workers pass batches through it, and memory that cannot be had there "
        f"ends in this signal; {state}. Give it more (docker run --shm-size=8g, or mount -o remount,size=8G /dev/shm), or "
        "use fewer workers (num_workers=0 needs none). A file that was cut off while it was mapped, or a drive that "
        "failed under one, does the same."
    )


def _worker_killed(end: End, killed: MemoryGroup | bool) -> str:
    where = f"in the control group {killed.folder}" if isinstance(killed, MemoryGroup) else "on this machine"
    return (
        f"The script ended with status {end.code}, and during it the kernel killed a process for memory {where}: if that "
        "was a DataLoader worker, use fewer of them, or lower --ram."
    )
