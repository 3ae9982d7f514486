"""Facts of processor and host memory, read from /proc, /sys and the control groups. `root` is "/", but for tests."""

from __future__ import annotations

import os
import platform
import re
import resource
from pathlib import Path

import torch

from fuyou.core.limits import cpu_quota, read_memory, shared_memory
from fuyou.doctor.facts import HostMemory, NumaNode, Processor
from fuyou.runtime.measure import free_host_bytes
from fuyou.train.cores import physical_cores

SPEED_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")  # of x86-64 and of arm64
CAP_IPC_LOCK = 14  # <linux/capability.h>


def processor(root: Path = Path("/")) -> Processor:
    text = read(root / "proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    has = set(flags[1].split()) if flags else set()
    allowed = frozenset(os.sched_getaffinity(0))
    return Processor(
        model=" ".join(model[1].split()) if model else platform.machine(),
        machine_cpu_count=os.cpu_count() or 1,
        usable_cpu_count=len(allowed),
        usable_core_count=physical_cores(allowed, root),
        quota_cpus=cpu_quota(root),
        torch_capability=torch.backends.cpu.get_cpu_capability(),
        flags=tuple(each for each in SPEED_FLAGS if each in has),
        numa_nodes=numa_nodes(root),
    )


def numa_nodes(root: Path = Path("/")) -> tuple[NumaNode, ...]:
    folders = sorted(
        (root / "sys/devices/system/node").glob("node[0-9]*"), key=lambda each: int(each.name.removeprefix("node"))
    )
    found = []
    for folder in folders:
        total = re.search(r"MemTotal:\s+(\d+) kB", read(folder / "meminfo"))
        found.append(NumaNode(read(folder / "cpulist").strip(), int(total[1]) * 1024 if total else 0))
    return tuple(found)


def host_memory(root: Path = Path("/")) -> HostMemory:
    memory = read_memory(root)
    group = memory.tightest()
    left = [each.free_bytes for each in memory.groups if each.free_bytes is not None]
    available = min([memory.available_bytes, *left])
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    shm = shared_memory(root)
    return HostMemory(
        total_bytes=memory.total_bytes,
        available_bytes=available or free_host_bytes(),
        group=group.folder if group else None,
        group_limit_bytes=group.limit_bytes if group else None,
        group_used_bytes=group.used_bytes if group else None,
        memlock_limit_bytes=None if limit == resource.RLIM_INFINITY else limit,
        memlock_lifted=has_capability(CAP_IPC_LOCK, root),
        shared_memory_bytes=shm[0] if shm else None,
        shared_memory_free_bytes=shm[1] if shm else None,
        huge_pages=_chosen(read(root / "sys/kernel/mm/transparent_hugepage/enabled")),
    )


def has_capability(number: int, root: Path = Path("/")) -> bool:
    effective = re.search(r"^CapEff:\s*([0-9a-f]+)", read(root / "proc/self/status"), re.MULTILINE)
    return bool(effective and int(effective[1], 16) >> number & 1)


def read(path: Path) -> str:
    """ "" for what cannot be read."""
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""


def _chosen(text: str) -> str | None:
    """always [madvise] never → madvise"""
    found = re.search(r"\[(\w+)\]", text)
    return found[1] if found else None
