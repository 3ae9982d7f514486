"""Control groups: real ones, and files as the kernel writes them for machines where none can be made."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

GIB = 2**30
V2 = {
    "proc/self/cgroup": "0::/user.slice/job.scope\n",
    "proc/self/mountinfo": "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n",
    "proc/meminfo": f"MemTotal:       {64 * 2**20} kB\nMemFree: 1 kB\nMemAvailable:   {50 * 2**20} kB\n",
    "proc/vmstat": "nr_free_pages 1\noom_kill 3\n",
    "sys/fs/cgroup/memory.stat": "",
    "sys/fs/cgroup/user.slice/memory.max": f"{8 * GIB}\n",
    "sys/fs/cgroup/user.slice/memory.current": f"{5 * GIB}\n",
    "sys/fs/cgroup/user.slice/memory.peak": f"{7 * GIB}\n",
    "sys/fs/cgroup/user.slice/memory.events": "low 0\nhigh 0\nmax 12\noom 1\noom_kill 2\noom_group_kill 0\n",
    "sys/fs/cgroup/user.slice/memory.stat": f"anon {3 * GIB}\nfile {2 * GIB}\ninactive_file {GIB}\nactive_file {GIB}\n",
    "sys/fs/cgroup/user.slice/cpu.max": "350000 100000\n",
    "sys/fs/cgroup/user.slice/job.scope/memory.max": "max\n",
    "sys/fs/cgroup/user.slice/job.scope/memory.current": f"{4 * GIB}\n",
    "sys/fs/cgroup/user.slice/job.scope/memory.events": "oom 0\noom_kill 0\n",
    "sys/fs/cgroup/user.slice/job.scope/cpu.max": "max 100000\n",
}
V1 = {
    "proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n",
    "proc/self/mountinfo": (  # a container's: its own group is the mount
        "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
        "36 31 0:33 /docker/abc /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct\n"
    ),
    "proc/meminfo": f"MemTotal:       {64 * 2**20} kB\nMemAvailable:   {50 * 2**20} kB\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{3 * GIB}\n",
    "sys/fs/cgroup/memory/memory.max_usage_in_bytes": f"{4 * GIB}\n",
    "sys/fs/cgroup/memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 0\n",
    "sys/fs/cgroup/memory/memory.stat": (
        f"cache 1\ninactive_file 5\nactive_file 6\ntotal_cache {2 * GIB}\ntotal_inactive_file {GIB}\ntotal_active_file {GIB}\n"
    ),
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "150000\n",
    "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
}


def made(root: Path, files: dict[str, str]) -> Path:
    """A folder with files as the kernel writes them."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@contextlib.contextmanager
def control_group(controller: str, files: dict[str, str]) -> Iterator[Path]:
    """A real control group of our own, of version 1 or 2; skips where this user may make none."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split()[:3]
        mount = Path(left.split()[4])
        if kind == "cgroup" and controller in options.split(","):
            break
        if kind == "cgroup2" and controller in (mount / "cgroup.subtree_control").read_text().split():
            break
    else:
        pytest.skip(f"no control group hierarchy with {controller} here: made-up files stand for it above")
    folder = mount / f"fuyou-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here ({error.strerror}): made-up files stand for it above")
    try:
        for name, value in files.items():
            for each in (name, {"memory.max": "memory.limit_in_bytes"}.get(name, name)):
                if (folder / each).exists():
                    (folder / each).write_text(value)
        yield folder
    finally:
        deadline = time.monotonic() + 10
        while folder.exists():
            try:
                folder.rmdir()
            except OSError:  # its last process is dying
                assert time.monotonic() < deadline
                time.sleep(0.05)
