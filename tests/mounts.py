"""Small file systems of their own on loop devices: real drives that are full, slow, stuck or taken away, as root.

Where mounting is not allowed, the tests that need it are skipped with the reason.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

_FIFREEZE, _FITHAW = 0xC0045877, 0xC0045878  # linux/fs.h
_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN


def _run(*command: str) -> None:
    """Skips the test where the command is not there or is not allowed."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]}")
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        pytest.skip(f"{' '.join(command)}: {result.stderr.strip()}")


@contextlib.contextmanager
def mounted(folder: Path, size_bytes: int, name: str) -> Iterator[Path]:
    """An empty ext4 of `size_bytes` in all, mounted on `folder`/`name`; its image lies in `folder`, which is on a disk."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    image, place = folder / f"{name}.image", folder / name
    with image.open("wb") as file:
        file.truncate(size_bytes)
    # No blocks kept back for root, and no journal: then what is free is what can be had.
    _run("mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", str(image))
    place.mkdir()
    _run("mount", "-o", "loop", str(image), str(place))
    try:
        (place / "lost+found").rmdir()
        yield place
    finally:
        # Lazily: what a failed test still has open must not leave the mount behind. The loop device goes with the mount.
        subprocess.run(["umount", "-l", str(place)], check=True)
        place.rmdir()
        image.unlink()


@contextlib.contextmanager
def drives(folder: Path, **sizes: int) -> Iterator[list[Path]]:
    """One mounted file system for each name and size."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(mounted(folder, size, name)) for name, size in sizes.items()]


@contextlib.contextmanager
def frozen(place: Path) -> Iterator[None]:
    """Every write to the file system waits until the block is left (ioctl FIFREEZE): a drive that does not answer."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, _FIFREEZE, 0)
        try:
            yield
        finally:
            fcntl.ioctl(descriptor, _FITHAW, 0)
    finally:
        os.close(descriptor)


def shut_down(place: Path) -> None:
    """From here on the file system answers EIO to every read and every change, as when its drive is pulled out."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, _SHUTDOWN, struct.pack("=I", 2))  # 2: without writing back
    finally:
        os.close(descriptor)


def fill(place: Path, leave_bytes: int) -> Path:
    """A file that leaves about `leave_bytes` of the file system free."""
    blocker = place / "blocker"
    with blocker.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(shutil.disk_usage(place).free - leave_bytes, 1))
    return blocker
