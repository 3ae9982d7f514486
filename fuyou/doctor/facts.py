"""What a machine is, as values: gathered in `host.py`, `engines.py`, `gpus.py` and `drives.py`, judged in `findings.py`.

Bytes, seconds, bytes a second; None is what the system does not say. Everything is JSON-able by `dataclasses.asdict`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Processor:
    model: str
    machine_cpu_count: int  # hardware threads of the machine
    usable_cpu_count: int  # that this process may run on
    usable_core_count: int  # physical ones among them
    quota_cpus: float | None  # CPUs' worth of time that the control groups grant; None: all
    torch_capability: str  # torch's vector instructions: DEFAULT, AVX2, AVX512
    flags: tuple[str, ...]  # of those that decide speed, the ones that are there
    numa_nodes: tuple[NumaNode, ...]


@dataclass(frozen=True)
class NumaNode:
    cpus: str  # as the kernel writes them: 0-7,16
    memory_bytes: int


@dataclass(frozen=True)
class HostMemory:
    total_bytes: int
    available_bytes: int  # to this process: the least of the machine's and what control groups leave
    group: str | None  # the control group with the tightest limit, where one is below the machine's memory
    group_limit_bytes: int | None
    group_used_bytes: int | None
    memlock_limit_bytes: int | None  # None: no limit
    memlock_lifted: bool  # this process has CAP_IPC_LOCK, to which the limit does not apply
    shared_memory_bytes: int | None  # of /dev/shm; None: there is none
    shared_memory_free_bytes: int | None
    huge_pages: str | None  # of transparent huge pages: always, madvise, never


@dataclass(frozen=True)
class IoEngine:
    kernel: str
    name: str | None  # of the engine that a run would have; None: none can be had
    problem: str  # where there is none
    uring_errno: int | None  # what io_uring_setup answered; None: it works, or the extension is missing
    uring_reason: str  # the same in words; "" where io_uring works
    uring_disabled: int | None  # sysctl kernel.io_uring_disabled; None: this kernel has no such switch
    seccomp_mode: int | None  # of this process: 2 is a filter
    buffers_registered: bool | None  # whether 64 MiB could be, None: without io_uring
    registration_note: str
    extension_loaded: bool  # fuyou._native


@dataclass(frozen=True)
class Adam:
    kernels: str  # native or torch
    vector_path: str  # of the native ones: avx512, avx2, scalar; "" with torch's
    problem: str  # why not native
    thread_count: int
    precision: str
    bytes_per_s: float  # of host memory, read and written together
    parameters_per_s: float


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_bytes: int
    free_bytes: int
    capability: str
    link_bytes_per_s: float | None  # what the bus carries each way as it is wired now; None: sysfs does not say
    link_width: int | None  # lanes in use
    link_width_most: int | None  # of the card
    numa_cpus: str | None  # next to it, on a machine with several NUMA nodes
    host_to_device_bytes_per_s: (
        float | None
    )  # from pinned memory; None: of others than the first, which alone is measured
    device_to_host_bytes_per_s: float | None


@dataclass(frozen=True)
class Gpus:
    devices: tuple[Gpu, ...]
    driver: str | None  # NVIDIA's kernel module
    cards_on_bus: int  # NVIDIA's display controllers, whether torch can use them or not
    torch_cuda: str | None  # that torch was built for
    problem: str  # why torch sees none


@dataclass(frozen=True)
class Folder:
    path: str
    problem: str  # why it cannot be used; "" where it can, and only then is there more
    mount_kind: str | None = None
    mount_source: str | None = None
    mount_point: str | None = None
    shares_with: str | None = None  # a folder before it on the same file system, where both were measured
    in_memory: bool = False
    total_bytes: int | None = None
    free_bytes: int | None = None  # to this user
    direct: bool | None = None  # O_DIRECT is taken
    direct_problem: str = ""
    alignment_bytes: int | None = None
    read_bytes_per_s: float | None = None
    write_bytes_per_s: float | None = None
    mixed_bytes_per_s: float | None = None
    engine: str | None = None
    tuned: bool | None = None  # with what a run measured there and kept in fuyou-io.json
    written_bytes: int | None = None  # to measure it
    not_measured: str = ""  # why not


@dataclass(frozen=True)
class Facts:
    processor: Processor
    memory: HostMemory
    engine: IoEngine
    adam: Adam
    gpus: Gpus
    folders: tuple[Folder, ...]
    versions: dict[str, str | None]  # None: not installed
    flops_per_s: float  # of a block's forward and backward, in Adam.precision, on the GPU or else the CPU
    copy_bytes_per_s: float  # of one core, in host memory; on a GPU's machine 0.0
