"""What a step's extents hold, by the names of the parameters: written beside the step, and read back in any layout."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fuyou.core.errors import ConfigError, StoreError
from fuyou.swap.unit import Chunk, Unit
from fuyou.tiers.saved import Saved

KINDS = ("weights", "optimizer")
FIELDS = {"weights": None, "exp_avg": 0, "exp_avg_sq": 4, "low": 8}  # bytes an element before it in a chunk's state
MOST_ELEMENTS = 1 << 48
MOST_EXTENTS = 1 << 20  # of all units: a record of as many takes 20 MiB, in every step


@dataclass(frozen=True)
class SavedUnit:
    """A unit as a step has it: `members` by name → (shape, start in elements); `extents[kind]` by chunk number."""

    dtype: str
    elements: int
    members: dict[str, tuple[tuple[int, ...], int]]
    extents: dict[str, dict[int, int]]


@dataclass(frozen=True)
class Manifest:
    """`tied`: every other name of a parameter → its first; `groups`: names by the optimizer's groups, in their order."""

    chunk_elements: int
    units: tuple[SavedUnit, ...]
    tied: dict[str, str]
    groups: tuple[tuple[str, ...], ...]

    def encode(self) -> bytes:
        units = [
            {
                "dtype": unit.dtype,
                "elements": unit.elements,
                "members": [[name, list(shape), start] for name, (shape, start) in unit.members.items()],
                **{kind: _runs(unit.extents[kind]) for kind in KINDS},
            }
            for unit in self.units
        ]
        text = {"chunk_elements": self.chunk_elements, "units": units, "tied": self.tied, "groups": self.groups}
        return json.dumps(text, separators=(",", ":")).encode()

    def numbered(self, units: Sequence[Unit], index_of: Callable[[Chunk, str], int]) -> Manifest:
        """The same, of extents with other numbers."""
        numbers = _numbers(units, index_of)
        return replace(
            self, units=tuple(replace(unit, extents=its) for unit, its in zip(self.units, numbers, strict=True))
        )

    def names_in(self, unit: SavedUnit, number: int) -> list[str]:
        """The parameters with elements in a chunk."""
        first, last = number * self.chunk_elements, (number + 1) * self.chunk_elements
        return [
            name
            for name, (shape, start) in unit.members.items()
            if start < last and start + torch.Size(shape).numel() > first
        ]

    @property
    def names(self) -> list[str]:
        return [name for unit in self.units for name in unit.members]


def manifest_of(
    units: Sequence[Unit],
    chunk_elements: int,
    model: nn.Module,
    groups: Sequence[dict[str, Any]],
    index_of: Callable[[Chunk, str], int],
) -> Manifest:
    """Of a run; `index_of` gives the number of the extent that has a chunk's "weights" or "optimizer", -1 for none."""
    names = {id(member.parameter): member.name for unit in units for member in unit.members}
    saved = []
    for unit, found in zip(units, _numbers(units, index_of), strict=True):
        members = {member.name: (tuple(member.entry.shape), member.entry.start) for member in unit.members}
        saved.append(SavedUnit(_name(unit.dtype), unit.layout.count, members, found))
    tied = tied_names(model, names)
    in_groups = [tuple(names[id(each)] for each in group["params"] if id(each) in names) for group in groups]
    return Manifest(chunk_elements, tuple(saved), tied, tuple(in_groups))


def _numbers(units: Sequence[Unit], index_of: Callable[[Chunk, str], int]) -> list[dict[str, dict[int, int]]]:
    found = []
    for unit in units:
        its = {kind: {number: index_of(chunk, kind) for number, chunk in enumerate(unit.chunks)} for kind in KINDS}
        found.append({kind: {number: at for number, at in each.items() if at >= 0} for kind, each in its.items()})
    return found


def tied_names(model: nn.Module, names: Mapping[int, str]) -> dict[str, str]:
    """Every other name of a parameter → its first; `names` are those, by identity."""
    return {
        name: names[id(each)]
        for name, each in model.named_parameters(remove_duplicate=False)
        if id(each) in names and names[id(each)] != name
    }


