"""How fast a run's link and drives move activations, measured with the pieces and buffers that these go through."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from fuyou.core.ticket import Ticket, wait_for
from fuyou.swap.buffers import Buffers
from fuyou.tiers.device import Device
from fuyou.tiers.scratch import Place, Scratch

ROUNDS, COPIES, DRIVE_PIECES = 3, 8, 16


@dataclass(frozen=True)
class Rates:
    """Bytes a second off the device and back, and of the drives; 0.0 for what there is not."""

    out_bytes_per_s: float
    in_bytes_per_s: float
    nvme_write_bytes_per_s: float = 0.0
    nvme_read_bytes_per_s: float = 0.0


def copy_rates(device: Device, host: torch.Tensor) -> Rates:
    """With copies of `host`, a uint8 host tensor whose bytes nobody needs: the fastest of a few rounds, each of several copies,
    so that the wait for the last one, which looks now and then, is little of it."""
    on_device = torch.zeros(host.numel(), dtype=torch.uint8, device=device.device)
    out_s, in_s = [], []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        [device.copy_out(host, on_device) for _ in range(COPIES)][-1].wait()
        out = time.perf_counter()
        [device.copy_in(on_device, host) for _ in range(COPIES)][-1].wait()
        out_s.append(out - began)
        in_s.append(time.perf_counter() - out)
    nbytes = COPIES * host.numel()
    return Rates(nbytes / min(out_s), nbytes / min(in_s))


def drive_rates(scratch: Scratch, buffers: Buffers, piece_bytes: int) -> tuple[float, float]:
    """(written, read) bytes a second. A file system is slower at what it writes for the first time, which is not counted.
    BudgetError and StoreError where the drives have no room, StorageIOError and DeadlineError where they fail."""
    places: list[Place] = []
    seconds = []
    try:
        places += (scratch.take(piece_bytes) for _ in range(DRIVE_PIECES))
        for kind in ("write", "write", "read"):
            began = time.perf_counter()
            tickets: list[Ticket] = []
            for place in places:
                buffer = buffers.take()
                move = place.write if kind == "write" else place.read
                tickets.append(move(buffer.address, buffer))
                buffers.put(buffer, [tickets[-1]])
            wait_for(tickets)
            seconds.append(time.perf_counter() - began)
    finally:
        for place in places:
            place.release()
    total = DRIVE_PIECES * piece_bytes
    return total / seconds[1], total / seconds[2]
