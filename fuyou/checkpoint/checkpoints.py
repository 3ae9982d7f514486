"""Checkpoints: a run's state in a folder, written and read through a few chunks of host memory.

[Note: checkpoints] A checkpoint is a store: the files of fuyou/tiers/records.py in `fuyou-store`, of one drive, with one slot
an extent and one commit. So whatever goes on from a store goes on from a checkpoint, and whoever has a store's slots (a copy,
a reflink of the file system, pinned slots) has a checkpoint's bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
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


def save(folder: str, step: int, units: Sequence[Unit], committing: Committing, writes: WriteBehind) -> None:
    """See Run.save. All updates are made."""
    payload, blobs = committing.whole()
    numbers: dict[tuple[Chunk, str], int] = {}
    for unit in units:
        for chunk in unit.chunks:
            for kind, each in (("weights", chunk.weights), ("optimizer", chunk.state)):
                if each is not None and each.written:
                    numbers[chunk, kind] = len(numbers)
    manifest = committing.manifest().numbered(units, lambda chunk, kind: numbers.get((chunk, kind), -1))
    text = manifest.encode()
    blobs["manifest"] = (len(text), [(0, torch.frombuffer(bytearray(text), dtype=torch.uint8))])
    payload["blobs"] = {name: [nbytes, [len(numbers) + at]] for at, (name, (nbytes, _)) in enumerate(blobs.items())}
    ranges = sum(each.nbytes for chunk, kind in numbers for each in [_range(chunk, kind)])
    with SavedWriter(
        folder, ranges + PAGE_BYTES * len(numbers) + sum(nbytes for nbytes, _ in blobs.values())
    ) as writer:
        for (chunk, kind), number in numbers.items():
            staging = _staged(chunk, [_range(chunk, kind)], writes)
            try:
                staging.load(check=True).wait()
                writer.put(number, staging.views[0].numpy().data)
            finally:
                staging.release()
        for at, (nbytes, parts) in enumerate(blobs.values()):
            whole = bytearray(max(nbytes, 1))
            for offset, data in parts:
                whole[offset : offset + data.numel()] = data.numpy().data
            writer.put(len(numbers) + at, memoryview(whole))
        writer.finish(step, payload)


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


def _range(chunk: Chunk, kind: str) -> Range:
    return chunk.weights if kind == "weights" else chunk.rewritten[1]


def _staged(chunk: Chunk, ranges: Sequence[Range], writes: WriteBehind) -> Staging:
    staging = writes.stage(ranges, f"a checkpoint of {chunk.unit.name}")
    if staging is None:
        raise StateError(f"No host memory came free for a checkpoint of {chunk.unit.name}.")
    return staging
