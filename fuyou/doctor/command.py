"""`fuyou doctor`: gather, judge, print; and a hardware file of what was measured, for `fuyou plan --hardware`."""

from __future__ import annotations

import json
import platform
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fuyou.core.errors import ConfigError
from fuyou.doctor.drives import folders as look_at_folders
from fuyou.doctor.engines import adam, io_engine
from fuyou.doctor.facts import Facts, Folder
from fuyou.doctor.findings import Finding, findings, worst
from fuyou.doctor.gpus import gpus
from fuyou.doctor.host import host_memory, processor
from fuyou.plan.machine import Drive, Machine, to_file
from fuyou.runtime.this_machine import measure_rates
from fuyou.tiers.folders import FREE_SHARE
from fuyou.tiers.io.measure import taking_turns

OK, PROBLEM = 0, 1
PACKAGES = ("fuyou", "torch", "numpy", "transformers", "peft", "aiofiles")
ADAM_BYTES = {"fp32": 28, "bf16": 26}  # of host memory that the update of one parameter moves
WIDTH, STATUS_WIDTH = 120, 9


def doctor(folders: Sequence[str], as_json: bool, save: Path | None) -> int:
    """Print what was found; 1 where something of it is a problem. ConfigError for a folder that is given twice, and for a
    `save` that cannot be written, before anything is measured."""
    if save is not None:
        _check_file(save)
    facts, machine = examine(folders)
    found = findings(facts)
    if save is not None:
        _write(save, machine)
    print(json.dumps(to_dict(facts, found, machine), indent=2) if as_json else table(found))
    return PROBLEM if worst(found) == "problem" else OK


def examine(folders: Sequence[str]) -> tuple[Facts, Machine]:
    """All facts, and the machine that the planner would make of them; some seconds, and some more a drive."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    precision = "bf16" if cuda else "fp32"
    memory = host_memory()  # before we take some
    engine = io_engine()
    looked_at = look_at_folders(folders)
    machine = measure_rates(precision, device, [_drive(each) for each in looked_at if _measured(each)])
    cpu = processor()
    what = torch.cuda.get_device_name(device) if cuda else f"{cpu.model}, no GPU"
    machine = replace(machine, description=f"{what}; rates in {precision}")
    rates = (machine.host_to_device_bytes_per_s, machine.device_to_host_bytes_per_s)
    facts = Facts(
        processor=cpu,
        memory=memory,
        engine=engine,
        adam=adam(precision, machine.dram_bytes_per_s, ADAM_BYTES[precision]),
        gpus=gpus(rates if cuda else None),
        folders=looked_at,
        versions={"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        flops_per_s=machine.flops_per_s,
        copy_bytes_per_s=0.0 if cuda else rates[0],
    )
    return facts, machine


def to_dict(facts: Facts, found: Sequence[Finding], machine: Machine) -> dict[str, Any]:
    """JSON-able."""
    return {
        "status": worst(list(found)),
        "findings": [{**asdict(each), "subject": each.subject.strip()} for each in found],
        "facts": asdict(facts),
        "hardware": to_file(machine, _SOURCE),
    }


def table(found: Sequence[Finding]) -> str:
    width = min(24, max(len(each.subject) for each in found) + 2)
    lines = []
    for each in found:
        head = f"{each.status:<{STATUS_WIDTH}}{each.subject:<{width}}"
        if len(each.subject) >= width:  # a long path has a line of its own
            lines.append(head.rstrip())
            head = " " * (STATUS_WIDTH + width)
        for start, text in ((head, each.text), (" " * len(head), each.cure and f"cure: {each.cure}")):
            if text:
                lines.append(
                    textwrap.fill(
                        text, WIDTH, initial_indent=start, subsequent_indent=" " * (STATUS_WIDTH + width),
                        break_long_words=False, break_on_hyphens=False,
                    )
                )  # fmt: skip
    return "\n".join(lines)


# --- for the planner ----------------------------------------------------------------------------------------------

_SOURCE = "measured by fuyou doctor"


def _measured(folder: Folder) -> bool:
    return bool(folder.read_bytes_per_s and folder.write_bytes_per_s and folder.mixed_bytes_per_s and folder.free_bytes)


def _drive(its: Folder) -> Drive:
    """At the speeds of reading and writing at once, which is what a step does, with the room that a store may take."""
    read, write = taking_turns(its.read_bytes_per_s or 0, its.write_bytes_per_s or 0, its.mixed_bytes_per_s or 0)
    return Drive(read, write, int((its.free_bytes or 0) * FREE_SHARE))


def _check_file(path: Path) -> None:
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(f"--save {path} cannot be written: it is a folder, or in a folder that does not exist.")
    if path.exists() and path.stat().st_size and "flops_per_s" not in path.read_text("utf-8", "replace"):
        raise ConfigError(f"--save {path} is another file already: give a name of its own, as machine.json.")


def _write(path: Path, machine: Machine) -> None:
    try:
        path.write_text(json.dumps(to_file(machine, _SOURCE), indent=2) + "\n", "utf-8")
    except OSError as error:
        raise ConfigError(f"--save {path} cannot be written: {error.strerror}.") from None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
