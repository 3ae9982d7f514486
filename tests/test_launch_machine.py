"""`fuyou launch` and its machine: threads, cores, and what control groups grant."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from control_groups import V1, V2, control_group, made
from launch_tools import GIB, SHOWS, launched, paragraph
from launch_tools import script as script

from fuyou.core.errors import ConfigError
from fuyou.core.limits import cpu_quota, killed_for_memory, read_memory
from fuyou.train.child import End
from fuyou.train.cores import choose_cores, cores_of_pci_device, format_cores, parse_cores, physical_cores
from fuyou.train.killed import explain

# --- threads and cores ---------------------------------------------------------------------------------------------


def test_threads_and_cores_are_chosen_said_and_left_alone_where_set(script):
    path = script(SHOWS)
    done = launched(path)
    shown = json.loads(done.stdout)
    threads = shown["environment"]["OMP_NUM_THREADS"]
    assert 1 <= int(threads) <= len(os.sched_getaffinity(0))
    assert shown["environment"] == {
        "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE",
    }  # fmt: skip
    assert f"{threads} compute thread" in paragraph(done)

    own = {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "ACTIVE"}
    done = launched(path, env=own)
    assert json.loads(done.stdout)["environment"] == own
    assert "OMP_NUM_THREADS=3 as you set it" in paragraph(done)

    core = max(os.sched_getaffinity(0))
    shown = json.loads(launched("--threads", "5", "--cores", str(core), path, env=own).stdout)
    assert shown["environment"]["OMP_NUM_THREADS"] == shown["environment"]["MKL_NUM_THREADS"] == "5"
    assert shown["cores"] == [core]


def test_lists_of_cores():
    allowed = frozenset(range(12))
    assert parse_cores("0-3, 8,5-5", allowed) == {0, 1, 2, 3, 5, 8}
    for text in ("", "a", "3-1", "-1", "1-", "0,,1", "0-3-5"):
        with pytest.raises(ConfigError, match="is not a list of cores"):
            parse_cores(text, allowed)
    with pytest.raises(ConfigError, match=r"names core 12, .* its cores are 0-11"):
        parse_cores("3,9-12", allowed)
    for cores in ({0}, {0, 1, 2}, {0, 2, 3, 9}, set(range(64)) - {7}):
        assert parse_cores(format_cores(frozenset(cores)), frozenset(range(64))) == cores
    assert format_cores(frozenset({0, 1, 2, 5, 7, 8})) == "0-2,5,7-8"


def two_nodes(root: Path) -> Path:
    """A machine of two NUMA nodes, 4 physical cores each with 2 threads, and a GPU at the second node."""
    files = {
        f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{n % 8},{n % 8 + 8}\n" for n in range(16)
    }
    for node in range(2):
        files[f"sys/devices/system/node/node{node}/cpulist"] = "\n"
    files["sys/bus/pci/devices/0000:3b:00.0/numa_node"] = "1\n"
    files["sys/bus/pci/devices/0000:3b:00.0/local_cpulist"] = "4-7,12-15\n"
    files["sys/bus/pci/devices/0000:01:00.0/numa_node"] = "-1\n"
    files["sys/bus/pci/devices/0000:01:00.0/local_cpulist"] = "0-15\n"
    return made(root, files)


def test_the_gpus_node_and_physical_cores(tmp_path):
    root = two_nodes(tmp_path)
    near = frozenset({4, 5, 6, 7, 12, 13, 14, 15})
    assert cores_of_pci_device("0000:3b:00.0", root) == near
    assert cores_of_pci_device("00000000:3B:00.0\n", root) == near  # as some drivers write it
    assert cores_of_pci_device("0000:01:00.0", root) is None  # it does not say
    assert cores_of_pci_device("0000:99:00.0", root) is None
    assert physical_cores(near, root) == 4 and physical_cores(frozenset({0, 1, 9}), root) == 2
    (root / "sys/devices/system/node/node1/cpulist").unlink()
    (root / "sys/devices/system/node/node1").rmdir()
    assert cores_of_pci_device("0000:3b:00.0", root) is None  # one node


def test_a_launch_binds_to_the_gpus_node(tmp_path, monkeypatch):
    root = two_nodes(tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr("fuyou.train.cores._cores_near_gpu", lambda *_: cores_of_pci_device("0000:3b:00.0", root))
    chosen = choose_cores(None, None, True, "cuda", {}, root)
    assert chosen.bound == {4, 5, 6, 7, 12, 13, 14, 15} and chosen.threads == 4
    assert "bound to cores 4-7,12-15" in chosen.words and "NUMA" in chosen.words
    chosen = choose_cores(None, None, False, "cuda", {}, root)
    assert chosen.bound is None and chosen.threads == 8
    assert choose_cores("0-1,8", None, True, "cuda", {}, root).bound == {0, 1, 8}
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})  # none of the node's: nothing is bound
    assert choose_cores(None, None, True, "cuda", {}, root).bound is None


# --- control groups ------------------------------------------------------------------------------------------------


def test_limits_of_control_groups_version_2(tmp_path):
    """Files made as the kernel writes them: this machine may have the other version."""
    root = made(tmp_path, V2)
    before = read_memory(root)
    group = before.tightest()
    assert (group.limit_bytes, group.used_bytes, group.peak_bytes, group.oom_kills) == (8 * GIB, 5 * GIB, 7 * GIB, 2)
    assert group.folder.endswith("user.slice") and before.total_bytes == 64 * GIB
    assert group.free_bytes == 5 * GIB and read_memory(root).groups[0].free_bytes is None  # a quarter of it: caches
    assert cpu_quota(root) == 3.5
    assert killed_for_memory(before, read_memory(root)) is False
    made(root, {"sys/fs/cgroup/user.slice/memory.events": "oom 2\noom_kill 3\n"})
    assert killed_for_memory(before, read_memory(root)).folder == group.folder
    made(root, {**V2, "proc/vmstat": "oom_kill 4\n"})
    assert killed_for_memory(before, read_memory(root)) is True


def test_limits_of_control_groups_version_1_in_a_container(tmp_path):
    root = made(tmp_path, V1)
    group = read_memory(root).tightest()
    assert group.free_bytes == 3 * GIB and group.cache_bytes == 2 * GIB  # of this group's own and of those below
    assert (group.limit_bytes, group.used_bytes, group.peak_bytes, group.oom_kills) == (4 * GIB, 3 * GIB, 4 * GIB, 0)
    assert cpu_quota(root) == 1.5
    chosen = choose_cores(None, None, True, "cpu", {}, root)
    assert chosen.threads == 1 and "grants 1.5 CPUs" in (
        chosen.words if len(os.sched_getaffinity(0)) > 1 else "grants 1.5 CPUs"
    )
    made(root, {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
    })  # fmt: skip
    assert read_memory(root).tightest() is None and cpu_quota(root) is None


def test_a_real_death_for_want_of_memory_names_group_and_limit(script):
    eats = script("held = []\nwhile True:\n    held.append(bytearray(2**20))\n")
    with control_group("memory", {"memory.max": str(200 * 2**20)}) as folder:
        inside = ["sh", "-c", f'echo $$ > "{folder}/cgroup.procs" && exec "$@"', "sh"]
        done = launched("--ram", "3GiB", eats, before=inside)
    said = paragraph(done)
    assert done.returncode == 137
    assert f"the kernel has counted the kill in the control group {folder}" in said
    assert f"The control group {folder} is limited to 200.00 MiB" in said and "ram=3GiB" in said
    held = float(re.search(r"It held ([\d.]+) MiB", said)[1])
    assert 100 < held <= 200


def test_a_worker_killed_for_memory_is_told_of_too(script):
    """The script itself lives on, and ends with a status of its own."""
    path = script("""
        import os, sys
        worker = os.fork()
        held = []
        while worker == 0:
            held.append(bytearray(2**20))
        _, status = os.waitpid(worker, 0)
        sys.exit(5 if os.WIFSIGNALED(status) else 0)
    """)
    with control_group("memory", {"memory.max": str(200 * 2**20)}) as folder:
        done = launched(path, before=["sh", "-c", f'echo $$ > "{folder}/cgroup.procs" && exec "$@"', "sh"])
    assert done.returncode == 5
    assert f"killed a process for memory in the control group {folder}" in paragraph(done)


def test_the_words_for_want_of_memory(tmp_path):
    """From files made as the kernel writes them, for machines where no real group can be made."""
    root = made(tmp_path, V2)
    before = read_memory(root)
    made(root, {"sys/fs/cgroup/user.slice/memory.events": "oom 2\noom_kill 3\n"})
    after, group = read_memory(root), f"{tmp_path}/sys/fs/cgroup/user.slice"
    said = explain(End(-9, 6 * GIB), before, after, {"FUYOU_RAM": "9GiB", "FUYOU_NVME": "/mnt"}, None)
    for words in (
        "SIGKILL (signal 9; exit status 137)", f"counted the kill in the control group {group}", "It held 6.00 GiB",
        "ram=9GiB, gpu left to fuyou.wrap, nvme_limit left to fuyou.wrap, nvme=/mnt",
        f"{group} is limited to 8.00 GiB, 5.00 GiB in use now, 7.00 GiB at its highest",
        "the machine has 64.00 GiB, 50.00 GiB of it free now", "lower --ram",
    ):  # fmt: skip
        assert words in said
    assert "Most likely" not in said and "\n" not in said
    assert "Most likely" in explain(End(-9, GIB), after, after, {}, None)
    assert explain(End(1, GIB), after, after, {}, None) == explain(End(0, GIB), before, after, {}, None) == ""
    assert "killed a process for memory" in explain(End(1, GIB), before, after, {}, None)
    assert "/dev/shm has 64.00 MiB, 60.00 MiB of it in use" in explain(
        End(-7, GIB), after, after, {}, (64 * 2**20, 4 * 2**20)
    )
    assert "there is no /dev/shm here" in explain(End(-7, GIB), after, after, {}, None)


def test_a_real_quota_sets_the_threads(script):
    with control_group("cpu", {"cpu.max": "100000 100000", "cpu.cfs_quota_us": "100000"}) as folder:
        inside = ["sh", "-c", f'echo $$ > "{folder}/cgroup.procs" && exec "$@"', "sh"]
        done = launched(script(SHOWS), before=inside)
    assert json.loads(done.stdout)["environment"]["OMP_NUM_THREADS"] == "1"
