"""Facts of what moves bytes and what updates: io_uring or what stands in for it, the extension, the AdamW kernels."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

from fuyou.core.errors import ConfigError, FuyouError
from fuyou.doctor.facts import Adam, IoEngine
from fuyou.doctor.host import read
from fuyou.swap.adam import load_kernels, native_problem
from fuyou.tiers.io import open_engine
from fuyou.tiers.pages import Pages

REGISTERED_BYTES = 64 << 20  # tried as a registered buffer: more than a limit of some MiB, little of a machine's memory


def io_engine(root: Path = Path("/")) -> IoEngine:
    loaded, uring_errno, reason, registered, note = _try_uring()
    name, problem = None, ""
    try:
        with open_engine() as engine:
            name = engine.name
    except ConfigError as error:
        problem = str(error)
    mode = re.search(r"^Seccomp:\s*(\d+)", read(root / "proc/self/status"), re.MULTILINE)
    switch = read(root / "proc/sys/kernel/io_uring_disabled").strip()
    return IoEngine(
        kernel=platform.release(),
        name=name,
        problem=problem,
        uring_errno=uring_errno,
        uring_reason=reason,
        uring_disabled=int(switch) if switch.isdigit() else None,
        seccomp_mode=int(mode[1]) if mode else None,
        buffers_registered=registered,
        registration_note=note,
        extension_loaded=loaded,
    )


def _try_uring() -> tuple[bool, int | None, str, bool | None, str]:
    """(whether the extension loads, errno and reason of io_uring's refusal, whether buffers register, why not)."""
    try:
        from fuyou.tiers.io.native import NativeEngine

        engine = NativeEngine("io_uring")
    except ImportError as error:
        return False, None, str(error), None, ""
    except OSError as error:
        return True, error.errno, os.strerror(error.errno) if error.errno else str(error), None, ""
    with engine:
        pages = Pages(REGISTERED_BYTES)
        try:
            registered = engine.register(pages.address, REGISTERED_BYTES)
            return True, None, "", registered, "" if registered else engine.registration_note
        except (OSError, FuyouError) as error:
            return True, None, "", False, str(error)


def adam(precision: str, bytes_per_s: float, bytes_per_parameter: int) -> Adam:
    kernels = load_kernels()
    path = ""
    if kernels.name == "native":
        import fuyou._native as native

        path = native.adam_paths()[0]
    return Adam(
        kernels.name, path, native_problem(), kernels.threads, precision, bytes_per_s, bytes_per_s / bytes_per_parameter
    )
