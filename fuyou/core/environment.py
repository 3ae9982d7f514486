"""What `fuyou.wrap` takes from the environment where its call leaves it out; `fuyou launch` sets it.

| variable | stands for |
|---|---|
| FUYOU_NVME | nvme: a folder, or several with `:` between them |
| FUYOU_NVME_LIMIT, FUYOU_RAM, FUYOU_GPU | nvme_limit, ram, gpu: bytes, or sizes such as 48GiB |
| FUYOU_DEVICE | device: cuda, cuda:1, cpu |

An argument of the call wins. A variable that is empty counts as not set.
"""

from __future__ import annotations

import enum
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from fuyou.core.errors import ConfigError
from fuyou.core.sizes import parse_bytes

NVME, NVME_LIMIT, RAM, GPU, DEVICE = "FUYOU_NVME", "FUYOU_NVME_LIMIT", "FUYOU_RAM", "FUYOU_GPU", "FUYOU_DEVICE"


class LeftOut(enum.Enum):
    """The default of an argument for which None is a value: nvme=None keeps everything in host memory."""

    LEFT_OUT = enum.auto()

    def __repr__(self) -> str:
        return "<left out>"


LEFT_OUT = LeftOut.LEFT_OUT


class FromEnvironment(str):
    """A value whose repr says where it is from, for the error of whoever finds later that it cannot be."""

    variable: str

    def __repr__(self) -> str:
        return f"{super().__repr__()} (from {self.variable} in the environment)"


class Places(NamedTuple):
    """Arguments of `fuyou.wrap`; None means there what it means in the call."""

    nvme: Any  # a folder, a list of folders, or None
    nvme_limit: int | str | None
    ram: int | str | None
    gpu: int | str | None
    device: Any  # str, torch.device or None


def places(nvme: Any, nvme_limit: Any, ram: Any, gpu: Any, device: Any) -> Places:
    """Each argument as given; one left out (nvme: LEFT_OUT, the others: None) as the environment has it.

    ConfigError, naming the variable, for a value in the environment that is needed and means nothing.
    """
    return Places(
        nvme_folders() if nvme is LEFT_OUT else nvme,
        size(NVME_LIMIT) if nvme_limit is None else nvme_limit,
        size(RAM) if ram is None else ram,
        size(GPU) if gpu is None else gpu,
        device_name() if device is None else device,
    )


def nvme_folders(environment: Mapping[str, str] | None = None) -> list[str] | None:
    """The folders of FUYOU_NVME; None where it is not set."""
    text = _value(NVME, environment)
    if text is None:
        return None
    folders = text.split(os.pathsep)
    for folder in folders:
        if not os.path.isdir(folder):
            raise ConfigError(
                f"{NVME}={text!r} in the environment names {folder!r}, which is no folder: make it (mkdir -p), or name "
                f"existing folders with {os.pathsep!r} between them, or pass nvme= to fuyou.wrap."
            )
    return folders


def size(variable: str, environment: Mapping[str, str] | None = None) -> int | None:
    """Bytes; None where the variable is not set."""
    text = _value(variable, environment)
    return None if text is None else parse_bytes(text, f"The environment's {variable}")


def device_name(environment: Mapping[str, str] | None = None) -> str | None:
    text = _value(DEVICE, environment)
    if text is None:
        return None
    check_device_name(text, f"The environment's {DEVICE}")
    found = FromEnvironment(text)
    found.variable = DEVICE
    return found


def check_device_name(text: str, name: str) -> None:
    """Its form only: whether the machine has such a device is for `wrap` to find, which has torch."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise ConfigError(f"{name}={text!r} is no device: use cuda, cuda:1 or cpu.")


def _value(variable: str, environment: Mapping[str, str] | None) -> str | None:
    found = (os.environ if environment is None else environment).get(variable, "").strip()
    return found or None
