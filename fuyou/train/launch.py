"""`fuyou launch SCRIPT ARGS…`: the user's own script in a child Python, with budgets, folders and device as defaults for
its `fuyou.wrap` (through the environment: fuyou/core/environment.py), threads and cores chosen, and its end explained."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from fuyou.core import environment as variables
from fuyou.core.errors import ConfigError
from fuyou.core.limits import read_memory, shared_memory
from fuyou.core.sizes import parse_bytes
from fuyou.tiers.folders import check_folders
from fuyou.train.child import run_child
from fuyou.train.cores import THREAD_VARIABLES, Cores, choose_cores
from fuyou.train.killed import explain

_BUDGETS = (variables.NVME_LIMIT, variables.RAM, variables.GPU)


@dataclass(frozen=True)
class Launch:
    """The command line of `fuyou launch`; None is an option that was not given."""

    script: str  # a path, or with `module` a module's name
    arguments: Sequence[str] = ()
    module: bool = False
    nvme: Sequence[str] = ()
    nvme_limit: str | None = None
    ram: str | None = None
    gpu: str | None = None
    device: str | None = None
    threads: int | None = None
    cores: str | None = None
    bind: bool = True
    quiet: bool = False


def launch(wanted: Launch) -> int:
    """Run the script to its end; its exit status, or 128 + the signal that killed it. ConfigError and StoreError before
    it is started, for what cannot work."""
    if not wanted.module:
        _check_script(wanted.script)
    environment = dict(os.environ)
    _give_defaults(wanted, environment)
    cores = _give_threads(wanted, environment)
    command = [sys.executable, *(["-m"] if wanted.module else []), wanted.script, *wanted.arguments]
    if not wanted.quiet:
        _say(f"{_defaults_in_words(environment)}; {cores.words}")
    before = read_memory()
    end = run_child(command, environment, cores.bound)
    said = explain(end, before, read_memory(), environment, shared_memory())
    if said:
        _say(said)
    return end.exit_status


def _check_script(script: str) -> None:
    if not os.path.exists(script):
        raise ConfigError(
            f"The script {script} does not exist: give the path of a Python file, or -m and a module's name."
        )
    if not os.path.isfile(script):
        raise ConfigError(
            f"The script {script} is not a file: give the path of a Python file, or -m and a module's name."
        )
    if not os.access(script, os.R_OK):
        raise ConfigError(f"The script {script} cannot be read by this user: change its mode or owner.")


def _give_defaults(wanted: Launch, environment: dict[str, str]) -> None:
    """Options into the environment, checked; and what stands there already is checked as `wrap` would."""
    if wanted.nvme:
        for folder in wanted.nvme:
            if os.pathsep in folder or not folder.strip():
                raise ConfigError(
                    f"--nvme={folder!r} cannot be passed on: {variables.NVME} separates folders with {os.pathsep!r}. Use "
                    "another folder, or pass nvme= to fuyou.wrap in the script."
                )
        environment[variables.NVME] = os.pathsep.join(check_folders([os.path.expanduser(each) for each in wanted.nvme]))
    for variable, option, value in zip(
        _BUDGETS, ("--nvme-limit", "--ram", "--gpu"), (wanted.nvme_limit, wanted.ram, wanted.gpu), strict=True
    ):
        if value is not None:
            parse_bytes(value, option)
            environment[variable] = value
        variables.size(variable, environment)
    if wanted.device is not None:
        variables.check_device_name(wanted.device, "--device")
        environment[variables.DEVICE] = wanted.device
    variables.nvme_folders(environment)
    variables.device_name(environment)


def _give_threads(wanted: Launch, environment: dict[str, str]) -> Cores:
    """Threads and cores. What the user has set in the environment stays; an option wins over it."""
    if wanted.threads is not None and wanted.threads < 1:
        raise ConfigError(f"--threads={wanted.threads} must be at least 1.")
    device = variables.device_name(environment)
    cores = choose_cores(wanted.cores, wanted.threads, wanted.bind, device, environment)
    if cores.threads is not None:
        for name in THREAD_VARIABLES:
            environment[name] = str(cores.threads)
    # Compute threads that wait must sleep. By default they spin for milliseconds after each operation, on the cores that
    # reads, writes and the optimizer's update need at that very time: with more runnable threads than cores, training
    # was measured to be 3 to 10 times slower.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Threads are not bound one by one (OMP_PROC_BIND): OpenMP then binds the main thread to one core, and every thread
    # and process that it starts later, I/O and DataLoader workers, would inherit that one. The process is bound as a
    # whole instead, and the kernel places threads within.
    return cores


def _defaults_in_words(environment: dict[str, str]) -> str:
    given = [
        f"{name}={environment[variable]}"
        for name, variable in (
            ("nvme", variables.NVME),
            ("nvme_limit", variables.NVME_LIMIT),
            ("ram", variables.RAM),
            ("gpu", variables.GPU),
            ("device", variables.DEVICE),
        )
        if environment.get(variable)
    ]
    return f"defaults for fuyou.wrap: {', '.join(given)}" if given else "no defaults for fuyou.wrap"


def _say(text: str) -> None:
    print(f"fuyou launch: {text}", file=sys.stderr, flush=True)
