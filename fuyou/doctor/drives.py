"""Facts of the folders: where each lies, what its file system takes, and how fast the drive is. Nothing is left in them."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace

from fuyou.core.errors import ConfigError, FuyouError
from fuyou.core.sizes import format_bytes
from fuyou.doctor.facts import Folder
from fuyou.tiers.folders import check_folders, mount_of
from fuyou.tiers.io import open_engine
from fuyou.tiers.io.files import direct_alignment_bytes
from fuyou.tiers.io.measure import LEAST_MEMORY_BYTES, MEMORY_BYTES, measure_briefly
from fuyou.tiers.io.tuning import remembered
from fuyou.tiers.pages import Pages

MOST_OF_FREE = 0.5  # that a measurement may fill for its seconds
DEADLINE_S = 15.0  # of a drive that does not answer


def folders(paths: Sequence[str]) -> tuple[Folder, ...]:
    """Each as given, in order; each file system is measured once, one after another. ConfigError for one given twice."""
    found: list[Folder] = []
    seen: dict[int, str] = {}
    real = [os.path.realpath(path) for path in paths]
    for index, path in enumerate(real):
        if path in real[:index]:
            raise ConfigError(f"--nvme {paths[index]} is given twice: give each folder once.")
    for path in real:
        folder = look_at(path)
        if not folder.problem:
            device = os.stat(path).st_dev
            folder = replace(folder, shares_with=seen[device]) if device in seen else measured(folder)
            seen.setdefault(device, path)
        found.append(folder)
    return tuple(found)


def look_at(path: str) -> Folder:
    """All but the speed."""
    try:
        check_folders([path])
        mount = mount_of(path)
        room = os.statvfs(path)
        direct, direct_problem, alignment = _direct(path)
    except FuyouError as error:
        return Folder(path, str(error))
    except OSError as error:
        return Folder(path, f"{path} cannot be looked at: {error.strerror}")
    return Folder(
        path=path,
        problem="",
        mount_kind=mount.kind if mount else None,
        mount_source=mount.source if mount else None,
        mount_point=mount.point if mount else None,
        in_memory=mount is not None and mount.kind in ("tmpfs", "ramfs"),
        total_bytes=room.f_blocks * room.f_frsize,
        free_bytes=room.f_bavail * room.f_frsize,
        direct=direct,
        direct_problem=direct_problem,
        alignment_bytes=alignment,
    )


def _direct(path: str) -> tuple[bool, str, int | None]:
    """(whether O_DIRECT is taken, why not, the alignment that it needs), tried on a file without a name."""
    with tempfile.TemporaryFile(dir=path, buffering=0) as file:
        try:
            descriptor = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            return False, error.strerror or str(error), None
        try:
            return True, "", direct_alignment_bytes(descriptor)
        finally:
            os.close(descriptor)


def measured(folder: Folder) -> Folder:
    """With its speeds, or why there are none."""
    if folder.in_memory:
        return replace(folder, not_measured=f"it is a {folder.mount_kind}")
    room = int((folder.free_bytes or 0) * MOST_OF_FREE)
    if room < LEAST_MEMORY_BYTES:
        return replace(
            folder,
            not_measured=f"that takes {format_bytes(LEAST_MEMORY_BYTES / MOST_OF_FREE)} of free space",
        )
    try:
        with contextlib.ExitStack() as stack:
            engine = stack.enter_context(open_engine())
            tuning = remembered(folder.path, engine.name)
            if tuning is not None:
                engine = stack.enter_context(open_engine(engine.name, tuning=tuning))
            engine.deadline_s = DEADLINE_S
            pages = Pages(MEMORY_BYTES)
            engine.register(pages.address, MEMORY_BYTES)
            speeds = measure_briefly(engine, folder.path, pages.address, MEMORY_BYTES, room)
    except (FuyouError, OSError) as error:
        return replace(folder, not_measured=str(error))
    return replace(
        folder,
        read_bytes_per_s=speeds.read_bytes_per_s,
        write_bytes_per_s=speeds.write_bytes_per_s,
        mixed_bytes_per_s=speeds.mixed_bytes_per_s,
        engine=engine.name,
        tuned=tuning is not None,
        written_bytes=speeds.written_bytes,
    )
