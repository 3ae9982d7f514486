"""This machine as numbers, measured in some seconds: what a hardware file says of one that is not here.

Nothing is left behind: the scratch file has no name, and all memory is given back.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections.abc import Callable, Sequence

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional

from fuyou.core.sizes import format_bytes
from fuyou.plan.machine import Drive, Machine
from fuyou.runtime.measure import free_host_bytes
from fuyou.swap.adam import AdamHyper, load_kernels
from fuyou.tiers.folders import check_folders, memory_folders, rooms_of
from fuyou.tiers.io import open_engine
from fuyou.tiers.io.measure import MEMORY_BYTES, measure, taking_turns
from fuyou.tiers.io.tuning import Tuning, remembered
from fuyou.tiers.pages import Pages

MEASURE_S = 1.0
COPY_BYTES = 64 * 2**20
ADAM_ELEMENTS = 8 * 2**20
# Of the block whose forward and backward are timed: wide enough that products take most of it, as in a model.
WIDTHS = {"cpu": (512, 1024), "cuda": (8192, 4096)}  # (tokens, width)
HEAD_SIZE = 128


def measure_machine(folders: Sequence[str], precision: str, device: torch.device) -> tuple[Machine, list[str]]:
    """(the machine, what a person should know of how it was measured). Rates in `precision`, "fp32" or "bf16".

    Folders on one file system count as one drive. StoreError for one that cannot be used, StorageIOError where a drive
    fails.
    """
    paths = check_folders(folders)
    notes = [f"{folder} is on a {kind}: its bytes are RAM" for folder, kind in memory_folders(paths).items()]
    rooms = rooms_of(paths, reuse=False)
    firsts = [paths[rooms.pools.index(pool)] for pool in range(len(rooms.room_bytes))]
    drives = []
    for folder, room in zip(firsts, rooms.room_bytes, strict=True):
        read, write = drive_rates(folder)
        drives.append(Drive(read, write, room))
        notes.append(
            f"{folder}: {format_bytes(read)}/s read and {format_bytes(write)}/s written, both at once in turns"
        )
    return measure_rates(precision, device, drives), notes


def measure_rates(precision: str, device: torch.device, drives: Sequence[Drive]) -> Machine:
    """The machine of these drives; all else of it is measured."""
    to_device, to_host = copy_rates(device)
    return Machine(
        name="this machine",
        flops_per_s=device_rate(device, precision),
        device_bytes=device_bytes(device),
        host_to_device_bytes_per_s=to_device,
        device_to_host_bytes_per_s=to_host,
        host_bytes=free_host_bytes(),
        dram_bytes_per_s=adam_rate(precision),
        cores=psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        drives=tuple(drives),
        shared_compute=device.type == "cpu",
        description=torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU",
    )


def device_bytes(device: torch.device) -> int:
    """Free now. Without a GPU that is host memory, which both tiers share."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free_host_bytes()


def device_rate(device: torch.device, precision: str) -> float:
    """Operations a second of a GPT block's forward and backward, counted as fuyou/plan/shapes.py counts them: norms,
    activation functions and all."""
    tokens, width = WIDTHS[device.type]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    with torch.random.fork_rng(devices=[]):
        block = _Block(width).to(device, dtype)
        inputs, gradient = torch.randn(2, 1, tokens, width).to(device, dtype)
    inputs.requires_grad_()

    def run() -> None:
        block(inputs).backward(gradient)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    operations = 3 * (24.0 * tokens * width * width + 4.0 * tokens * tokens * width)
    return operations / _median_s(run)


class _Block(nn.Module):
    """One layer of a GPT."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = width // HEAD_SIZE

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D)
        batch, tokens, width = x.shape
        shape = (batch, tokens, self.heads, width // self.heads)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(self.first(x)).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(functional.gelu(self.up(self.second(x))))


def copy_rates(device: torch.device) -> tuple[float, float]:
    """Bytes a second to the device and back, from pinned memory; without a GPU, of one core's copies."""
    if device.type == "cpu":
        one, other = (torch.ones(COPY_BYTES, dtype=torch.uint8) for _ in range(2))
        seconds = _median_s(lambda: ctypes.memmove(one.data_ptr(), other.data_ptr(), COPY_BYTES), MEASURE_S / 4)
        return COPY_BYTES / seconds, COPY_BYTES / seconds
    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)

    def copy(to: Tensor, source: Tensor) -> None:
        to.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)

    return (
        COPY_BYTES / _median_s(lambda: copy(there, host), MEASURE_S / 4),
        COPY_BYTES / _median_s(lambda: copy(host, there), MEASURE_S / 4),
    )


def adam_rate(precision: str) -> float:
    """Bytes a second of host memory that the update moves, counted as cost.Traffic.dram_bytes."""
    kernels = load_kernels()
    hyper = AdamHyper(1e-5, 0.9, 0.999, 1e-8, 0.01, True)
    param, mean, square = (torch.zeros(ADAM_ELEMENTS) for _ in range(3))
    if precision == "fp32":
        grad = torch.full((ADAM_ELEMENTS,), 1e-3)

        def update() -> None:
            kernels.step_fp32(param, mean, square, grad, tail=0, scales=(), hyper=hyper, step=1)

        return 28 * ADAM_ELEMENTS / _median_s(update, MEASURE_S / 2)
    grad = torch.full((ADAM_ELEMENTS,), 1e-3, dtype=torch.bfloat16)
    hi, lo = torch.zeros(ADAM_ELEMENTS, dtype=torch.bfloat16), torch.zeros(ADAM_ELEMENTS, dtype=torch.int16)

    def update_split() -> None:
        kernels.step_split(hi, lo, mean, square, grad, tail=0, scales=(), hyper=hyper, step=1)

    return 26 * ADAM_ELEMENTS / _median_s(update_split, MEASURE_S / 2)


def drive_rates(folder: str) -> tuple[float, float]:
    """Bytes a second of reads, and of writes, while both are going on: so that x bytes read and y written take
    x / reads + y / writes. What was measured there before, for the store, counts."""
    with open_engine() as engine:
        name = engine.name
    found = remembered(folder, name)
    if found is None or not found.mixed_bytes_per_s:
        pages = Pages(MEMORY_BYTES)

        def open_tuned(tuning: Tuning):  # type: ignore[no-untyped-def]
            return open_engine(name, tuning=tuning)

        found = measure(open_tuned, name, folder, pages.address, MEMORY_BYTES)
    return taking_turns(found.read_bytes_per_s, found.write_bytes_per_s, found.mixed_bytes_per_s)


def _median_s(run: Callable[[], object], seconds: float = MEASURE_S) -> float:
    """Of the runs that `seconds` hold, at least three, after one that does not count."""
    run()
    taken: list[float] = []
    until = time.perf_counter() + seconds
    while len(taken) < 3 or time.perf_counter() < until:
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)
