"""A process of its own that imports a model and exports it again under budgets, and prints what it held.

Arguments: folder of the model, nvme folder, output folder, ram in bytes. The device budget is the smallest that `wrap`
accepts: nothing is computed here, so whatever memory grows by is the import's and the export's. The run is left open: to
close it would give the weights back to memory.
"""

from __future__ import annotations

import json
import re
import sys
import time
import warnings
from pathlib import Path

import fuyou


def memory(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise ValueError(f"/proc/self/status has no {field}")
    return int(found[1]) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main(small: str, folder: str, nvme: str, out: str, ram: int) -> None:
    warnings.simplefilter("ignore")
    budgets = {"nvme": nvme, "device": "cpu", "config": fuyou.Config(update="step")}
    with fuyou.load_pretrained(small, ram="8MiB", gpu="128MiB", **budgets) as run:  # every module is imported, once
        run.save_pretrained(out)
    try:
        fuyou.load_pretrained(folder, ram=ram, gpu=1, **budgets)
        raise SystemExit("gpu=1 was accepted")
    except fuyou.BudgetError as error:
        gpu = error.needed_bytes
    baseline = memory("VmRSS")
    reset_peak()
    started = time.monotonic()
    run = fuyou.load_pretrained(folder, ram=ram, gpu=gpu, **budgets)
    imported_s, import_peak = time.monotonic() - started, memory("VmHWM")
    reset_peak()
    started = time.monotonic()
    run.save_pretrained(out, max_shard_size="600MB")
    exported_s, export_peak = time.monotonic() - started, memory("VmHWM")
    tiers = run.report().dict()["tiers"]
    print(json.dumps({
        "ram": ram, "gpu": gpu, "baseline_bytes": baseline,
        "import_growth_bytes": import_peak - baseline, "export_growth_bytes": export_peak - baseline,
        "imported_s": imported_s, "exported_s": exported_s, "tiers": tiers,
    }))  # fmt: skip
    sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:5], int(sys.argv[5]))
