"""The user's nvme folders before anything is opened in them: what they are, and what they can hold."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from fuyou.core.errors import BudgetError, StoreError
from fuyou.core.sizes import format_bytes

FOLDER = "fuyou-store"  # made inside the user's folder, 0700
DATA = "data"  # in it
# Beside the first drive's data, where there are commits: two places for records, each in two copies (one file each: what
# damages one does not reach the other), and two copies of the layout. And the mark of a live store without commits.
RECORDS = ("commit-0-a", "commit-0-b", "commit-1-a", "commit-1-b")
LAYOUTS = ("layout-a", "layout-b")
DIRTY = "dirty"
HOME = "home"  # beside the data of every other drive: the path of the first one's folder, which has the records
OPEN = "open"  # there while a run with commits is: left behind, the run did not end in order
# As they are removed: a record goes before the data that it names, and the layout first of all, for without it none of the
# records passes for the newest when only some are left.
STORE_FILES = (*LAYOUTS, *RECORDS, DIRTY, OPEN, HOME, DATA)
FREE_SHARE = 0.95  # of what is free: file systems need some of it for themselves


@dataclass(frozen=True)
class Rooms:
    """Folder i takes from `room_bytes[pools[i]]`: folders on one file system share one room."""

    folders: tuple[str, ...]
    pools: tuple[int, ...]
    room_bytes: tuple[int, ...]

    @property
    def total_bytes(self) -> int:
        return sum(self.room_bytes)

    @property
    def shared(self) -> list[list[str]]:
        """The folders that share a file system, together."""
        together = [
            [folder for folder, its in zip(self.folders, self.pools, strict=True) if its == pool]
            for pool in range(len(self.room_bytes))
        ]
        return [folders for folders in together if len(folders) > 1]

    def __str__(self) -> str:
        parts = []
        for pool, nbytes in enumerate(self.room_bytes):
            its = [folder for folder, other in zip(self.folders, self.pools, strict=True) if other == pool]
            parts.append(f"{format_bytes(nbytes)} in {' and '.join(its)}{' together' if len(its) > 1 else ''}")
        return ", ".join(parts)


def rooms_of(folders: Sequence[str], *, reuse: bool) -> Rooms:
    """What the folders can hold: 95 % of what is free, each file system counted once.

    With `reuse` the bytes of a store that a killed run left behind count as free: the next run in its folder clears it.
    (Where that run is alive, its lock refuses the next one.)
    """
    devices: list[int] = []
    free: list[int] = []
    pools = []
    for folder in folders:
        device = os.stat(folder).st_dev
        if device not in devices:
            devices.append(device)
            free.append(shutil.disk_usage(folder).free)
        pools.append(devices.index(device))
        if reuse:
            for name in STORE_FILES:
                with contextlib.suppress(OSError):
                    free[pools[-1]] += os.lstat(os.path.join(folder, FOLDER, name)).st_blocks * 512
    return Rooms(tuple(folders), tuple(pools), tuple(int(nbytes * FREE_SHARE) for nbytes in free))


def refuse_without_room(needed_bytes: int, limit_bytes: int, rooms: Rooms) -> None:
    """BudgetError before anything is preallocated, when the extents cannot fit the limit."""
    if needed_bytes > limit_bytes:
        raise BudgetError(
            f"The nvme folders {', '.join(rooms.folders)} have no room: the extents need {format_bytes(needed_bytes)} "
            f"({needed_bytes} bytes) and the limit is {format_bytes(limit_bytes)}, {format_bytes(needed_bytes - limit_bytes)} "
            f"short; free, less 5 %, are {rooms}. Free some, raise nvme_limit, add a drive to the nvme list, or give more "
            "ram.",
            tier="nvme", needed_bytes=needed_bytes, given_bytes=limit_bytes,
        )  # fmt: skip


def check_folders(folders: Sequence[str]) -> list[str]:
    """Absolute paths of `folders`, each an existing, writable directory, none twice. StoreError otherwise."""
    checked: list[str] = []
    for folder in folders:
        path = os.path.realpath(os.fspath(folder))
        if not os.path.isdir(path):
            raise StoreError(
                f"The nvme folder {folder} does not exist or is not a folder: make it first (mkdir -p {folder})."
            )
        if not os.access(path, os.W_OK | os.X_OK) or os.statvfs(path).f_flag & os.ST_RDONLY:
            raise StoreError(
                f"The nvme folder {folder} is not writable by this user: change its owner or mode, or give another."
            )
        if any(os.path.samefile(path, other) for other in checked):
            raise StoreError(f"The nvme folder {folder} is given twice: give each drive's folder once.")
        checked.append(path)
    return checked


@dataclass(frozen=True)
class Mount:
    """Where a folder lies. `kind`: ext4, xfs, tmpfs, …; `source`: a device, or what stands for one; `options`: as mounted."""

    kind: str
    source: str
    point: str
    options: str


def mount_of(folder: str, table: str = "/proc/self/mountinfo") -> Mount | None:
    """The mount that `folder`, which exists, lies on; None where the kernel does not say.

    By device number, which names it whatever links and bind mounts lie on the way; file systems whose folders have numbers
    of their own (btrfs, overlay of some kernels) by the longest path.
    """
    path = os.path.realpath(folder)
    number = os.stat(path).st_dev
    same_device: list[Mount] = []
    around: list[Mount] = []
    with contextlib.suppress(OSError), open(table, encoding="utf-8") as mounts:
        for line in mounts:
            left, _, right = line.partition(" - ")
            fields, kind = left.split(), right.split()
            point = fields[4].encode("latin-1", "replace").decode("unicode_escape")  # \040 is a space
            found = Mount(kind[0], kind[1], point, fields[5])
            if fields[2] == f"{os.major(number)}:{os.minor(number)}":
                same_device.append(found)
            if path == point or path.startswith(point.rstrip("/") + "/"):
                around.append(found)
    above = [each for each in same_device if each in around] or same_device or around
    return max(above, key=lambda each: len(each.point), default=None)


def memory_folders(folders: Sequence[str]) -> dict[str, str]:
    """Those of `folders` whose file system keeps its bytes in RAM, with its name: tmpfs or ramfs."""
    found = {folder: mount_of(folder) for folder in folders}
    return {folder: mount.kind for folder, mount in found.items() if mount and mount.kind in ("tmpfs", "ramfs")}
