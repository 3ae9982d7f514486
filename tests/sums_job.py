"""A small model trained with everything kept, in a process of its own: prints what the system says beside what the report says.

Run by test_report_sums.py. Taken when the forward is done and all activations are held; bytes of the drives over two steps.
"""

import ctypes
import gc
import json
import os
import sys
from pathlib import Path

import torch
from bounded_job import Model, memory, train

import fuyou

OTHERS_BYTES = 256 * 2**20
WIDTH, LAYERS, VOCABULARY, ROWS, LENGTH = 512, 6, 64, 4, 256


def drive_bytes() -> tuple[int, int]:
    """(read, written) by this process at block devices, as the kernel counts them."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"]), int(lines["write_bytes"])


def trim() -> None:
    """Free pages of the heap are held by nobody."""
    ctypes.CDLL(None).malloc_trim(0)


def main(nvme: str) -> None:
    tiny = Model(64, 32, 1, 2)  # whatever is loaded on first use is no growth: fuyou's own threads and libraries too
    with fuyou.wrap(
        tiny, torch.optim.AdamW(tiny.parameters(), fused=True), nvme=nvme, ram="16MiB", gpu="96MiB", device="cpu"
    ) as run:
        train(tiny, run.optimizer, 64, 1)
        run.report()
    del tiny, run
    gc.collect()
    trim()
    baseline = memory("VmRSS")
    torch.manual_seed(0)
    model = Model(VOCABULARY, WIDTH, LAYERS, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    config = fuyou.Config(activations="keep", resume=False)
    with fuyou.wrap(model, optimizer, nvme=nvme, ram="128MiB", gpu="2GiB", device="cpu", config=config) as run:

        def forward() -> torch.Tensor:
            return model(torch.randint(0, VOCABULARY, (ROWS, LENGTH)))

        def step() -> None:
            forward().backward()
            run.optimizer.step()
            run.optimizer.zero_grad()

        step()
        run.settle()
        before, moved = drive_bytes(), run.report().dict()["drives"][0]
        step()
        step()
        run.settle()
        after, last = drive_bytes(), run.report().dict()["drives"][0]
        loss = forward()
        trim()
        growth = memory("VmRSS") - baseline
        report = run.report().dict()
        device = report["tiers"]["device"]["held_by_category"]
        files = [path for path in Path(nvme).rglob("*") if path.is_file()]
        facts = {
            "growth": growth,
            "tracked": report["process"]["committed_host_bytes"] + sum(device.values()),
            "activations": device["activations"],
            "files": sum(path.stat().st_size for path in files),
            "held_on_nvme": sum(report["tiers"]["nvme"]["held_by_category"].values()),
            "data_file": max(path.stat().st_size for path in files),
            "held_by_drive": last["held_bytes"],
            "system_io": [after[0] - before[0], after[1] - before[1]],
            "report_io": [last["read_bytes"] - moved["read_bytes"], last["write_bytes"] - moved["write_bytes"]],
        }  # fmt: skip
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        for _ in range(4):
            step()
        process = run.report().dict()["process"]
        others = torch.ones(OTHERS_BYTES // 4)  # the user's own, which nobody charged
        step()
        assert others[-1] == 1
        facts |= {"process": process, "others": OTHERS_BYTES, "process_with_others": run.report().dict()["process"]}
        print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    torch.set_num_threads(2)
    main(sys.argv[1])
