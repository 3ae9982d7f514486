"""A step that a run goes on from, and bringing its bytes to their homes: checked, and through a few chunks of host memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fuyou.core.errors import StoreError
from fuyou.core.ticket import Ticket
from fuyou.runtime.manifest import Manifest, SavedTensors, decode_manifest
from fuyou.swap.ranges import Range, Staging, WriteBehind
from fuyou.swap.unit import Chunk, Unit, text_of
from fuyou.tiers.checksum import best_checksum
from fuyou.tiers.host import Lease
from fuyou.tiers.saved import Saved, open_saved
from fuyou.tiers.store import Store

VERIFIED_AT_ONCE = 2  # chunks whose bytes are read while one is looked at


@dataclass
class Source:
    """The step that a run goes on from. `adopted`: the numbers of the store's extents by (unit, chunk, kind), where it goes
    on as it lies, else None. `leftovers`: what is removed when the step is committed elsewhere."""

    saved: Saved
    manifest: Manifest
    adopted: dict[tuple[int, int, str], int] | None = None
    leftovers: list[str] = field(default_factory=list)
    first_folder: str = ""  # of the store that it was moved from

    @property
    def tensors(self) -> SavedTensors:
        return SavedTensors(self.saved, self.manifest)

    @property
    def told(self) -> str:
        """What is to be said of copies of its record that are damaged."""
        problems = self.saved.record.problems
        return f"went on from step {self.saved.step}, beside damaged copies: {'; '.join(problems)}" if problems else ""

    def close(self) -> None:
        self.saved.close()


def read_source(folders: Sequence[str]) -> Source | None:
    """The newest step in `folders`, with what it says of its tensors; None where no commit was ever begun."""
    saved = open_saved(folders)
    if saved is None:
        return None
    try:
        return Source(saved, decode_manifest(saved.blob("manifest")))
    except BaseException:
        saved.close()
        raise


def fill_from(source: Source, units: Sequence[Unit], writes: WriteBehind, store: Store | None) -> None:
    """Weights and optimizer state to their homes: by adoption, or chunk by chunk from wherever they are. Host memory is that
    of a few chunks. StoreError for bytes that are not what was committed."""
    if source.adopted is not None and store is not None:
        _verify(source, units, writes, store)
        return
    check_all(source)
    tensors = source.tensors
    for unit in units:
        for chunk in unit.chunks:
            ranges = [chunk.weights] if chunk.state is None else [chunk.weights, chunk.state]
            staging = writes.stage(ranges, f"the weights of {unit.name}")
            if staging is None:
                raise MemoryError("no staging")  # stage(wait=True) waits or raises
            try:
                stored = staging.store(*fill_chunk(tensors, chunk, staging))
            except BaseException:
                staging.release()
                raise
            writes.put(stored, staging)
    writes.drain()


def check_all(source: Source) -> None:
    """Every byte of the step has its checksum, or StoreError names the tensors and the file."""
    manifest = source.manifest
    for unit in manifest.units:
        for kind, extents in unit.extents.items():
            for number, extent in extents.items():
                source.saved.check(extent, text_of(manifest.names_in(unit, number), kind))


def fill_chunk(tensors: SavedTensors, chunk: Chunk, staging: Staging) -> tuple[int, ...]:
    """A chunk's weights, and where the step has some its state, into `staging` of both; which of the two."""
    views, unit = staging.views, chunk.unit
    for view in views:
        view.zero_()
    fields = {"weights": views[0].view(unit.dtype)}
    has_state = chunk.state is not None and any(tensors.has_state(member.name) for member, _, _ in chunk.parts)
    if has_state:
        low, fields["exp_avg"], fields["exp_avg_sq"] = unit.state_views(views[1], chunk.count)
        if low is not None:
            fields["low"] = low
    for member, first, last in chunk.parts:
        for name, whole in fields.items():
            target = whole[first - chunk.start : last - chunk.start].view(torch.uint8).numpy().data
            tensors.read(member.name, name, first - member.entry.start, last - member.entry.start, target)
    return (0, 1) if has_state else (0,)


def _verify(source: Source, units: Sequence[Unit], writes: WriteBehind, store: Store) -> None:
    """Read all that the store goes on with, to where it stays or to look at it: it is what was committed."""
    reading: deque[tuple[Chunk, Range, Ticket, Staging]] = deque()

    def finish() -> None:
        chunk, each, read, staging = reading.popleft()
        extent = each.extent
        try:
            read.wait()
            if extent is not None:
                checksum = best_checksum().of(staging.views[0].data_ptr(), extent.nbytes)
                if checksum != store.checksum(extent):
                    names = [member.name for member, _, _ in chunk.parts]
                    kind = "weights" if each is chunk.weights else "optimizer"
                    raise StoreError(source.saved.damaged(extent.index, text_of(names, kind)))
                extent.trust(checksum)
            each.written = True
        finally:
            staging.release()

    try:
        for unit in units:
            for chunk in unit.chunks:
                for each in (chunk.weights, chunk.state):
                    if each is not None and each.extent is not None and each.extent.written:
                        while len(reading) >= VERIFIED_AT_ONCE:
                            finish()
                        staging = writes.stage([each], f"the weights of {unit.name}")
                        if staging is None:
                            raise MemoryError("no staging")  # stage(wait=True) waits or raises
                        reading.append((chunk, each, _read(each, staging), staging))
        while reading:
            finish()
    finally:
        while reading:  # after an error; memory that is still read into goes back when that has ended
            reading.popleft()[3].release()


def _read(each: Range, staging: Staging) -> Ticket:
    """To where it is at home, in host memory, or to staging."""
    if isinstance(each.home, Lease) and each.extent is not None:
        return each.extent.read(each.home.address, each.home)
    return staging.load(0)
