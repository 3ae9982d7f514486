"""`fuyou doctor`: facts against the system's own, findings from made-up facts, and the command on a real drive."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import textwrap
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from fault_tools import open_or_skip, run_script

from fuyou.cli import main
from fuyou.core.errors import ConfigError
from fuyou.core.sizes import format_bytes
from fuyou.doctor import findings
from fuyou.doctor.command import table
from fuyou.doctor.drives import look_at, measured
from fuyou.doctor.facts import Adam, Facts, Folder, Gpu, Gpus, HostMemory, IoEngine, NumaNode, Processor
from fuyou.doctor.gpus import cards_on_bus, driver, link_of
from fuyou.doctor.host import host_memory, numa_nodes, processor
from fuyou.plan.machine import Drive, Machine, load_machine, machine_of, shipped, to_file
from fuyou.runtime import this_machine
from fuyou.tiers.folders import mount_of
from fuyou.tiers.io import measure

GIB, MIB = 2**30, 2**20

GOOD = Facts(
    processor=Processor("A CPU", 32, 32, 16, None, "AVX512", ("avx2", "avx512f"), (NumaNode("0-31", 64 * GIB),)),
    memory=HostMemory(64 * GIB, 60 * GIB, None, None, None, None, False, 32 * GIB, 32 * GIB, "madvise"),
    engine=IoEngine("6.8", "io_uring", "", None, "", 0, 0, True, "", True),
    adam=Adam("native", "avx512", "", 15, "bf16", 2e11, 8e9),
    gpus=Gpus(
        (Gpu("A GPU", 24 * GIB, 23 * GIB, "8.9", 31.5e9, 16, 16, None, 26e9, 25e9),), "550.54", 1, "12.4", ""
    ),
    folders=(
        Folder(
            "/mnt/a", "", "ext4", "/dev/nvme0n1", "/mnt/a", None, False, 1000 * GIB, 900 * GIB, True, "", 512, 7e9, 6e9, 5e9,
            "io_uring", True, 900 * MIB,
        ),
    ),
    versions={"fuyou": "0.1", "torch": "2.13", "peft": None},
    flops_per_s=1e14,
    copy_bytes_per_s=0.0,
)  # fmt: skip
DRIVE = GOOD.folders[0]
NO_URING = replace(GOOD.engine, name="threads", uring_errno=errno.EPERM, uring_reason="Operation not permitted")
NO_GPU = replace(GOOD.gpus, devices=(), problem="why")


def test_a_good_machine_is_ok_in_every_line() -> None:
    found = findings.findings(GOOD)
    assert {each.status for each in found} == {"ok"} and findings.worst(found) == "ok"
    assert not any(each.cure for each in found)
    assert all(len(line) <= 120 for line in table(found).splitlines())
    assert "not installed: peft" in table(found)


def change(part: str, **values: object) -> Facts:
    return replace(GOOD, **{part: replace(getattr(GOOD, part), **values)})


def with_drive(**values: object) -> Facts:
    return replace(GOOD, folders=(replace(DRIVE, **values),))


def with_engine(**values: object) -> Facts:
    return replace(GOOD, engine=replace(NO_URING, **values))


GPU = GOOD.gpus.devices[0]

CASES = {
    "no AVX2": (change("processor", torch_capability="DEFAULT", flags=()), "cpu", "AVX2", "AVX2"),
    "capability hidden": (change("processor", torch_capability="DEFAULT"), "cpu", "CPU has more", "ATEN_CPU_CAPABILITY"),
    "half a CPU": (change("processor", quota_cpus=0.5), "cpu", "0.5 CPUs", "quota"),
    "little memory": (change("memory", available_bytes=GIB), "ram", "1.00 GiB free", "end other programs"),
    "memlock": (
        replace(
            change("memory", memlock_limit_bytes=8 * MIB),
            engine=replace(GOOD.engine, buffers_registered=False, registration_note="x"),
        ), "memlock", "8.00 MiB", "ulimit -l",
    ),
    "memlock of some GiB": (change("memory", memlock_limit_bytes=4 * GIB), "memlock", "4.00 GiB", "limits.conf"),
    "no huge pages": (change("memory", huge_pages="never"), "huge pages", "off", "madvise"),
    "Docker's shm": (
        change("memory", shared_memory_bytes=64 * MIB, shared_memory_free_bytes=64 * MIB), "/dev/shm", "64.00 MiB",
        "--shm-size",
    ),
    "full shm": (change("memory", shared_memory_free_bytes=0), "/dev/shm", "0 B free", "remove"),
    "no shm": (change("memory", shared_memory_bytes=None), "/dev/shm", "none", "tmpfs"),
    "card without driver": (replace(GOOD, gpus=replace(NO_GPU, driver=None)), "gpu", "no driver", "modprobe"),
    "torch without CUDA": (replace(GOOD, gpus=replace(NO_GPU, torch_cuda=None)), "gpu", "550.54", "built for CUDA"),
    "card not usable": (replace(GOOD, gpus=NO_GPU), "gpu", "cannot use: why", "nvidia-smi"),
    "full GPU": (change("gpus", devices=(replace(GPU, free_bytes=GIB),)), "cuda:0", "others hold", "nvidia-smi"),
    "eight lanes": (
        change("gpus", devices=(replace(GPU, link_width=8, link_bytes_per_s=15.7e9),)), "cuda:0 link", "has 16 lanes", "slot",
    ),
    "slow link": (
        change("gpus", devices=(replace(GPU, host_to_device_bytes_per_s=6e9),)), "cuda:0 link", "6.00 GB/s", "fuyou launch",
    ),
    "seccomp": (with_engine(seccomp_mode=2), "io", "seccomp filter forbids", "--security-opt"),
    "seccomp, as if there were none": (with_engine(seccomp_mode=2, uring_errno=errno.ENOSYS), "io", "seccomp", "seccomp"),
    "sysctl": (with_engine(uring_disabled=2, seccomp_mode=2), "io", "io_uring_disabled=2", "sysctl -w"),
    "sysctl, but for a group": (with_engine(uring_disabled=1), "io", "io_uring_group", "join that group"),
    "security module": (with_engine(), "io", "security module", "SELinux"),
    "old kernel": (with_engine(uring_errno=errno.ENOSYS), "io", "kernel has none", "5.11"),
    "memlock of an old kernel": (with_engine(uring_errno=errno.ENOMEM), "io", "memlock", "ulimit -l"),
    "descriptors": (with_engine(uring_errno=errno.EMFILE), "io", "descriptor", "ulimit -n"),
    "no extension": (with_engine(extension_loaded=False, uring_errno=None), "io", "without the extension", "C++17"),
    "torch's Adam": (
        replace(
            change("adam", problem="It cannot be loaded."), engine=replace(GOOD.engine, extension_loaded=False)
        ), "extension", "through torch", "C++17",
    ),
    "other bits": (change("adam", problem="other bits"), "extension", "I/O only: other bits", "torch"),
    "tmpfs": (with_drive(in_memory=True, mount_kind="tmpfs", read_bytes_per_s=None), "nvme /mnt/a", "RAM", "drive"),
    "same file system": (with_drive(shares_with="/mnt/b"), "nvme /mnt/a", "same as /mnt/b", "one folder a drive"),
    "no O_DIRECT": (with_drive(direct=False, direct_problem="Invalid argument"), "nvme /mnt/a", "page cache", "ext4"),
    "overlay": (with_drive(mount_kind="overlay"), "nvme /mnt/a", "overlay", "bind mount"),
    "little room": (with_drive(free_bytes=10 * GIB), "room", "10.00 GiB free", "another drive"),
    "slow drive": (with_drive(write_bytes_per_s=90e6), "speed", "90 MB/s written", "NVMe"),
    "failed drive": (
        with_drive(read_bytes_per_s=None, not_measured="Input/output error"), "speed", "Input/output error", "dmesg",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_warning_names_its_cure(name: str) -> None:
    facts, subject, text, cure = CASES[name]
    warned = [each for each in findings.findings(facts) if each.status != "ok"]
    (finding,) = [each for each in warned if each.subject.strip() == subject]
    assert finding.status == "warning" and text in finding.text
    assert cure in finding.cure
    assert all(each.cure for each in warned)
    if name != "memlock":
        assert len(warned) == 1, [each.text for each in warned]


@pytest.mark.parametrize(
    ("facts", "subject", "cure"),
    [
        (replace(GOOD, engine=replace(NO_URING, name=None, problem="none")), "io", "aiofiles"),
        (replace(GOOD, folders=(Folder("/mnt/b", "The nvme folder /mnt/b does not exist."),)), "nvme /mnt/b", "mkdir -p /mnt/b"),
        (replace(GOOD, folders=(Folder("/b", "The folder /b is not writable by this user."),)), "nvme /b", "chown"),
        (with_drive(free_bytes=100 * MIB), "  room", "remove files"),
    ],
)  # fmt: skip
def test_a_problem_is_one(facts: Facts, subject: str, cure: str) -> None:
    found = [each for each in findings.findings(facts) if each.status == "problem"]
    assert [each.subject for each in found] == [subject] and cure in found[0].cure
    assert findings.worst(findings.findings(facts)) == "problem"


def test_limits_that_do_not_bind_are_ok() -> None:
    for memory in (
        replace(GOOD.memory, memlock_limit_bytes=8 * MIB, memlock_lifted=True),
        replace(GOOD.memory, memlock_limit_bytes=62 * GIB),
    ):
        assert findings.memlock(memory, GOOD.engine).status == "ok"
    assert findings.memlock(replace(GOOD.memory, memlock_limit_bytes=MIB), NO_URING).status == "ok"
    assert findings.gpu(replace(NO_GPU, cards_on_bus=0), GOOD.processor)[0].status == "ok"


# --- facts -----------------------------------------------------------------------------------------------------------


def test_host_facts_are_the_systems() -> None:
    memory, cpu = host_memory(), processor()
    assert memory.total_bytes == psutil.virtual_memory().total
    assert 0 < memory.available_bytes <= memory.total_bytes
    limit = subprocess.run(["bash", "-c", "ulimit -l"], capture_output=True, text=True, check=True).stdout.strip()
    assert memory.memlock_limit_bytes == (None if limit == "unlimited" else int(limit) * 1024)
    assert (cpu.usable_cpu_count, cpu.machine_cpu_count) == (len(os.sched_getaffinity(0)), os.cpu_count())
    if shutil.which("lscpu"):
        told = subprocess.run(
            ["lscpu"], capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"}
        ).stdout
        values = dict(line.split(":", 1) for line in told.splitlines() if ":" in line)
        assert "Model name" not in values or cpu.model == " ".join(values["Model name"].split())
        assert "NUMA node(s)" not in values or len(numa_nodes()) == int(values["NUMA node(s)"])
        assert ("avx2" in cpu.flags) == (" avx2" in values.get("Flags", ""))


def test_a_folders_facts_are_the_systems(tmp_path: Path) -> None:
    its = look_at(str(tmp_path))
    told = subprocess.run(
        ["df", "-B1", "--output=fstype,source,target,size,avail", str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout.splitlines()[1].split()  # fmt: skip
    assert (its.mount_kind, its.mount_point, its.total_bytes) == (told[0], told[2], int(told[3]))
    assert its.free_bytes == pytest.approx(int(told[4]), abs=GIB)
    assert list(tmp_path.iterdir()) == []


def test_a_mount_is_found_through_odd_names(tmp_path: Path) -> None:
    """By device number where a line has it; else by the longest path; a space in a path is written \\040."""
    inside = tmp_path / "a b" / "c"
    inside.mkdir(parents=True)
    number = os.stat(inside).st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    spaced = str(tmp_path / "a b").replace(" ", "\\040")
    table = tmp_path / "mountinfo"
    table.write_text(
        f"1 0 0:77 / / rw - overlay none rw\n2 1 0:78 / {spaced} rw,noatime - btrfs /dev/x rw\n"
        "3 1 0:79 / /other rw - tmpfs tmpfs rw\n"
    )
    found = mount_of(str(inside), str(table))
    assert found is not None and (found.kind, found.source, found.point) == ("btrfs", "/dev/x", str(tmp_path / "a b"))
    table.write_text(table.read_text() + f"4 1 {device} / {tmp_path} rw - xfs /dev/y rw\n")
    found = mount_of(str(inside), str(table))
    assert found is not None and found.kind == "xfs"
    assert mount_of(str(inside), str(tmp_path / "missing")) is None


@pytest.mark.parametrize("version", [1, 2])
def test_a_control_groups_limit_is_told(tmp_path: Path, version: int) -> None:
    files = {
        "proc/meminfo": f"MemTotal: {16 * GIB // 1024} kB\nMemAvailable: {15 * GIB // 1024} kB\n",
        "proc/self/status": "CapEff:\t0000000000004000\n",
    }
    group = "sys/fs/cgroup/job" if version == 2 else "sys/fs/cgroup/memory/job"
    if version == 2:
        files |= {
            "proc/self/cgroup": "0::/job\n",
            "proc/self/mountinfo": "1 0 0:1 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
            f"{group}/memory.max": f"{4 * GIB}\n", f"{group}/memory.current": f"{GIB}\n",
        }  # fmt: skip
    else:
        files |= {
            "proc/self/cgroup": "3:memory:/job\n",
            "proc/self/mountinfo": "1 0 0:1 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
            f"{group}/memory.limit_in_bytes": f"{4 * GIB}\n", f"{group}/memory.usage_in_bytes": f"{GIB}\n",
        }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    memory = host_memory(tmp_path)
    assert (memory.group_limit_bytes, memory.group_used_bytes, memory.available_bytes) == (4 * GIB, GIB, 3 * GIB)
    assert memory.memlock_lifted  # bit 14
    assert "4.00 GiB" in findings.control_group(memory)[0].text and "3.00 GiB free" in findings.ram(memory).text


def test_a_card_and_its_link_on_the_bus(tmp_path: Path) -> None:
    address = "0000:3b:00.0"
    card = tmp_path / "sys/bus/pci/devices" / address
    card.mkdir(parents=True)
    for name, text in {
        "vendor": "0x10de", "class": "0x030200", "max_link_speed": "16.0 GT/s PCIe", "current_link_speed": "2.5 GT/s PCIe",
        "current_link_width": "8", "max_link_width": "16",
    }.items():  # fmt: skip
        (card / name).write_text(text + "\n")
    assert cards_on_bus(tmp_path) == 1 and driver(tmp_path) is None
    link, width, most = link_of(address, tmp_path)
    # 16e9 transfers a second and lane, 128 of 130 of which are bits of bytes
    assert link == pytest.approx(8 * 16e9 * 128 / 130 / 8, rel=1e-3) and (width, most) == (8, 16)
    assert link_of("0000:00:00.0", tmp_path) == (None, None, None)


# --- the hardware file -------------------------------------------------------------------------------------------------


def test_a_machine_comes_back_from_its_file() -> None:
    ours = Machine(
        "m", 1e12, GIB, 1e9, 2e9, 2 * GIB, 3e9, 4, (Drive(1e9, 2e9, 5), Drive(3e9, 1e9, 7)), shared_compute=True
    )
    for machine in (ours, *(load_machine(name) for name in shipped())):
        assert machine_of(json.loads(json.dumps(to_file(machine, "us"))), "file") == machine
    with pytest.raises(ConfigError, match="shared_compute='yes' is neither"):
        machine_of({**to_file(ours, "us"), "shared_compute": "yes"}, "file")


# --- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine but for its drives in some hundredths of a second."""
    monkeypatch.setattr(this_machine, "MEASURE_S", 0.01)
    monkeypatch.setattr(this_machine, "WIDTHS", {"cpu": (32, 128), "cuda": (32, 128)})
    monkeypatch.setattr(this_machine, "ADAM_ELEMENTS", 2**16)


