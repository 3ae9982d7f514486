"""Checkpoints: a run's state in a folder, written and read through a few chunks of host memory.

[Note: checkpoints] A checkpoint is a store: the files of fuyou/tiers/records.py in `fuyou-store`, of one drive, with one slot
an extent and one commit. So whatever goes on from a store goes on from a checkpoint, and whoever has a store's slots (a copy,
a reflink of the file system, pinned slots) has a checkpoint's bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from torch import nn

from fuyou.core.errors import StateError, StoreError
from fuyou.runtime.committing import Committing
from fuyou.runtime.manifest import refuse_other_model, refuse_without_homes, tied_names
from fuyou.runtime.source import Source, check_all, fill_chunk, read_source
from fuyou.swap.ranges import Range, Staging, WriteBehind
from fuyou.swap.unit import Chunk, Unit
from fuyou.swap.updates import Updates
from fuyou.swap.weights import Swapper
from fuyou.tiers.folders import check_folders
from fuyou.tiers.records import PAGE_BYTES
from fuyou.tiers.saving import SavedWriter


class Draft:
    """A checkpoint that is being written, with what the run is now beside weights and optimizer state: the payload, and
    byte strings as its first extents. The others, a range each, come as their bytes can be had; `ranges` are all there are.

    Whoever has it finishes it or discards it.
    """

    def __init__(self, folder: str, step: int, units: Sequence[Unit], committing: Committing) -> None:
        """ConfigError for a folder that exists, StoreError without room, StorageIOError."""
        self.step = step
        self._units = units
        self._manifest = committing.manifest()
        self._payload, blobs = committing.whole()
        self.ranges = {
            (chunk, kind): each
            for unit in units
            for chunk in unit.chunks
            for kind, each in (("weights", chunk.weights), ("optimizer", chunk.state))
            if each is not None
        }
        self._first = len(blobs) + 1
        nbytes = sum(nbytes for nbytes, _ in blobs.values()) + len(self._manifest.encode())
        nbytes += sum(each.nbytes + PAGE_BYTES for each in self.ranges.values())
        self.writer = SavedWriter(folder, nbytes)
        with contextlib.ExitStack() as undo:
            undo.callback(self.discard)
            self._payload["blobs"] = {}
            for name, (nbytes, parts) in blobs.items():
                whole = bytearray(max(nbytes, 1))
                for offset, data in parts:
                    whole[offset : offset + data.numel()] = data.numpy().data
                self._put(name, nbytes, whole)
            undo.pop_all()

    def number(self, has: Callable[[Range], bool]) -> dict[tuple[Chunk, str], int]:
        """The extents of those ranges that have bytes, which the caller writes now; called once."""
        numbers = {
            key: number for number, (key, each) in enumerate(self.ranges.items(), start=self._first) if has(each)
        }
        manifest = self._manifest.numbered(self._units, lambda chunk, kind: numbers.get((chunk, kind), -1)).encode()
        self._put("manifest", len(manifest), manifest)
        return numbers

    def finish(self) -> None:
        """All extents are written: it is a checkpoint, under its name, when this returns."""
        self.writer.finish(self.step, self._payload)

    def discard(self) -> None:
        """Remove what was not finished; after `finish` there is nothing to remove."""
        self.writer.discard()

    def _put(self, name: str, nbytes: int, whole: bytes | bytearray) -> None:
        number = len(self._payload["blobs"])
        self.writer.put(number, memoryview(whole))
        self._payload["blobs"][name] = [nbytes, [number]]


def save(draft: Draft, writes: WriteBehind) -> None:
    """Write and finish it, from wherever the bytes are now. All updates are made."""
    for (chunk, kind), number in draft.number(lambda each: each.written).items():
        staging = _staged(chunk, [draft.ranges[chunk, kind]], writes)
        try:
            staging.load(check=True).wait()
            draft.writer.put(number, staging.views[0].numpy().data)
        finally:
            staging.release()
    draft.finish()


def open_for(folder: str, units: Sequence[Unit], model: nn.Module) -> Source:
    """The step in `folder`, checked: it is of this model, and no byte is damaged. ConfigError, StoreError."""
    source = read_source(check_folders([folder]))
    if source is None:
        raise StoreError(f"There is no checkpoint in {folder}: name a folder that run.save wrote.")
    try:
        members = [member for unit in units for member in unit.members]
        shapes = {each.name: (tuple(each.entry.shape), each.unit.dtype) for each in members}
        tied = tied_names(model, {id(each.parameter): each.name for each in members})
        refuse_other_model(source.manifest, shapes, tied, source.saved.step)
        refuse_without_homes(source.tensors, [each.name for each in members if not each.optimized], source.saved.step)
        check_all(source)
    except BaseException:
        source.close()
        raise
    return source


def load(source: Source, units: Sequence[Unit], swapper: Swapper, updates: Updates, writes: WriteBehind) -> None:
    """The step's weights and optimizer state to their homes, in the place of those that are there."""
    tensors = source.tensors
    for unit in units:
        swapper.invalidate(unit)
        unit.writes += 1
        for chunk in unit.chunks:
            updates.claim(chunk)
            ranges = [chunk.weights] if chunk.state is None else [chunk.weights, chunk.state]
            staging = _staged(chunk, ranges, writes)
            try:
                fill_chunk(tensors, chunk, staging)
                stored = staging.store()
            except BaseException:
                staging.release()
                raise
            writes.put(stored, staging)
    writes.drain()


def _staged(chunk: Chunk, ranges: Sequence[Range], writes: WriteBehind) -> Staging:
    staging = writes.stage(ranges, f"a checkpoint of {chunk.unit.name}")
    if staging is None:
        raise StateError(f"No host memory came free for a checkpoint of {chunk.unit.name}.")
    return staging
