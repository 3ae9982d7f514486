"""Asynchronous file I/O: one contract (`Engine`), three backends, chosen by `open_engine`, and a late one around them."""

from fuyou.tiers.io.choose import open_engine, open_for_drive
from fuyou.tiers.io.engine import Engine
from fuyou.tiers.io.files import File
from fuyou.tiers.io.late import LateEngine

__all__ = ["Engine", "File", "LateEngine", "open_engine", "open_for_drive"]
