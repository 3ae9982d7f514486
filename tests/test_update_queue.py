"""The queue of updates, fed by hand: what its threads find there when somebody has been faster."""

from __future__ import annotations

import heapq
from types import SimpleNamespace

import torch

from fuyou.core.ledger import Ledger
from fuyou.core.ticket import DONE
from fuyou.swap.buffers import Buffers
from fuyou.swap.update import StepUpdates, Update
from fuyou.swap.update_queue import Kind
from fuyou.swap.updates import Updates
from fuyou.tiers.host import Arena

MIB = 1 << 20


class Extent:
    def __init__(self) -> None:
        self.written: list[int] = []

    def write(self, address: int, keep: object) -> object:
        self.written.append(address)
        return DONE


class AChunk:
    place, rewritten = (3, 0), ()


def make() -> Updates:
    arena = Arena(MIB, Ledger({"host": MIB, "device": 0, "nvme": 0}))
    return Updates(
        None, Buffers(arena, 4096, 1, deadline_s=1), handover=lambda chunk: (None, DONE), commit=lambda step: DONE,
        at_step=False, deadline_s=1, in_flight=list,
    )  # fmt: skip


def test_an_update_that_came_to_the_head_is_not_taken_for_a_chunk_to_be_written_through():
    updates, extent = make(), Extent()
    home = SimpleNamespace(address=4096, data=torch.zeros(1))
    through = SimpleNamespace(through=extent, home=home, pinned=lambda: DONE)
    updates._steps[1] = StepUpdates({}, unpublished=1, unwritten=1)
    heapq.heappush(updates._queue, (1, True, Kind.THROUGH, (0, 0), next(updates._numbers), through))
    # The reading thread has seen the THROUGH; before it takes it, a step puts an update of the same step there.
    update = Update(AChunk(), 1, {}, True, None, DONE)
    updates._put(update)
    updates._write_through()
    assert extent.written == [] and updates._queue[0][5] is update and len(updates._queue) == 2
    assert updates._steps[1].unwritten == 1
    heapq.heappop(updates._queue)
    updates._write_through()
    assert extent.written == [4096] and updates._queue == [] and updates._steps[1].unwritten == 0


def test_an_empty_queue_is_left_as_it_is():
    updates = make()
    updates._write_through()
    assert updates._queue == []