def written_bytes() -> int:
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["write_bytes"])


def test_the_command_measures_and_the_planner_takes_it(quick, lent, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.delenv("FUYOU_NVME", raising=False)
    monkeypatch.setattr(measure, "BRIEF_S", 0.2)
    (lent / "a").mkdir()
    (lent / "b").mkdir()
    saved = tmp_path / "machine.json"
    before = written_bytes()
    arguments = ["doctor", "--nvme", str(lent / "a"), "--nvme", str(lent / "b"), "--nvme", str(tmp_path / "missing")]
    assert main([*arguments, "--save", str(saved), "--json"]) == 1
    moved = written_bytes() - before
    found = json.loads(capsys.readouterr().out)
    first, second, missing = found["facts"]["folders"]
    assert found["status"] == "problem" and "does not exist" in missing["problem"]
    assert [each["subject"] for each in found["findings"] if each["status"] == "problem"] == [f"nvme {missing['path']}"]
    assert second["shares_with"] == first["path"] and second["read_bytes_per_s"] is None
    assert moved < GIB
    if first["mount_kind"] not in ("tmpfs", "ramfs"):
        assert 0 < first["mixed_bytes_per_s"] <= 2 * max(first["read_bytes_per_s"], first["write_bytes_per_s"])
        assert moved == pytest.approx(first["written_bytes"], rel=0.5)  # at least most of them, if the drive is slow
        machine = load_machine(str(saved))
        assert [each.capacity_bytes for each in machine.drives] == [int(0.95 * first["free_bytes"])]
        plan = ["plan", "--layers", "2", "--heads", "2", "--hidden", "64", "--batch", "1", "--sequence", "8"]
        assert main([*plan, "--hardware", str(saved), "--json"]) == 0
        planned = json.loads(capsys.readouterr().out)
        assert planned["fits"] and planned["machine"] == "this machine"
    assert sorted(lent.rglob("*")) == [lent / "a", lent / "b"] and list(tmp_path.iterdir()) == [saved]


def test_without_a_folder(quick, capsys, monkeypatch) -> None:
    monkeypatch.delenv("FUYOU_NVME", raising=False)
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "no folder given" in shown and "Traceback" not in shown
    assert all(len(line) <= 120 and line[:9].strip() in ("", "ok", "warning") for line in shown.splitlines())


def test_bad_arguments_are_refused_before_anything_is_measured(tmp_path, capsys) -> None:
    (tmp_path / "other").write_text("mine")
    for arguments, reason in (
        (["--nvme", str(tmp_path), "--nvme", f"{tmp_path}/."], "given twice"),
        (["--save", str(tmp_path)], "is a folder"),
        (["--save", str(tmp_path / "no" / "file")], "does not exist"),
        (["--save", str(tmp_path / "other")], "another file already"),
    ):
        assert main(["doctor", *arguments]) == 2
        assert reason in capsys.readouterr().err
    assert (tmp_path / "other").read_text() == "mine"


def test_a_folder_in_memory_and_one_that_is_full_are_told(tmp_path) -> None:
    if os.path.ismount("/dev/shm"):
        its = measured(look_at("/dev/shm"))
        assert its.in_memory and its.not_measured and its.read_bytes_per_s is None
        assert findings.drive(its)[0].status == "warning" and "RAM" in findings.drive(its)[0].text
    full = measured(replace(look_at(str(tmp_path)), free_bytes=100 * MIB, in_memory=False))
    assert full.read_bytes_per_s is None and format_bytes(128 * MIB) in full.not_measured
    assert [each.status for each in findings.drive(replace(full, in_memory=False))].count("problem") == 1


INSIDE = """
    import ctypes, json, os, resource, struct, sys
    from fuyou.cli import main
    from fuyou.runtime import this_machine
    from fuyou.tiers.io import measure, open_engine
    this_machine.MEASURE_S, this_machine.ADAM_ELEMENTS = 0.01, 2**16
    this_machine.WIDTHS = {"cpu": (32, 128), "cuda": (32, 128)}
    measure.BRIEF_S, measure.SCRATCH_BYTES = 0.1, 64 << 20
    folder = sys.argv[1]
    import contextlib, io
    def doctor(*arguments):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            status = main(["doctor", "--json", *arguments])
        found = json.loads(said.getvalue())
        assert [each["subject"] for each in found["findings"] if each["status"] == "problem"] == [] or status == 1
        return found["facts"], {each["subject"]: each for each in found["findings"]}
"""
ORDINARY = """
    if os.geteuid() == 0:
        doctor()  # what it needs is imported by now: a Python that is closed to others can still be used
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (8 << 20, 8 << 20))
        os.setgroups([]), os.setgid(65534), os.setuid(65534)
        assert ctypes.CDLL(None).prctl(4, 1, 0, 0, 0) == 0  # its own /proc is readable again
        sys.path_importer_cache.clear()
    else:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (8 << 20, resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]))
    closed = sys.argv[2]
    facts, found = doctor("--nvme", folder, "--nvme", closed)
    assert facts["memory"]["memlock_limit_bytes"] == 8 << 20 and not facts["memory"]["memlock_lifted"]
    assert facts["engine"]["buffers_registered"] is False and found["memlock"]["status"] == "warning"
    assert "8.00 MiB" in found["memlock"]["text"] and "ulimit -l" in found["memlock"]["cure"]
    assert found["io"]["status"] == "ok" and "not registered" in found["io"]["text"]
    assert found["nvme " + closed]["status"] == "problem" and "not writable" in found["nvme " + closed]["text"]
    assert facts["folders"][0]["read_bytes_per_s"] > 0 and os.listdir(folder) == []
"""
FILTER = """
    op = lambda code, jt, jf, k: struct.pack("=HBBI", code, jt, jf, k)
    code = op(0x20, 0, 0, 0) + op(0x15, 0, 1, 425) + op(0x06, 0, 0, 0x00050000 | 1) + op(0x06, 0, 0, 0x7FFF0000)
    filters = ctypes.create_string_buffer(code)
    program = ctypes.create_string_buffer(struct.pack("@HP", 4, ctypes.addressof(filters)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0
    facts, found = doctor("--nvme", folder)
    assert (facts["engine"]["name"], facts["engine"]["seccomp_mode"]) == ("threads", 2), facts["engine"]
    assert found["io"]["status"] == "warning"
    assert "seccomp filter forbids it (Operation not permitted)" in found["io"]["text"], found["io"]
    assert "--security-opt" in found["io"]["cure"] and found["memlock"]["status"] == "ok"
    assert facts["folders"][0]["engine"] == "threads" and facts["folders"][0]["read_bytes_per_s"] > 0
    assert os.listdir(folder) == []
    print("OK")
"""


def test_an_ordinary_user_with_little_memlock_a_folder_of_somebody_else_and_then_no_io_uring(lent: Path) -> None:
    """A seccomp filter, as containers have it, takes io_uring away at the end."""
    if not os.path.exists("/proc/sys/kernel/seccomp"):
        pytest.skip("this kernel has no seccomp filters")
    open_or_skip("io_uring").close()
    if os.geteuid() != 0 and resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] < 8 * MIB:
        pytest.skip("the memlock limit cannot be raised to what the test expects")
    closed = lent / "closed"
    (lent / "open").mkdir()
    (lent / "open").chmod(0o777)
    closed.mkdir(mode=0o555)
    run_script(dedented(INSIDE, ORDINARY, FILTER), str(lent / "open"), str(closed))


def dedented(*parts: str) -> str:
    return "".join(textwrap.dedent(each) for each in parts)
