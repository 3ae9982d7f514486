"""A step on its way from one layout to another: a checkpoint in an nvme folder, there whole or not at all.

While there is one, no store holds a later step: it is removed, for good, before the next one is committed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence

from fuyou.tiers.drives import sync_folder

MOVED = "fuyou-moved-step"
_UNDER_WAY = f".{MOVED}."  # begins the names of what is being written (fuyou/tiers/saving.py) or removed


def moved_in(folders: Sequence[str]) -> list[str]:
    return [path for folder in folders if os.path.isdir(path := os.path.join(folder, MOVED))]


def remove_moved(path: str) -> None:
    """In one moment, which a loss of power does not take back. StorageIOError."""
    folder = os.path.dirname(path)
    gone = os.path.join(folder, f"{_UNDER_WAY}gone")
    shutil.rmtree(gone, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, gone)
        sync_folder(folder)
        shutil.rmtree(gone, ignore_errors=True)


def clear_moved(folders: Sequence[str]) -> None:
    """A run starts anew: a step that was on its way is not wanted."""
    for path in moved_in(folders):
        remove_moved(path)


def sweep(folders: Sequence[str]) -> None:
    """Away with what a killed run was writing or removing; nobody has the folders' stores."""
    for folder in folders:
        for name in os.listdir(folder):
            if name.startswith(_UNDER_WAY):
                shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
