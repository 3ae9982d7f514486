"""A machine as numbers, read from a hardware file: what the cost model needs to know of it, and nothing else.

[Note: hardware file] A JSON object. A figure is a number, a size such as "24GiB" where it counts bytes, or
{"value": …, "source": "where it is from"}; every figure of the shipped files has a source. `fuyou/plan/hardware/` holds
those of common machines; another machine is a file of the same keys:

| key | unit | what |
|---|---|---|
| name, description | text | what a person calls it |
| flops_per_s | 1/s | of matrix products on one GPU, sustained, in the training dtype |
| device_bytes | bytes | memory of one GPU |
| host_to_device_bytes_per_s, device_to_host_bytes_per_s | bytes/s | of one GPU's link, each way |
| host_bytes | bytes | host memory |
| dram_bytes_per_s | bytes/s | of host memory, read and written together, by CPU Adam on all its threads |
| cores | 1 | physical cores |
| array_bytes_per_s | bytes/s | most that all drives move together, reads and writes at once; left out: the sum of the drives |
| tail_s | s | of every step that nothing hides |
| shared_compute | true or false | no GPU: compute, copies and Adam take turns on the cores, and device and host are one memory |
| drives | list | of objects with count, read_bytes_per_s, write_bytes_per_s, capacity_bytes, endurance_bytes (written) |
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fuyou.core.config import nearest
from fuyou.core.errors import ConfigError
from fuyou.core.sizes import parse_bytes, shown

FOLDER = Path(__file__).parent / "hardware"
MOST = 1e30  # of any figure: beyond every machine, and far from where products of a few overflow
MOST_PIECES = 1 << 16  # drives of a kind, cores


@dataclass(frozen=True)
class Drive:
    """One NVMe drive, alone: bytes a second of sequential reads, and of writes; bytes held; bytes written in its life."""

    read_bytes_per_s: float
    write_bytes_per_s: float
    capacity_bytes: int
    endurance_bytes: float = math.inf  # vendors' TBW; infinite where nobody says


@dataclass(frozen=True)
class Machine:
    """Rates and sizes; see [Note: hardware file] for each. The rates of device and links are of one GPU, `gpu_count` of
    which do the same work on other rows; host memory, Adam and drives are shared by all.

    `shared_compute`: there is no GPU, and compute, Adam and copies take turns on the cores.
    """

    name: str
    flops_per_s: float
    device_bytes: int
    host_to_device_bytes_per_s: float
    device_to_host_bytes_per_s: float
    host_bytes: int
    dram_bytes_per_s: float
    cores: int
    drives: tuple[Drive, ...] = ()
    array_bytes_per_s: float = math.inf
    tail_s: float = 0.0
    gpu_count: int = 1
    shared_compute: bool = False
    description: str = ""

    @property
    def nvme_bytes(self) -> int:
        return sum(each.capacity_bytes for each in self.drives)

    @property
    def endurance_bytes(self) -> float:
        """Bytes that may be written until the first drive has reached its own limit, striped by capacity's share."""
        shares = self._write_shares()
        return min(
            (each.endurance_bytes / share for each, share in zip(self.drives, shares, strict=True)), default=math.inf
        )

    @property
    def read_bytes_per_s(self) -> float:
        """Of all drives together, when nothing is written."""
        return min(sum(each.read_bytes_per_s for each in self.drives), self.array_bytes_per_s)

    @property
    def write_bytes_per_s(self) -> float:
        return min(sum(each.write_bytes_per_s for each in self.drives), self.array_bytes_per_s)

    def nvme_s(self, read_bytes: float, write_bytes: float) -> float:
        """Seconds for both: a drive that reads does not write (seconds add up), and the array's cap is for the sum.
        Infinite where there is no drive and something to move."""
        if read_bytes + write_bytes == 0:
            return 0.0
        if not self.drives:
            return math.inf
        reads = sum(each.read_bytes_per_s for each in self.drives)
        writes = sum(each.write_bytes_per_s for each in self.drives)
        return max(read_bytes / reads + write_bytes / writes, (read_bytes + write_bytes) / self.array_bytes_per_s)

    def with_drives(self, count: int) -> Machine:
        """The same machine with `count` of its first kind of drive; its array's cap stays what it is. ConfigError where
        it has no drive to take after."""
        if count and not self.drives:
            raise ConfigError(f"{self.name} has no drive, so that {count} of its drives cannot be planned with.")
        return replace(self, drives=(self.drives[0],) * count if count else ())

    def _write_shares(self) -> list[float]:
        total = sum(each.write_bytes_per_s for each in self.drives)
        return [each.write_bytes_per_s / total for each in self.drives]


_TEXTS = ("name", "description", "comment")
_SIZES = ("device_bytes", "host_bytes")
_RATES = ("flops_per_s", "host_to_device_bytes_per_s", "device_to_host_bytes_per_s", "dram_bytes_per_s")
_OPTIONAL = ("array_bytes_per_s", "tail_s")
_KNOWN = (*_TEXTS, *_RATES, *_SIZES, "cores", *_OPTIONAL, "shared_compute", "drives")
_DRIVE = ("model", "count", "read_bytes_per_s", "write_bytes_per_s", "capacity_bytes", "endurance_bytes")


