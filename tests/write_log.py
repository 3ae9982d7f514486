"""A loss of power at any moment: writes, sizes, names and flushes under a folder are logged as they happen, and every
beginning of the log can be put back as files, in which what no flush had covered by then is lost, reordered or torn.

What is logged is what fuyou asks of the system: of `os` the functions that change files and names, and the engines' writes
and flushes. A write counts from its submission; a flush from its end, and it covers what was logged before it began: so a
log never says that more is on the drive than is. Names (made, renamed, removed) wait for a flush of their folder.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fuyou.core.ticket import Ticket
from fuyou.tiers.io.engine import Engine
from fuyou.tiers.io.files import File

SECTOR = 512  # what a drive writes whole or not at all


@dataclass(eq=False)
class Node:
    """A file, whatever it is called by now; with `children` a folder. Both, and `nbytes`, are as the process sees them."""

    children: dict[str, Node] | None = None
    nbytes: int = 0


class Write(NamedTuple):
    node: Node
    offset: int
    data: bytes


class Size(NamedTuple):
    node: Node
    nbytes: int


class Names(NamedTuple):
    """Changed together or not at all: (folder, name, what has it now)."""

    changes: tuple[tuple[Node, str, Node | None], ...]


class Flush(NamedTuple):
    """What was logged of `node` before event number `before` is on the drive."""

    node: Node
    before: int


class Mark(NamedTuple):
    """What a test wants to know of a moment."""

    value: Any


class Log:
    """Of everything under `root`; what is there already is on the drive, and is what the first `begin` events say.

    `recording()` puts the methods that are named as functions of `os` in their place.
    """

    def __init__(self, root: Path) -> None:
        self.root = os.path.realpath(root)
        self.top = Node({})
        self.events: list[Any] = []
        self._lock = threading.RLock()
        self._nodes: dict[int, Node] = {}  # by descriptor
        self._plain = {name: getattr(os, name) for name in _REPLACED}
        self._take_in(self.top, self.root)
        self.begin = len(self.events)

    def mark(self, value: Any) -> None:
        self._append(Mark(value))

    @contextmanager
    def recording(self) -> Iterator[None]:
        write, flush = Engine.write, Engine.flush

        def logged_write(
            engine: Engine, file: File, offset: int, address: int, nbytes: int, keep: Any = None
        ) -> Ticket:
            self._append(*self._writes(file.fd, offset, lambda: ctypes.string_at(address, nbytes)))
            return write(engine, file, offset, address, nbytes, keep)

        def logged_flush(engine: Engine, file: File) -> Ticket:
            return _Flushing(self, self._nodes.get(file.fd), len(self.events), flush(engine, file))

        with pytest.MonkeyPatch.context() as patch:
            for name in _REPLACED:
                patch.setattr(os, name, getattr(self, name))
            patch.setattr(Engine, "write", logged_write)
            patch.setattr(Engine, "flush", logged_flush)
            yield

    # --- files --------------------------------------------------------------------------------------------------------

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        with self._lock:
            place = self._place(path, dir_fd)
            descriptor = self._plain["open"](path, flags, mode, dir_fd=dir_fd)
            self._nodes.pop(descriptor, None)
            if place is not None:
                self._nodes[descriptor] = self._opened(*place, flags)
            return descriptor

    def _opened(self, folder: Node, name: str, flags: int) -> Node:
        node = folder if name == "" else _children(folder).get(name)
        if node is None:
            node = Node()
            self._append(Names(((folder, name, node),)))
        elif flags & os.O_TRUNC and node.nbytes:
            self._append(Size(node, 0))
        return node

    def close(self, descriptor: int) -> None:
        self._nodes.pop(descriptor, None)
        self._plain["close"](descriptor)

    def pwrite(self, descriptor: int, data: Any, offset: int) -> int:
        self._append(*self._writes(descriptor, offset, lambda: bytes(data)))
        return self._plain["pwrite"](descriptor, data, offset)

    def write(self, descriptor: int, data: Any) -> int:
        if descriptor in self._nodes:
            offset = os.lseek(descriptor, 0, os.SEEK_CUR)
            self._append(*self._writes(descriptor, offset, lambda: bytes(data)))
        return self._plain["write"](descriptor, data)

    def ftruncate(self, descriptor: int, nbytes: int) -> None:
        self._sized(self._nodes.get(descriptor), nbytes)
        self._plain["ftruncate"](descriptor, nbytes)

    def truncate(self, path: Any, nbytes: int) -> None:
        place = self._place(path, None)
        self._sized(None if place is None else _children(place[0]).get(place[1]), nbytes)
        self._plain["truncate"](path, nbytes)

    def posix_fallocate(self, descriptor: int, offset: int, nbytes: int) -> None:
        node = self._nodes.get(descriptor)
        self._sized(node, max(offset + nbytes, 0 if node is None else node.nbytes))
        self._plain["posix_fallocate"](descriptor, offset, nbytes)

    def fsync(self, descriptor: int) -> None:
        self._flush("fsync", descriptor)

    def fdatasync(self, descriptor: int) -> None:
        self._flush("fdatasync", descriptor)

    def _flush(self, how: str, descriptor: int) -> None:
        node, before = self._nodes.get(descriptor), len(self.events)
        self._plain[how](descriptor)
        self.flushed(node, before)

    def flushed(self, node: Node | None, before: int) -> None:
        if node is not None:
            self._append(Flush(node, before))

    def _writes(self, descriptor: int, offset: int, data: Callable[[], bytes]) -> list[Write]:
        node = self._nodes.get(descriptor)
        return [] if node is None else [Write(node, offset, data())]

    def _sized(self, node: Node | None, nbytes: int) -> None:
        if node is not None and node.nbytes != nbytes:
            self._append(Size(node, nbytes))

    # --- names --------------------------------------------------------------------------------------------------------

    def unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._named("unlink", path, dir_fd)

    def remove(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._named("remove", path, dir_fd)

    def rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._named("rmdir", path, dir_fd)

    def mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        self._named("mkdir", path, dir_fd, mode, made=True)

    def rename(self, source: Any, target: Any) -> None:
        self._renamed("rename", source, target)

    def replace(self, source: Any, target: Any) -> None:
        self._renamed("replace", source, target)

    def _named(self, how: str, path: Any, dir_fd: int | None, *more: Any, made: bool = False) -> None:
        with self._lock:
            place = self._place(path, dir_fd)
            self._plain[how](path, *more, dir_fd=dir_fd)
            if place is not None:
                self._append(Names(((*place, Node({}) if made else None),)))

    def _renamed(self, how: str, source: Any, target: Any) -> None:
        with self._lock:
            places = [self._place(source, None), self._place(target, None)]
            self._plain[how](source, target)
            (one, name), (other, new) = [each for each in places if each is not None] or [(None, "")] * 2
            if one is not None and other is not None:
                self._append(Names(((one, name, None), (other, new, _children(one)[name]))))

    def _place(self, path: Any, dir_fd: int | None) -> tuple[Node, str] | None:
        """The folder and the name in it, "" of the root itself; None for what is not under the root."""
        if isinstance(path, int):
            return None
        text = os.fsdecode(path)
        if dir_fd is not None and not os.path.isabs(text):
            node = self._nodes.get(dir_fd)
            return None if node is None else (node, text)
        text = os.path.join(os.path.realpath(os.path.dirname(os.path.abspath(text))), os.path.basename(text))
        if text == self.root:
            return self.top, ""
        if not text.startswith(self.root + os.sep):
            return None
        folder, names = self.top, text[len(self.root) + 1 :].split(os.sep)
        for name in names[:-1]:
            if name not in _children(folder):
                return None
            folder = _children(folder)[name]
        return folder, names[-1]

    def _append(self, *events: Any) -> None:
        with self._lock:
            for event in events:
                if isinstance(event, Write):
                    event.node.nbytes = max(event.node.nbytes, event.offset + len(event.data))
                elif isinstance(event, Size):
                    event.node.nbytes = event.nbytes
                elif isinstance(event, Names):
                    _apply(event, _children)
                self.events.append(event)

    def _take_in(self, folder: Node, path: str) -> None:
        for entry in sorted(os.scandir(path), key=lambda each: each.name):
            node = Node({} if entry.is_dir(follow_symlinks=False) else None)
            self._append(Names(((folder, entry.name, node),)))
            if node.children is not None:
                self._take_in(node, entry.path)
            else:
                self._append(Write(node, 0, Path(entry.path).read_bytes()))
                self.flushed(node, len(self.events))
        self.flushed(folder, len(self.events))


class _Flushing:
    """The ticket of a flush, which is logged when somebody has learnt that it succeeded."""

    def __init__(self, log: Log, node: Node | None, before: int, ticket: Ticket) -> None:
        self._log, self._node, self._before, self._ticket = log, node, before, ticket

    def done(self) -> bool:
        return self._ticket.done()

    def wait(self, timeout_s: float | None = None) -> None:
        self._ticket.wait(timeout_s)
        self._log.flushed(self._node, self._before)


_REPLACED = (
    "open close pwrite write ftruncate truncate posix_fallocate fsync fdatasync unlink remove rmdir mkdir rename replace"
).split()


def _children(folder: Node) -> dict[str, Node]:
    if folder.children is None:
        raise NotADirectoryError
    return folder.children


def _apply(names: Names, entries: Callable[[Node], dict[str, Node]]) -> None:
    for folder, name, node in names.changes:
        if node is None:
            entries(folder).pop(name, None)
        else:
            entries(folder)[name] = node


# --- the drive after it -----------------------------------------------------------------------------------------------


class Platter:
    """What a log leaves on the drive: `go_to` later and later moments, and `put` each back as files."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._at = 0
        self._bytes: dict[Node, bytearray] = {}  # what flushes have covered
        self._entries: dict[Node, dict[str, Node]] = {}
        self._written: dict[Node, list[tuple[int, Write | Size]]] = {}  # since: (number of the event, event)
        self._renamed: list[tuple[int, Names]] = []
        self._killed = False
        self.marks: list[Any] = []

    def go_to(self, end: int) -> None:
        """The power is lost before event `end`."""
        for number in range(self._at, end):
            event = self._log.events[number]
            match event:
                case Mark(value):
                    self.marks.append(value)
                case Names():
                    self._renamed.append((number, event))
                case Flush(node, before) if node.children is not None:
                    for each in [each for each in self._renamed if each[0] < before and _touches(each[1], node)]:
                        self._renamed.remove(each)
                        _apply(each[1], self._its)
                case Flush(node, before):
                    written = self._written.get(node, [])
                    for _, each in [each for each in written if each[0] < before]:
                        _write(self._bytes.setdefault(node, bytearray()), each)
                    self._written[node] = [each for each in written if each[0] >= before]
                case Write(node) | Size(node):
                    self._written.setdefault(node, []).append((number, event))
        self._at = max(self._at, end)

    def put(self, draw: random.Random) -> None:
        """One of the trees that may be there, in the place of what is under the root now."""
        entries = {node: dict(its) for node, its in self._entries.items()}
        self._killed = draw.random() < 0.2  # the process and not the power: what was asked for is there
        kept = 1.0 if self._killed else draw.choice((0.0, 0.5, 0.9, 1.0))
        for _, names in self._renamed:
            if draw.random() < kept:
                _apply(names, lambda folder: entries.setdefault(folder, {}))
        for entry in os.scandir(self._log.root):
            shutil.rmtree(entry.path) if entry.is_dir() else os.unlink(entry.path)
        self._put(self._log.top, self._log.root, entries, draw)

    def _put(self, folder: Node, path: str, entries: dict[Node, dict[str, Node]], draw: random.Random) -> None:
        for name, node in entries.get(folder, {}).items():
            if node.children is None:
                Path(path, name).write_bytes(self._content(node, draw))
            else:
                os.mkdir(os.path.join(path, name))
                self._put(node, os.path.join(path, name), entries, draw)

    def _content(self, node: Node, draw: random.Random) -> bytes:
        """What flushes have covered, and of what came after it any part in any order."""
        content = bytearray(self._bytes.get(node, b""))
        events = [event for _, event in self._written.get(node, [])]
        sizes = [len(content)]
        for event in events:
            sizes.append(event.nbytes if isinstance(event, Size) else max(sizes[-1], event.offset + len(event.data)))
        how = "all" if self._killed else draw.choice(("none", "all", "whole", "torn", "torn", "torn"))
        if how in ("none", "all"):
            for event in events if how == "all" else []:
                _write(content, event)
            return bytes(content)
        if how == "torn":
            draw.shuffle(events)
        for event in events:
            if isinstance(event, Size):
                if draw.random() < 0.5:
                    _write(content, event)
            elif how == "torn":
                _tear(content, event, draw)
            elif draw.random() < 0.5:
                _write(content, event)
        _write(content, Size(node, draw.choice(sizes)))
        return bytes(content)

    def _its(self, folder: Node) -> dict[str, Node]:
        return self._entries.setdefault(folder, {})


def _touches(names: Names, folder: Node) -> bool:
    return any(each is folder for each, _, _ in names.changes)


def _write(content: bytearray, event: Write | Size) -> None:
    end = event.nbytes if isinstance(event, Size) else event.offset + len(event.data)
    if end > len(content):
        content.extend(bytes(end - len(content)))
    if isinstance(event, Write):
        content[event.offset : end] = event.data
    else:
        del content[end:]


def _tear(content: bytearray, write: Write, draw: random.Random) -> None:
    """Some of its sectors."""
    share = draw.choice((0.0, 0.1, 0.5, 0.9, 1.0))
    at = 0
    while at < len(write.data):
        end = min(len(write.data), at + SECTOR - (write.offset + at) % SECTOR)
        if draw.random() < share:
            _write(content, Write(write.node, write.offset + at, write.data[at:end]))
        at = end