def decode_manifest(text: bytes) -> Manifest:
    """StoreError for anything that `encode` does not write."""
    try:
        return _decode(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(
            f"What the step says of its tensors cannot be read ({type(error).__name__}: {error}): it was not written by fuyou."
        ) from error


def _decode(text: Any) -> Manifest:
    units = []
    extents = sum(_whole(count) for each in text["units"] for kind in KINDS for _, _, count in each[kind])
    if extents > MOST_EXTENTS:
        raise ValueError(f"{extents} extents")
    for each in text["units"]:
        elements = _whole(each["elements"])
        members = {}
        for name, shape, start in each["members"]:
            shape = tuple(_whole(size) for size in shape)
            if not isinstance(name, str) or _whole(start) + math.prod(shape) > elements:
                raise ValueError(f"the place of {name!r}")
            members[name] = (shape, start)
        if each["dtype"] not in ("float32", "bfloat16"):
            raise ValueError(f"dtype {each['dtype']!r}")
        units.append(SavedUnit(each["dtype"], elements, members, {kind: _from_runs(each[kind]) for kind in KINDS}))
    chunk_elements, tied, groups = _whole(text["chunk_elements"]), text["tied"], text["groups"]
    if chunk_elements < 1 or not all(isinstance(each, str) for pair in tied.items() for each in pair):
        raise ValueError("chunks or tied names")
    groups = tuple(tuple(group) for group in groups)
    if not all(isinstance(name, str) for group in groups for name in group):
        raise ValueError("groups")
    return Manifest(chunk_elements, tuple(units), dict(tied), groups)


class SavedTensors:
    """The parameters and their state as a step has them, read by name and elements, whatever its layout was."""

    def __init__(self, saved: Saved, manifest: Manifest) -> None:
        self._saved = saved
        self._chunk_elements = manifest.chunk_elements
        self._places = {
            name: (unit, *place) for unit in manifest.units for name, place in unit.members.items()
        }  # (unit, shape, start)

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16 if self._places[name][0].dtype == "bfloat16" else torch.float32

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name][1]

    def has_state(self, name: str) -> bool:
        """Somewhere its state was written; elsewhere it is zeros."""
        unit, shape, start = self._places[name]
        return any(
            number in unit.extents["optimizer"] and self._saved.has(unit.extents["optimizer"][number])
            for number, _, _ in self._pieces(start, start + torch.Size(shape).numel())
        )

    def read(self, name: str, field: str, first: int, last: int, target: memoryview) -> None:
        """Elements [first, last) of a parameter's "weights", "exp_avg", "exp_avg_sq" or "low", as bytes. State that was
        never written is zeros."""
        unit, _, start = self._places[name]
        kind = "weights" if field == "weights" else "optimizer"
        itemsize = {"weights": 2 if unit.dtype == "bfloat16" else 4, "low": 2}.get(field, 4)
        done = 0
        for number, begin, end in self._pieces(start + first, start + last):
            chunk = number * self._chunk_elements
            count = min(self._chunk_elements, unit.elements - chunk)
            at = (FIELDS[field] or 0) * count + (begin - chunk) * itemsize
            part = target[done : done + (end - begin) * itemsize]
            done += part.nbytes
            extent = unit.extents[kind].get(number)
            if extent is not None and self._saved.has(extent):
                self._saved.read(extent, at, part)
            elif kind == "weights":
                raise StoreError(f"Step {self._saved.step} has no weights of {name}: it was not written by fuyou.")
            else:
                part[:] = bytes(part.nbytes)

    def _pieces(self, first: int, last: int) -> list[tuple[int, int, int]]:
        """(chunk number, first, past-the-last element of the unit) of a range of its elements."""
        step, found = self._chunk_elements, []
        while first < last:
            end = min(last, (first // step + 1) * step)
            found.append((first // step, first, end))
            first = end
        return found


def refuse_other_model(
    manifest: Manifest, mine: Mapping[str, tuple[tuple[int, ...], torch.dtype]], tied: dict[str, str], step: int
) -> None:
    """ConfigError, with names, where the step is of another model than `mine` (name → shape, dtype), or precision."""
    theirs = {name: (unit.dtype, *place) for unit in manifest.units for name, place in unit.members.items()}
    what = f"Step {step} is of another model than the one that was wrapped"
    cure = "wrap the model that it was saved from, or begin anew with Config(resume=False)."
    missing, extra = [name for name in theirs if name not in mine], [name for name in mine if name not in theirs]
    if missing or extra:
        told = [f"it has {_shown(missing)}"] if missing else []
        told += [f"it lacks {_shown(extra)}"] if extra else []
        raise ConfigError(f"{what}: {' and '.join(told)}; {cure}")
    for name, (_, shape, _) in theirs.items():
        if shape != mine[name][0]:
            raise ConfigError(f"{what}: {name} is {shape} there and {mine[name][0]} here; {cure}")
    if tied != manifest.tied:
        other = [name for name in {*tied, *manifest.tied} if tied.get(name) != manifest.tied.get(name)]
        raise ConfigError(f"{what}: {_shown(sorted(other))} are not tied in the same way; {cure}")
    for name, (dtype, _, _) in theirs.items():
        if dtype != _name(mine[name][1]):
            raise ConfigError(
                f"Step {step} was trained with {name} in {dtype}, and this run has {_name(mine[name][1])}: a run goes on in "
                "the precision that it began in (Config(precision=...), or the parameters' dtype)."
            )


def refuse_without_homes(tensors: SavedTensors, frozen: Sequence[str], step: int) -> None:
    """ConfigError where the step has optimizer state of parameters that are frozen now, which would be lost."""
    lost = [name for name in frozen if tensors.has_state(name)]
    if lost:
        raise ConfigError(
            f"Step {step} has optimizer state of {_shown(lost)}, which this run does not train: give them to the optimizer "
            "with requires_grad=True before fuyou.wrap."
        )


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _runs(numbers: dict[int, int]) -> list[list[int]]:
    """{chunk: extent} as [first chunk, first extent, count], which is one entry for all that was planned together."""
    runs: list[list[int]] = []
    for chunk, extent in sorted(numbers.items()):
        if runs and chunk == runs[-1][0] + runs[-1][2] and extent == runs[-1][1] + runs[-1][2]:
            runs[-1][2] += 1
        else:
            runs.append([chunk, extent, 1])
    return runs


def _from_runs(runs: Any) -> dict[int, int]:
    found: dict[int, int] = {}
    for chunk, extent, count in runs:
        for offset in range(count):
            found[_whole(chunk) + offset] = _whole(extent) + offset
    return found


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < MOST_ELEMENTS:
        raise ValueError(f"{value!r} is no size")
    return value
