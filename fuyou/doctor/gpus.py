"""Facts of GPUs: what torch sees, what lies on the bus, and the link between."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from fuyou.doctor.facts import Gpu, Gpus
from fuyou.doctor.host import read
from fuyou.train.cores import cores_of_pci_device, format_cores

# GT/s of a lane -> bytes a second that it carries: 8b/10b coding in generations 1 and 2, 128b/130b from 3 on, 242/256 in
# the flits of 6 (PCI Express Base Specification).
LANE_BYTES_PER_S = {2.5: 0.25e9, 5.0: 0.5e9, 8.0: 0.985e9, 16.0: 1.969e9, 32.0: 3.938e9, 64.0: 7.563e9}
NVIDIA, DISPLAY = "0x10de", "0x03"


def gpus(rates: tuple[float, float] | None, root: Path = Path("/")) -> Gpus:
    """`rates`: bytes a second to the first device and back, as measured."""
    devices: list[Gpu] = []
    problem = ""
    if torch.cuda.is_available():
        devices = [_gpu(index, rates if index == 0 else None, root) for index in range(torch.cuda.device_count())]
    else:
        problem = _why_none()
    return Gpus(tuple(devices), driver(root), cards_on_bus(root), torch.version.cuda, problem)


def driver(root: Path = Path("/")) -> str | None:
    """NVIDIA's kernel module: its version, None where it is not loaded."""
    return read(root / "sys/module/nvidia/version").strip() or None


def cards_on_bus(root: Path = Path("/")) -> int:
    return sum(
        read(each / "vendor").strip() == NVIDIA and read(each / "class").startswith(DISPLAY)
        for each in (root / "sys/bus/pci/devices").glob("*")
    )


def link_of(address: str, root: Path = Path("/")) -> tuple[float | None, int | None, int | None]:
    """(bytes a second each way, lanes, lanes of the card) of the PCI device 0000:3b:00.0. An idle card may run its lanes
    slowly: the speed counted is the best that both ends know."""
    folder = root / "sys/bus/pci/devices" / address
    speed = re.match(r"([\d.]+) GT/s", read(folder / "max_link_speed"))
    width, most = (read(folder / f"{each}_link_width").strip() for each in ("current", "max"))
    if not speed or not width.isdigit() or not most.isdigit() or not 0 < int(width) <= 32:
        return None, None, None
    lane = LANE_BYTES_PER_S.get(float(speed[1]))
    return lane * int(width) if lane else None, int(width), int(most)


def _gpu(index: int, rates: tuple[float, float] | None, root: Path) -> Gpu:
    properties: Any = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    address = ""
    if hasattr(properties, "pci_bus_id"):  # of newer versions of torch
        address = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    link, width, most = link_of(address, root)
    near = cores_of_pci_device(address, root) if address else None
    return Gpu(
        name=properties.name,
        memory_bytes=total,
        free_bytes=free,
        capability=f"{properties.major}.{properties.minor}",
        link_bytes_per_s=link,
        link_width=width,
        link_width_most=most,
        numa_cpus=format_cores(near) if near else None,
        host_to_device_bytes_per_s=rates[0] if rates else None,
        device_to_host_bytes_per_s=rates[1] if rates else None,
    )


def _why_none() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built without CUDA"
    try:
        torch.cuda.init()
    except Exception as error:  # whatever torch makes of what the driver says
        return " ".join(str(error).split("\n")[0].split())
    return "torch finds no device"
