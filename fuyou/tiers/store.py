"""The NVMe tier: fixed extents over one preallocated file per drive."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import threading
from collections.abc import Sequence

from fuyou.core.errors import BudgetError, FuyouError, StateError, StoreError
from fuyou.core.ledger import Ledger
from fuyou.core.sizes import align_up, format_bytes
from fuyou.core.ticket import DONE, Ticket, wait_for
from fuyou.tiers.io import Engine, File
from fuyou.tiers.lock import FolderLock

EXTENT_ALIGN_BYTES = 4096
FOLDER = "fuyou-store"  # made inside the user's folder, 0700
FREE_SHARE = 0.95  # nvme_limit=None: what is free, less 5 %


class Transfer:
    """A read or write of an extent: an engine ticket behind the ticket of the extent's last writer.

    The engine orders overlapping ranges of a file itself; this carries the writer's error to whoever reads after it.
    """

    __slots__ = ("_after", "_own")

    def __init__(self, own: Ticket, after: Ticket) -> None:
        self._own = own
        self._after = after

    def done(self) -> bool:
        return self._own.done() and self._after.done()

    def wait(self, timeout_s: float | None = None) -> None:
        wait_for((self._after, self._own), timeout_s)


class Extent:
    """`nbytes` at a fixed place on one drive, in one or two slots.

    `read` takes the current slot. `write` goes to the other one, which is current from then on: an update never
    overwrites the bytes that it was made from, and a read that is under way keeps its slot. An extent that was never
    written has no bytes (`written` is False) and must not be read.
    """

    __slots__ = ("_current", "_drive", "_offsets", "_store", "_writer", "category", "nbytes", "written")

    def __init__(self, store: Store, drive: Drive, offsets: tuple[int, ...], nbytes: int, category: str) -> None:
        self._store = store
        self._drive = drive
        self._offsets = offsets
        self._current = 0
        self._writer: Ticket = DONE
        self.nbytes = nbytes
        self.category = category
        self.written = False

    @property
    def drive(self) -> Drive:
        return self._drive

    @property
    def slot_count(self) -> int:
        return len(self._offsets)

    def take_slot(self, offset: int) -> None:
        """Called by Store.add_slot only."""
        self._offsets += (offset,)

    def read(self, address: int, keep: object) -> Ticket:
        """Start reading the extent to `address`; `keep` lives until that has ended."""
        if not self.written:
            raise StateError(f"An extent of {self.category} ({self.nbytes} bytes) was read before it was written.")
        return Transfer(
            self._store.transfer("read", self._drive, self._offsets[self._current], address, self.nbytes, keep),
            self._writer,
        )

    def write(self, address: int, keep: object) -> Ticket:
        """Start writing the extent from `address`; reads from now on see these bytes."""
        slot = (self._current + 1) % len(self._offsets) if self.written else self._current
        ticket = self._store.transfer("write", self._drive, self._offsets[slot], address, self.nbytes, keep)
        self._current, self._writer, self.written = slot, ticket, True
        return ticket


class Drive:
    """One folder: its lock, its file, and the bytes placed on it so far."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.path = os.path.join(folder, FOLDER, "data")
        self.nbytes = 0
        self.file: File | None = None
        self.lock: FolderLock | None = None

    def open(self, engine: Engine) -> None:
        """Lock, make and preallocate the file: a full disk is told here, before training."""
        store = os.path.dirname(self.path)
        os.makedirs(store, mode=0o700, exist_ok=True)
        if not stat.S_ISDIR(os.lstat(store).st_mode):
            raise StoreError(
                f"{store} is not a folder (a symbolic link is not followed): remove it or give another nvme folder."
            )
        os.chmod(store, 0o700)
        self.lock = FolderLock(store)
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        self.preallocate(0, self.nbytes)
        self.file = engine.open(self.path)

    def preallocate(self, offset: int, nbytes: int) -> None:
        """Make the file reach over `nbytes` from `offset`. StoreError where the drive is full; its size is then as before."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if nbytes:
                os.posix_fallocate(descriptor, offset, nbytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise
            os.ftruncate(descriptor, offset)  # what a file system gave before it had no more
            free = shutil.disk_usage(self.folder).free
            raise StoreError(
                f"The nvme folder {self.folder} has no room: {format_bytes(nbytes)} are needed and "
                f"{format_bytes(free)} are free ({error.strerror}). Free some, or give nvme a list of folders on several drives."
            ) from error
        finally:
            os.close(descriptor)

    def close(self, engine: Engine) -> None:
        """Nothing of an uncommitted store is of use after its run: the file goes, and with it the folder."""
        if self.file is not None:
            engine.close_file(self.file)
            self.file = None
        if self.lock is not None:
            if os.path.exists(self.path):
                os.unlink(self.path)
            self.lock.release()
            self.lock = None
            if not os.listdir(os.path.dirname(self.path)):
                os.rmdir(os.path.dirname(self.path))


class Store:
    """Places extents (`place`), then makes the files (`open`), then moves bytes. Extents go round the drives in turn."""

    def __init__(self, folders: Sequence[str], engine: Engine, ledger: Ledger) -> None:
        self.engine = engine
        self.read_bytes = 0
        self.write_bytes = 0
        self._ledger = ledger
        self._counting = threading.Lock()
        self._drives = [Drive(folder) for folder in folders]
        self._placed: list[tuple[str, int]] = []

    def place(self, nbytes: int, category: str, slots: int) -> Extent:
        """An extent of `nbytes` (rounded up to 4096) in `slots` slots, on the drive with the least so far."""
        drive = min(self._drives, key=lambda each: each.nbytes)
        size = align_up(nbytes, EXTENT_ALIGN_BYTES)
        offsets = tuple(drive.nbytes + slot * size for slot in range(slots))
        drive.nbytes += slots * size
        self._placed.append((category, slots * size))
        return Extent(self, drive, offsets, size, category)

    def open(self) -> None:
        """Charge the extents, lock the folders, preallocate. All or nothing."""
        try:
            for category, nbytes in self._placed:
                self._ledger.charge("nvme", category, nbytes, "its extents on the drives")
            for drive in self._drives:
                drive.open(self.engine)
        except BaseException:
            self.close()
            raise

    def add(self, nbytes: int, category: str, slots: int) -> Extent:
        """An extent placed after `open`, at the end of a file that grows by it. BudgetError or StoreError where there is
        no room, and nothing has changed."""
        drive = min(self._drives, key=lambda each: each.nbytes)
        size = align_up(nbytes, EXTENT_ALIGN_BYTES)
        return Extent(self, drive, self._grow(drive, size, category, slots), size, category)

    def add_slot(self, extent: Extent) -> None:
        """A second slot for an extent that updates will rewrite from now on."""
        if extent.slot_count == 1:
            extent.take_slot(self._grow(extent.drive, extent.nbytes, extent.category, 1)[0])

    def _grow(self, drive: Drive, size: int, category: str, slots: int) -> tuple[int, ...]:
        """Offsets of `slots` new places of `size` bytes on an open drive."""
        self._ledger.charge("nvme", category, slots * size, "extents for what is trained from now on")
        start = drive.nbytes
        try:
            drive.preallocate(start, slots * size)
        except BaseException:
            self._ledger.discharge("nvme", category, slots * size)
            raise
        drive.nbytes += slots * size
        self._placed.append((category, slots * size))
        return tuple(start + slot * size for slot in range(slots))

    def transfer(self, kind: str, drive: Drive, offset: int, address: int, nbytes: int, keep: object) -> Ticket:
        """Called by Extent only."""
        if drive.file is None:
            raise StateError(f"The store in {drive.folder} is closed: nothing can be read or written.")
        with self._counting:
            if kind == "read":
                self.read_bytes += nbytes
            else:
                self.write_bytes += nbytes
        start = self.engine.read if kind == "read" else self.engine.write
        return start(drive.file, offset, address, nbytes, keep)

    def close(self) -> None:
        """Waits for what is under way, then removes the files. Every drive is closed even where one fails. Idempotent."""
        first: Exception | None = None
        for drive in self._drives:
            try:
                drive.close(self.engine)
            except (FuyouError, OSError) as error:
                first = first or error
        for category, nbytes in self._placed:
            if self._ledger.held("nvme", category) >= nbytes:
                self._ledger.discharge("nvme", category, nbytes)
        self._placed = []
        if first is not None:
            raise first


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
        if path in checked:
            raise StoreError(f"The nvme folder {folder} is given twice: give each drive's folder once.")
        checked.append(path)
    return checked


def memory_folders(folders: Sequence[str]) -> dict[str, str]:
    """Those of `folders` whose file system keeps its bytes in RAM, with its name: tmpfs or ramfs.

    Looked up by device number, which names the mount whatever links and bind mounts lie on the way.
    """
    kinds: dict[str, str] = {}
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8") as mounts:
        for line in mounts:
            device, (kind, *_) = line.split()[2], line.partition(" - ")[2].split()
            kinds[device] = kind
    found = {}
    for folder in folders:
        number = os.stat(folder).st_dev
        kind = kinds.get(f"{os.major(number)}:{os.minor(number)}", "")
        if kind in ("tmpfs", "ramfs"):
            found[folder] = kind
    return found


def free_limit(folders: Sequence[str]) -> int:
    """nvme_limit=None: 95 % of what is free on the drives of `folders`, each file system counted once."""
    free = {os.stat(folder).st_dev: shutil.disk_usage(folder).free for folder in folders}
    return int(sum(free.values()) * FREE_SHARE)


def refuse_without_room(needed_bytes: int, limit_bytes: int, folders: Sequence[str]) -> None:
    """BudgetError before anything is preallocated, when the extents cannot fit the limit."""
    if needed_bytes > limit_bytes:
        raise BudgetError(
            f"The nvme folders {', '.join(folders)} have no room: the extents need {format_bytes(needed_bytes)} "
            f"({needed_bytes} bytes) and the limit is {format_bytes(limit_bytes)}, {format_bytes(needed_bytes - limit_bytes)} "
            "short. Free some, raise nvme_limit, add a drive to the nvme list, or give more ram.",
            tier="nvme", needed_bytes=needed_bytes, given_bytes=limit_bytes,
        )  # fmt: skip
