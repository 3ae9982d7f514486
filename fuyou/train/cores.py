"""Which cores a launched script runs on, and how many threads compute."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fuyou.core.errors import ConfigError
from fuyou.core.limits import cpu_quota

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # torch takes its own count from these two
_ASK_DRIVER_S = 30.0
_ASK_DRIVER = """
import ctypes, sys
cuda, device, name = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.create_string_buffer(32)
if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), int(sys.argv[1])) or cuda.cuDeviceGetPCIBusId(name, 32, device):
    sys.exit(1)
print(name.value.decode())
"""


@dataclass(frozen=True)
class Cores:
    """`bound`: the cores to bind the process to, or None to leave it where it may run. `words` says it for a person."""

    bound: frozenset[int] | None
    threads: int | None  # None: the user's own variables say it
    words: str


def choose_cores(
    cores: str | None,
    threads: int | None,
    bind: bool,
    device: str | None,
    environment: Mapping[str, str],
    root: Path = Path("/"),
) -> Cores:
    """`cores`: a list such as 0-7,16 (None: chosen). ConfigError for cores that are not there."""
    allowed = frozenset(os.sched_getaffinity(0))
    bound, where = None, f"on {_count(len(allowed), 'core')}"
    if cores is not None:
        bound = parse_cores(cores, allowed)
        where = f"bound to cores {format_cores(bound)}"
    elif bind:
        near = _cores_near_gpu(device, environment, root)
        if near and near & allowed and not near >= allowed:
            bound = near & allowed
            where = f"bound to cores {format_cores(bound)}, those of the GPU's NUMA node"
    if threads is None and any(environment.get(name) for name in THREAD_VARIABLES):
        own = ", ".join(f"{name}={environment[name]}" for name in THREAD_VARIABLES if environment.get(name))
        return Cores(bound, None, f"{own} as you set it, {where}")
    quota = cpu_quota(root)
    why = "" if threads is None else " as asked"
    if threads is None:
        # One compute thread a physical core, as MKL and torch count: a second on the same core has no vector unit of
        # its own. Beyond the control group's quota they would only be stopped by the kernel in turn.
        threads = physical_cores(bound or allowed, root)
        if quota is not None and quota < threads:
            threads, why = max(1, int(quota)), f" (the control group grants {quota:g} CPUs)"
    return Cores(bound, threads, f"{_count(threads, 'compute thread')}{why} {where}")


def parse_cores(text: str, allowed: frozenset[int]) -> frozenset[int]:
    """'0-3,8' → {0, 1, 2, 3, 8}; ConfigError for what is no list, or names a core that this process may not use."""
    found: set[int] = set()
    for item in text.split(","):
        first, dash, last = item.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or int(last or first) < int(first):
            raise ConfigError(f"--cores={text!r} is not a list of cores: write them as in 0-7 or 0,2,4-7.")
        if int(last or first) > max(allowed):  # before a range of billions is made
            found.add(int(last or first))
            break
        found.update(range(int(first), int(last or first) + 1))
    if not found <= allowed:
        raise ConfigError(
            f"--cores={text!r} names core {min(found - allowed)}, which this process may not use: its cores are "
            f"{format_cores(allowed)} (of the machine, less what taskset or the container has taken away)."
        )
    return frozenset(found)


def format_cores(cores: frozenset[int]) -> str:
    """{0, 1, 2, 5} → '0-2,5', as the kernel writes it."""
    ordered, parts = sorted(cores), []
    while ordered:
        length = next((i for i, core in enumerate(ordered) if core != ordered[0] + i), len(ordered))
        parts.append(str(ordered[0]) if length == 1 else f"{ordered[0]}-{ordered[length - 1]}")
        del ordered[:length]
    return ",".join(parts)


def physical_cores(cores: frozenset[int], root: Path = Path("/")) -> int:
    """How many of them are cores of their own, not a second hardware thread of another one among them."""
    siblings = set()
    for core in cores:
        try:
            text = (root / f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list").read_text().strip()
        except OSError:
            text = str(core)
        siblings.add(text)
    return max(1, len(siblings))


def cores_of_pci_device(address: str, root: Path = Path("/")) -> frozenset[int] | None:
    """The cores of the NUMA node at which this device sits; None where there is one node, or it does not say."""
    nodes = [each for each in (root / "sys/devices/system/node").glob("node[0-9]*") if each.is_dir()]
    device = root / "sys/bus/pci/devices" / _sys_address(address)
    try:
        node, text = int((device / "numa_node").read_text()), (device / "local_cpulist").read_text().strip()
    except (OSError, ValueError):
        return None
    if len(nodes) < 2 or node < 0 or not text:
        return None
    return parse_cores(text, frozenset(range(2**16)))


def _sys_address(address: str) -> str:
    """The driver may write the domain with eight digits, and letters large: 00000000:3B:00.0 is 0000:3b:00.0."""
    domain, _, rest = address.strip().lower().partition(":")
    return f"{domain[-4:]}:{rest}"


def _cores_near_gpu(device: str | None, environment: Mapping[str, str], root: Path) -> frozenset[int] | None:
    """Asks the driver, in a process of its own: it knows CUDA_VISIBLE_DEVICES, and its memory does not stay with us."""
    if device == "cpu" or not (root / "dev/nvidiactl").exists():
        return None
    index = (device or "cuda").partition(":")[2] or "0"
    try:
        asked = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _ASK_DRIVER, index],
            capture_output=True, text=True, timeout=_ASK_DRIVER_S, env=dict(environment), stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return cores_of_pci_device(asked.stdout, root) if asked.returncode == 0 else None


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
