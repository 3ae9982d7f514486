"""What this machine and its control groups grant a process: memory, CPU time, and what the kernel killed for it.

Control groups of version 1 and 2, as containers and systemd set them. `root` is where the file system begins: "/", but
for tests. What cannot be read is not there: no function here raises for it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 2**60  # version 1 says "no limit" as the largest multiple of a page below 2**63


@dataclass(frozen=True)
class MemoryGroup:
    """One control group over this process; None is what it does not say."""

    folder: str
    limit_bytes: int | None
    used_bytes: int | None  # caches of files included
    peak_bytes: int | None
    oom_kills: int | None  # processes of it that the kernel has killed for memory
    cache_bytes: int = 0  # of what is used: pages of files, which the kernel takes back before it kills

    @property
    def free_bytes(self) -> int | None:
        """That the limit leaves, caches taken back; None without a limit."""
        if self.limit_bytes is None:
            return None
        return max(0, self.limit_bytes - max(0, (self.used_bytes or 0) - self.cache_bytes))


@dataclass(frozen=True)
class Memory:
    """Taken before and after a run, to see what happened between."""

    total_bytes: int
    available_bytes: int
    groups: tuple[MemoryGroup, ...]  # this process's own first, then those above it
    oom_kills: int  # on the whole machine, as far as it can be seen from here

    def tightest(self) -> MemoryGroup | None:
        """The group with the lowest limit, if one has a limit that is below the machine's memory."""
        limited = [each for each in self.groups if each.limit_bytes is not None and each.limit_bytes < self.total_bytes]
        return min(limited, key=lambda each: each.limit_bytes or 0, default=None)


def read_memory(root: Path = Path("/")) -> Memory:
    info = dict(re.findall(r"^(\w+):\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE))
    kills = re.search(r"^oom_kill (\d+)", _text(root / "proc/vmstat"), re.MULTILINE)
    return Memory(
        int(info.get("MemTotal", 0)) * 1024,
        int(info.get("MemAvailable", 0)) * 1024,
        tuple(memory_group(folder) for folder in _group_folders("memory", root)),
        int(kills[1]) if kills else 0,
    )


def killed_for_memory(before: Memory, after: Memory) -> MemoryGroup | bool:
    """The group in which the kernel killed something between the two; True: somewhere on the machine; False: nothing."""
    counts = {each.folder: each.oom_kills or 0 for each in before.groups}
    for group in after.groups:
        if (group.oom_kills or 0) > counts.get(group.folder, 0):
            return group
    return after.oom_kills > before.oom_kills


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPUs' worth of time that the control groups grant: 1.5 is one and a half; None is no limit."""
    quotas = []
    for folder in _group_folders("cpu", root):
        with contextlib.suppress(OSError, ValueError):
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = (
                    (folder / name).read_text().strip() for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                )
            if quota != "max" and int(quota) > 0:
                quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def shared_memory(root: Path = Path("/")) -> tuple[int, int] | None:
    """(size, free) of /dev/shm in bytes; None where there is none."""
    try:
        status = os.statvfs(root / "dev/shm")
    except OSError:
        return None
    return status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize


def memory_group(folder: Path) -> MemoryGroup:
    """The group of this folder, as it is now."""
    events = _text(folder / "memory.events") or _text(folder / "memory.oom_control")
    kills = re.search(r"^oom_kill (\d+)", events, re.MULTILINE)
    limit = _number(folder, "memory.max", "memory.limit_in_bytes")
    return MemoryGroup(
        str(folder),
        limit if limit is not None and limit < _UNLIMITED else None,
        _number(folder, "memory.current", "memory.usage_in_bytes"),
        _number(folder, "memory.peak", "memory.max_usage_in_bytes"),
        int(kills[1]) if kills else None,
        sum(_file_pages(_text(folder / "memory.stat"))),
    )


def _file_pages(stat: str) -> list[int]:
    """Bytes of pages of files, those of groups below included (version 1 counts these under names of their own)."""
    found = re.findall(r"^(total_)?(?:in)?active_file (\d+)", stat, re.MULTILINE)
    totals = [int(count) for total, count in found if total]
    return totals or [int(count) for _, count in found]


def _group_folders(controller: str, root: Path) -> list[Path]:
    """The folders of this process's groups that may limit `controller`, each hierarchy from its own group upwards.

    In a container the path in /proc/self/cgroup may be the host's, and the mount a part of the hierarchy: what of the
    path the mount does not hold is left off, down to the mount point itself, which is then the container's own group.
    """
    found = []
    for mount, inside, version_2 in _group_mounts(controller, root):
        own = _own_path(controller if not version_2 else None, root)
        if own is None:
            continue
        relative = os.path.relpath(own, inside) if own == inside or own.startswith(inside.rstrip("/") + "/") else "."
        folder = mount / relative
        folder = folder if folder.is_dir() else mount
        while True:
            found.append(folder)
            if folder == mount:
                break
            folder = folder.parent
    return found


def _group_mounts(controller: str, root: Path) -> Iterator[tuple[Path, str, bool]]:
    """(mount point, the group that is mounted there, version 2 or not)."""
    for line in _text(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        mount = root / fields[4].encode().decode("unicode_escape").lstrip("/")
        if kind[0] == "cgroup2" or (kind[0] == "cgroup" and controller in kind[2].split(",")):
            yield mount, fields[3], kind[0] == "cgroup2"


def _own_path(controller: str | None, root: Path) -> str | None:
    """This process's group in the hierarchy of `controller`; None: in that of version 2."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, names, path = line.split(":", 2)
        if (number == "0" and not names) if controller is None else controller in names.split(","):
            return path
    return None


def _number(folder: Path, *names: str) -> int | None:
    for name in names:
        text = _text(folder / name).strip()
        if text.isdigit():
            return int(text)
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""
