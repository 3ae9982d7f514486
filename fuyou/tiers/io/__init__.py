"""Asynchronous file I/O: one contract (`Engine`), three backends, chosen by `open_engine`."""

from fuyou.tiers.io.choose import open_engine, open_for_drive
from fuyou.tiers.io.engine import Engine
from fuyou.tiers.io.files import File

__all__ = ["Engine", "File", "open_engine", "open_for_drive"]
