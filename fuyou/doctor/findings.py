"""From facts to findings: pure functions, one a line of the answer, so that each warning can be had from made-up facts."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Literal

from fuyou.core.sizes import format_bytes
from fuyou.doctor.facts import Adam, Facts, Folder, Gpu, Gpus, HostMemory, IoEngine, Processor

Status = Literal["ok", "warning", "problem"]
MIB, GIB = 1 << 20, 1 << 30

LITTLE_RAM_BYTES = 2 * GIB
LITTLE_SHARED_BYTES = 256 * MIB  # Docker gives 64 MiB, which DataLoader workers soon fill
NO_ROOM_BYTES, LITTLE_ROOM_BYTES = 256 * MIB, 20 * GIB
BYTES_PER_PARAMETER = 28  # on the drives at most: two slots of weights and optimizer state, and a gradient
SLOW_DRIVE_BYTES_PER_S = 500e6  # below every NVMe drive's
GOOD_LINK_SHARE = 0.5  # of what the lanes carry; four fifths is usual
ODD_FILE_SYSTEMS = ("overlay", "btrfs", "zfs", "nfs", "nfs4", "cifs", "9p", "virtiofs", "fuse", "fuseblk")

SECCOMP_CURE = (
    "start the container with a seccomp profile that allows io_uring_setup, io_uring_enter and io_uring_register (Docker: "
    "--security-opt seccomp=PROFILE, or seccomp=unconfined)"
)
MEMLOCK_CURE = (
    "raise it: `ulimit -l unlimited` as root, a line `USER - memlock unlimited` in /etc/security/limits.conf, "
    "LimitMEMLOCK=infinity of a systemd unit, or docker run --ulimit memlock=-1"
)


@dataclass(frozen=True)
class Finding:
    subject: str
    status: Status
    text: str
    cure: str = ""  # of what is not ok


def findings(facts: Facts) -> list[Finding]:
    return [
        cpu(facts.processor, bool(facts.gpus.devices)),
        numa(facts.processor),
        ram(facts.memory),
        *control_group(facts.memory),
        memlock(facts.memory, facts.engine),
        huge_pages(facts.memory),
        shared_memory(facts.memory),
        *gpu(facts.gpus, facts.processor),
        kernel(facts.engine),
        extension(facts.engine, facts.adam),
        adam(facts.adam),
        *(each for folder in facts.folders for each in drive(folder)),
        *([] if facts.folders else [no_folder()]),
        versions(facts.versions),
    ]


def worst(found: list[Finding]) -> Status:
    order: tuple[Status, ...] = ("problem", "warning", "ok")
    return next(status for status in order if status == "ok" or any(each.status == status for each in found))


# --- the host -----------------------------------------------------------------------------------------------------


def cpu(its: Processor, with_gpu: bool) -> Finding:
    cores = f"{its.usable_cpu_count} of {its.machine_cpu_count} CPUs usable, {_count(its.usable_core_count, 'physical core')}"
    quota = f", control groups grant {its.quota_cpus:g} CPUs' worth of time" if its.quota_cpus is not None else ""
    flags = ", ".join(its.flags) or "no vector instructions that matter"
    text = f"{its.model}: {cores}{quota}; {flags}; torch uses {its.torch_capability}"
    if its.torch_capability == "DEFAULT" and "avx2" not in its.flags:
        return Finding(
            "cpu", "warning", f"{text}. The bits of torch's AdamW are promised with AVX2, and without it updates are slow",
            "use a CPU with AVX2",
        )  # fmt: skip
    if its.torch_capability == "DEFAULT":
        return Finding(
            "cpu", "warning", f"{text}, though the CPU has more", "unset ATEN_CPU_CAPABILITY, or install another torch"
        )
    if its.quota_cpus is not None and its.quota_cpus < 1:
        return Finding(
            "cpu", "warning", f"{text}, less than one CPU", "raise the quota (docker run --cpus, systemd CPUQuota)"
        )
    if not with_gpu and not {"avx512f", "avx512_bf16", "amx_bf16", "bf16"} & set(its.flags):
        text += "; products in bf16 are slow on it: train in fp32 where there is no GPU"
    return Finding("cpu", "ok", text)


def numa(its: Processor) -> Finding:
    if len(its.numa_nodes) < 2:
        return Finding("numa", "ok", "one node")
    nodes = "; ".join(f"CPUs {each.cpus or 'none'} with {format_bytes(each.memory_bytes)}" for each in its.numa_nodes)
    return Finding(
        "numa", "ok", f"{len(its.numa_nodes)} nodes: {nodes}. `fuyou launch` binds a script to the node of its GPU"
    )


def ram(its: HostMemory) -> Finding:
    text = f"{format_bytes(its.available_bytes)} free of {format_bytes(its.total_bytes)}"
    if its.available_bytes < LITTLE_RAM_BYTES:
        return Finding(
            "ram", "warning", f"{text}: torch itself takes about half a GiB",
            "end other programs, or raise the control group's limit" if its.group else "end other programs",
        )  # fmt: skip
    return Finding("ram", "ok", text)


def control_group(its: HostMemory) -> list[Finding]:
    if its.group is None or its.group_limit_bytes is None:
        return [Finding("group", "ok", "no control group limits memory below the machine's")]
    used = f", {format_bytes(its.group_used_bytes)} used" if its.group_used_bytes is not None else ""
    return [Finding("group", "ok", f"{its.group} limits memory to {format_bytes(its.group_limit_bytes)}{used}")]


def memlock(its: HostMemory, engine: IoEngine) -> Finding:
    limit = its.memlock_limit_bytes
    if limit is None:
        return Finding("memlock", "ok", "no limit")
    text = f"limit {format_bytes(limit)}"
    if its.memlock_lifted:
        return Finding("memlock", "ok", f"{text}, which does not bind this process (CAP_IPC_LOCK)")
    if engine.name != "io_uring":
        return Finding("memlock", "ok", f"{text}, which only io_uring would need to be higher")
    if engine.buffers_registered is False:
        return Finding(
            "memlock", "warning",
            f"{text}: I/O buffers cannot be registered with io_uring, which costs speed and CPU time",
            MEMLOCK_CURE,
        )  # fmt: skip
    if limit < its.available_bytes:
        return Finding(
            "memlock",
            "warning",
            f"{text}: buffers beyond it are not registered with io_uring, and slower",
            MEMLOCK_CURE,
        )
    return Finding("memlock", "ok", text)


def huge_pages(its: HostMemory) -> Finding:
    if its.huge_pages == "never":
        return Finding(
            "huge pages", "warning", "transparent huge pages are off: each request is many small segments to the drive",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, as root",
        )  # fmt: skip
    return Finding(
        "huge pages", "ok", f"transparent, {its.huge_pages}" if its.huge_pages else "the kernel does not say"
    )


def shared_memory(its: HostMemory) -> Finding:
    cure = "docker run --shm-size=8g (or --ipc=host), or mount a tmpfs on /dev/shm"
    needs = "DataLoader workers hand batches over through it"
    if its.shared_memory_bytes is None:
        return Finding("/dev/shm", "warning", f"there is none: {needs}", cure)
    free = its.shared_memory_free_bytes or 0
    text = f"{format_bytes(free)} free of {format_bytes(its.shared_memory_bytes)}"
    if free < LITTLE_SHARED_BYTES:
        full = its.shared_memory_bytes >= 2 * LITTLE_SHARED_BYTES
        return Finding("/dev/shm", "warning", f"{text}: {needs}", "remove what fills it" if full else cure)
    return Finding("/dev/shm", "ok", text)


# --- the GPU ------------------------------------------------------------------------------------------------------


def gpu(its: Gpus, processor: Processor) -> list[Finding]:
    if its.devices:
        return [each for index, device in enumerate(its.devices) for each in _device(index, device, its)]
    if not its.cards_on_bus:
        return [Finding("gpu", "ok", f"none ({its.problem}): forward and backward run on the CPU")]
    cards = f"{_count(its.cards_on_bus, 'NVIDIA card')} on the bus, which torch cannot use: {its.problem}"
    if its.driver is None:
        return [
            Finding("gpu", "warning", f"{cards}; no driver is loaded", "install NVIDIA's driver, and `modprobe nvidia`")
        ]
    if its.torch_cuda is None:
        return [Finding("gpu", "warning", f"{cards}; driver {its.driver}", "install a torch that is built for CUDA")]
    return [
        Finding(
            "gpu", "warning", f"{cards}; driver {its.driver}, torch for CUDA {its.torch_cuda}",
            "look at nvidia-smi: the driver may be older than torch's CUDA, or the container may have no access (docker run "
            "--gpus all); CUDA_VISIBLE_DEVICES may hide it",
        )
    ]  # fmt: skip


def _device(index: int, its: Gpu, gpus: Gpus) -> list[Finding]:
    name = f"cuda:{index}"
    memory = f"{format_bytes(its.free_bytes)} free of {format_bytes(its.memory_bytes)}"
    near = f", next to CPUs {its.numa_cpus}" if its.numa_cpus else ""
    text = f"{its.name} ({its.capability}), {memory}, driver {gpus.driver or 'unknown'}, CUDA {gpus.torch_cuda}{near}"
    found = [Finding(name, "ok", text)]
    if its.free_bytes < its.memory_bytes / 2:
        found = [Finding(name, "warning", f"{text}: others hold the rest", "end them (nvidia-smi lists them)")]
    rates = (its.host_to_device_bytes_per_s, its.device_to_host_bytes_per_s)
    if rates[0] is not None and rates[1] is not None:
        found.append(_link(f"{name} link", its, rates[0], rates[1]))
    return found


def _link(subject: str, its: Gpu, to_device: float, to_host: float) -> Finding:
    text = f"{speed(to_device)} to the device, {speed(to_host)} back"
    if its.link_bytes_per_s is None:
        return Finding(subject, "ok", text)
    text += f", of {speed(its.link_bytes_per_s)} that {its.link_width} lanes carry"
    if its.link_width is not None and its.link_width_most is not None and its.link_width < its.link_width_most:
        return Finding(
            subject, "warning", f"{text}; the card has {its.link_width_most} lanes",
            "put the card into a slot with as many lanes, or see in the firmware's settings how they are divided",
        )  # fmt: skip
    if min(to_device, to_host) < GOOD_LINK_SHARE * its.link_bytes_per_s:
        return Finding(
            subject, "warning", f"{text}: less than half",
            "see that nothing else copies, that the power limit is not in force (nvidia-smi -q), and that the process runs "
            "next to the GPU (`fuyou launch` binds it)",
        )  # fmt: skip
    return Finding(subject, "ok", text)


# --- I/O and the update -------------------------------------------------------------------------------------------


def kernel(its: IoEngine) -> Finding:
    if its.name is None:
        return Finding(
            "io", "problem", f"Linux {its.kernel}: no I/O engine can be had: {its.problem}",
            "pip install aiofiles, or a C++17 compiler and fuyou again; see also the limits of threads and descriptors "
            "(ulimit -u, ulimit -n)",
        )  # fmt: skip
    if its.name == "io_uring":
        registered = "registered" if its.buffers_registered else "not registered"
        note = f" ({its.registration_note})" if its.registration_note else ""
        return Finding("io", "ok", f"Linux {its.kernel}: io_uring, buffers {registered}{note}")
    text = f"Linux {its.kernel}: {its.name}, for io_uring is not available"
    if not its.extension_loaded:
        return Finding("io", "warning", f"{text} without the extension, and I/O is slower", _EXTENSION_CURE)
    why, cure = _refusal(its)
    return Finding("io", "warning", f"{text}: {why} ({its.uring_reason}). I/O takes more CPU", cure)


def _refusal(its: IoEngine) -> tuple[str, str]:
    """Why io_uring_setup failed, as far as facts tell, and what would cure it."""
    code = its.uring_errno
    if code in (errno.EPERM, errno.EACCES):
        if its.uring_disabled == 2:
            return "kernel.io_uring_disabled=2 forbids it to all", "sysctl -w kernel.io_uring_disabled=0, as root"
        if its.uring_disabled == 1:
            return (
                "kernel.io_uring_disabled=1 allows it to CAP_SYS_ADMIN and the group kernel.io_uring_group alone",
                "sysctl -w kernel.io_uring_disabled=0 as root, or join that group",
            )
        if its.seccomp_mode == 2:
            return "a seccomp filter forbids it", SECCOMP_CURE
        return "a security module forbids it", "allow io_uring in SELinux's or AppArmor's policy"
    if code == errno.ENOSYS:
        if its.seccomp_mode == 2:
            return "a seccomp filter denies that it exists, or the kernel has none", SECCOMP_CURE
        return "this kernel has none", "use Linux 5.11 or newer, built with CONFIG_IO_URING"
    if code == errno.ENOMEM:
        return "the ring does not fit into the memlock limit", MEMLOCK_CURE
    if code in (errno.EMFILE, errno.ENFILE):
        return "no descriptor is left", "raise `ulimit -n`"
    if code == errno.EAGAIN:
        return "no thread can be had", "raise `ulimit -u`"
    return "its setup failed", "see dmesg, and report it"


_EXTENSION_CURE = "install a C++17 compiler (g++ or clang++) and Python's headers, then fuyou again"


def extension(its: IoEngine, update: Adam) -> Finding:
    if not update.problem:
        return Finding("extension", "ok", "loaded; its AdamW has the bits of torch's on this machine")
    if its.extension_loaded and "older sources" not in update.problem:
        return Finding(
            "extension",
            "warning",
            f"loaded for I/O only: {update.problem}",
            "install the torch that fuyou is tested with",
        )
    return Finding("extension", "warning", f"{update.problem} AdamW runs through torch.", _EXTENSION_CURE)


def adam(its: Adam) -> Finding:
    path = f" ({its.vector_path})" if its.vector_path else ""
    rate = f"{its.parameters_per_s / 1e9:.2f}e9 parameters a second, {speed(its.bytes_per_s)} of host memory"
    return Finding("adam", "ok", f"{its.kernels}{path}, {_count(its.thread_count, 'thread')}, {its.precision}: {rate}")


# --- the drives ---------------------------------------------------------------------------------------------------


def no_folder() -> Finding:
    return Finding("nvme", "ok", "no folder given, so no drive was looked at: `fuyou doctor --nvme DIR`")


def drive(its: Folder) -> list[Finding]:
    """Of one folder: what it lies on, its room, and its speed."""
    if its.problem:
        return [Finding(f"nvme {its.path}", "problem", its.problem.rstrip("."), _folder_cure(its))]
    return [_file_system(its), _room(its), *_speed(its)]


def _folder_cure(its: Folder) -> str:
    if "does not exist" in its.problem:
        return f"mkdir -p {its.path}, on the drive"
    if "not writable" in its.problem:
        return f"chown or chmod {its.path}, remount its file system rw, or give another folder"
    return "give another folder"


def _file_system(its: Folder) -> Finding:
    subject = f"nvme {its.path}"
    where = f"{its.mount_kind or 'unknown file system'} of {its.mount_source or '?'} at {its.mount_point or '?'}"
    if its.in_memory:
        return Finding(
            subject, "warning", f"{where}: its bytes are RAM, and count against no budget of fuyou's",
            "give a folder on a drive",
        )  # fmt: skip
    if its.shares_with is not None:
        return Finding(
            subject,
            "warning",
            f"{where}, the same as {its.shares_with}: one room, one speed",
            "give one folder a drive",
        )
    if not its.direct:
        return Finding(
            subject, "warning", f"{where}: O_DIRECT is refused ({its.direct_problem}); I/O goes through the page cache",
            "use ext4 or xfs",
        )  # fmt: skip
    text = f"{where}; O_DIRECT, aligned to {its.alignment_bytes} bytes"
    if its.mount_kind is not None and its.mount_kind.split(".")[0] in ODD_FILE_SYSTEMS:
        return Finding(
            subject, "warning", f"{text}. A {its.mount_kind} copies, checks or sends bytes that a local drive would not",
            "use ext4 or xfs on a drive of this machine; in a container, a bind mount of it",
        )  # fmt: skip
    return Finding(subject, "ok", text)


def _room(its: Folder) -> Finding:
    free = its.free_bytes or 0
    text = (
        f"{format_bytes(free)} free of {format_bytes(its.total_bytes or 0)}: the whole state of "
        f"{free / BYTES_PER_PARAMETER / 1e9:.3g}e9 parameters at {BYTES_PER_PARAMETER} bytes each"
    )
    cure = "remove files, or give a folder on another drive"
    if free < NO_ROOM_BYTES:
        return Finding("  room", "problem", text, cure)
    return Finding("  room", "warning", text, cure) if free < LITTLE_ROOM_BYTES else Finding("  room", "ok", text)


def _speed(its: Folder) -> list[Finding]:
    if its.shares_with is not None:
        return []
    if not (its.read_bytes_per_s and its.write_bytes_per_s and its.mixed_bytes_per_s):
        expected = its.in_memory or (its.free_bytes or 0) < LITTLE_ROOM_BYTES  # and told a line before
        text = f"not measured: {its.not_measured.rstrip('.')}"
        return [
            Finding(
                "  speed", "ok" if expected else "warning", text, "" if expected else "see dmesg: the drive may fail"
            )
        ]
    text = (
        f"{speed(its.read_bytes_per_s)} read, {speed(its.write_bytes_per_s)} written, {speed(its.mixed_bytes_per_s)} both at "
        f"once, with {its.engine}{', tuned for this drive' if its.tuned else ''}"
    )
    if min(its.read_bytes_per_s, its.write_bytes_per_s) < SLOW_DRIVE_BYTES_PER_S:
        return [
            Finding(
                "  speed", "warning", f"{text}: less than an NVMe drive's",
                "give a folder on an NVMe drive; where it is one, see that nothing else uses it, that it is not hot or "
                "nearly full (`fstrim`), and how many lanes it has",
            )
        ]  # fmt: skip
    return [Finding("  speed", "ok", text)]


# --- versions -----------------------------------------------------------------------------------------------------


def versions(its: dict[str, str | None]) -> Finding:
    there = ", ".join(f"{name} {version}" for name, version in its.items() if version is not None)
    missing = [name for name, version in its.items() if version is None]
    return Finding("versions", "ok", f"{there}{'; not installed: ' if missing else ''}{', '.join(missing)}")


def speed(rate: float) -> str:
    """As drives and links are sold: decimal."""
    return f"{rate / 1e9:.2f} GB/s" if rate >= 1e8 else f"{rate / 1e6:.3g} MB/s"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