def shipped() -> list[str]:
    """The names of the hardware files that come with fuyou."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load_machine(name_or_path: str) -> Machine:
    """The machine of a shipped name, or of a file. ConfigError, naming the file, for anything that is not right in it."""
    path = FOLDER / f"{name_or_path}.json" if name_or_path in shipped() else Path(name_or_path)
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(
            f"Hardware file {name_or_path} cannot be read ({reason}), and is none of the names that come with "
            f"fuyou{nearest(name_or_path, shipped())}"
        ) from None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"Hardware file {name_or_path} is not JSON: {error}.") from None
    return machine_of(values, str(name_or_path))


def machine_of(values: Any, file: str) -> Machine:
    """The machine that a hardware file's content describes; ConfigError naming `file` and the key."""
    _check_keys(values, _KNOWN, (*_RATES, *_SIZES, "cores"), f"Hardware file {file}")
    rates: dict[str, Any] = {key: _figure(values, key, file) for key in _RATES}
    drives = [each for index, item in enumerate(_list(values, file)) for each in _drives(item, index, file)]
    optional: dict[str, Any] = {
        key: _figure(values, key, file, or_zero=key == "tail_s") for key in _OPTIONAL if key in values
    }
    return Machine(
        name=_text(values, "name", file) or Path(file).stem,
        description=_text(values, "description", file),
        device_bytes=_size(values, "device_bytes", file),
        host_bytes=_size(values, "host_bytes", file),
        cores=_whole(values, "cores", file),
        shared_compute=_truth(values, "shared_compute", file),
        drives=tuple(drives),
        **rates,
        **optional,
    )


def to_file(machine: Machine, source: str) -> dict[str, Any]:
    """What a hardware file of one GPU's `machine` says, each figure with `source`: `machine_of` makes the same of it."""

    def figure(value: float) -> dict[str, Any]:
        return {"value": value, "source": source}

    values: dict[str, Any] = {"name": machine.name, "description": machine.description}
    values |= {key: figure(getattr(machine, key)) for key in (*_RATES, *_SIZES, "cores")}
    values |= {key: figure(getattr(machine, key)) for key in _OPTIONAL if 0 < getattr(machine, key) < math.inf}
    values["shared_compute"] = machine.shared_compute
    values["drives"] = [
        {key: figure(getattr(drive, key)) for key in _DRIVE[2:] if getattr(drive, key) < math.inf}
        for drive in machine.drives
    ]
    return values


def _drives(values: Any, index: int, file: str) -> list[Drive]:
    where = f"{file}, drives[{index}]"
    required = ("read_bytes_per_s", "write_bytes_per_s", "capacity_bytes")
    _check_keys(values, _DRIVE, required, f"Hardware file {where}")
    endurance = _size(values, "endurance_bytes", where) if "endurance_bytes" in values else math.inf
    drive = Drive(
        _figure(values, "read_bytes_per_s", where),
        _figure(values, "write_bytes_per_s", where),
        _size(values, "capacity_bytes", where),
        endurance,
    )
    return [drive] * (_whole(values, "count", where) if "count" in values else 1)


def _check_keys(values: Any, known: tuple[str, ...], required: tuple[str, ...], what: str) -> None:
    if not isinstance(values, dict):
        raise ConfigError(f"{what} holds {type(values).__name__}, not an object of figures.")
    for key in values:
        if key not in known:
            raise ConfigError(f"{what} has the key {key!r}, which means nothing{nearest(key, known)}")
    missing = [key for key in required if key not in values]
    if missing:
        raise ConfigError(f"{what} lacks {', '.join(missing)}: each is a number, see the shipped files.")


def _raw(values: Mapping[str, Any], key: str, file: str) -> Any:
    """A figure without its source."""
    value = values[key]
    if not isinstance(value, dict):
        return value
    if set(value) - {"value", "source"} or "value" not in value:
        raise ConfigError(
            f'Hardware file {file}: {key} is an object with {", ".join(value) or "nothing"}: it takes "value" and "source".'
        )
    return value["value"]


def _figure(values: Mapping[str, Any], key: str, file: str, or_zero: bool = False) -> float:
    value = _raw(values, key, file)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < MOST:
        raise ConfigError(f"Hardware file {file}: {key}={shown(value)} is not a number.")
    if value < 0 or (value == 0 and not or_zero):
        raise ConfigError(
            f"Hardware file {file}: {key}={shown(value)} must be {'at least' if or_zero else 'more than'} 0."
        )
    return float(value)


def _size(values: Mapping[str, Any], key: str, file: str) -> int:
    value = _raw(values, key, file)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return parse_bytes(value, f"Hardware file {file}: {key}")


def _whole(values: Mapping[str, Any], key: str, file: str) -> int:
    value = _raw(values, key, file)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_PIECES:
        raise ConfigError(f"Hardware file {file}: {key}={shown(value)} must be a whole number from 1 to {MOST_PIECES}.")
    return value


def _truth(values: Mapping[str, Any], key: str, file: str) -> bool:
    value = values.get(key, False)
    if not isinstance(value, bool):
        raise ConfigError(f"Hardware file {file}: {key}={shown(value)} is neither true nor false.")
    return value


def _text(values: Mapping[str, Any], key: str, file: str) -> str:
    value = values.get(key, "")
    if not isinstance(value, str):
        raise ConfigError(f"Hardware file {file}: {key}={shown(value)} is not text.")
    return value


def _list(values: Mapping[str, Any], file: str) -> list[Any]:
    found = values.get("drives", [])
    if not isinstance(found, list):
        raise ConfigError(f"Hardware file {file}: drives is {type(found).__name__}, not a list.")
    return found
