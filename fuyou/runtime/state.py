"""`optimizer.state`: a parameter's state as a mapping of handles, and what is put into it or taken out."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import torch

from fuyou.core.errors import ConfigError, StateError
from fuyou.core.sizes import format_bytes
from fuyou.runtime.measure import free_host_bytes
from fuyou.runtime.state_handle import Record, StateHandle
from fuyou.swap.optimizer_state import StateAccess
from fuyou.swap.unit import Member

if TYPE_CHECKING:
    from fuyou.runtime.schedule import Schedule

_MOMENTS = ("exp_avg", "exp_avg_sq")


def kinds_of(member: Member) -> tuple[str, ...]:
    return ("step", *_MOMENTS, "master") if member.unit.split else ("step", *_MOMENTS)


class ParameterState(dict):
    """One parameter's {"step", "exp_avg", "exp_avg_sq", and in bf16 "master"}: what is assigned is written home.

    Made without a home (by clients that map over containers) it is an ordinary dict.
    """

    def __init__(self, values: Any = (), home: tuple[StateView, Member] | None = None) -> None:
        super().__init__(values)
        self._home = home

    def __setitem__(self, kind: str, value: Any) -> None:
        if self._home is not None:
            state, member = self._home
            state.put(member, {kind: value}, whole=False)
            value = StateHandle(state.record(member, kind))
        super().__setitem__(kind, value)

    def update(self, *args: Any, **kwargs: Any) -> None:
        for kind, value in dict(*args, **kwargs).items():
            self[kind] = value

    def __ior__(self, other: Any) -> ParameterState:  # type: ignore[misc]
        self.update(other)
        return self

    def setdefault(self, kind: str, default: Any = None) -> Any:
        if kind not in self:
            self[kind] = default
        return self[kind]

    def __delitem__(self, kind: str) -> None:
        self._refuse_removal()
        super().__delitem__(kind)

    def pop(self, *args: Any) -> Any:
        self._refuse_removal()
        return super().pop(*args)

    def popitem(self) -> Any:
        self._refuse_removal()
        return super().popitem()

    def clear(self) -> None:
        """As in plain PyTorch, the parameter's next step starts anew."""
        if self._home is not None:
            state, member = self._home
            state.reset(member)
        super().clear()

    def _refuse_removal(self) -> None:
        if self._home is not None:
            raise StateError(
                f"The state of {self._home[1].name} is whole or not there: del run.optimizer.state[parameter] removes it."
            )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (dict(self),)


class StateView(MutableMapping):
    """`optimizer.state`: parameter → ParameterState, of handles. What is put in or taken out, is at home."""

    def __init__(
        self,
        members: dict[int, Member],
        access: StateAccess,
        schedule: Schedule,
        member_of: Callable[[torch.Tensor], Member],
        guard: Callable[[], None],
    ) -> None:
        """`member_of` gives a parameter's member with a home for its state, or raises for a stranger."""
        self._members = members
        self._access = access
        self._schedule = schedule
        self._member_of = member_of
        self._guard = guard
        self._begun: set[Member] = set()  # have state, though they are at step 0: it was put there
        self._changes: dict[Member, int] = {}
        self._records: weakref.WeakValueDictionary[tuple[Member, str], Record] = weakref.WeakValueDictionary()
        self._copies: weakref.WeakSet[Record] = weakref.WeakSet()

    # The mapping -----------------------------------------------------------------------------------------------------

    def __getitem__(self, parameter: torch.Tensor) -> ParameterState:
        self._guard()
        member = self._members.get(id(parameter))
        if member is None:
            return ParameterState()
        kinds = kinds_of(member) if self._has(member) else ()  # as torch's: state begins with the first step
        return ParameterState({kind: StateHandle(self.record(member, kind)) for kind in kinds}, (self, member))

    def get(self, parameter: torch.Tensor, default: Any = None) -> Any:
        return self[parameter] if parameter in self else default

    def __setitem__(self, parameter: torch.Tensor, values: Mapping[str, Any]) -> None:
        self.load([(parameter, values)])

    def __delitem__(self, parameter: torch.Tensor) -> None:
        if parameter not in self:
            raise KeyError(parameter)
        self.reset(self._members[id(parameter)])

    def clear(self) -> None:
        for member in list(self._members.values()):
            self.reset(member)

    def __contains__(self, parameter: object) -> bool:
        member = self._members.get(id(parameter))
        return member is not None and self._has(member)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (member.parameter for member in self._members.values() if self._has(member))

    def __len__(self) -> int:
        return sum(self._has(member) for member in self._members.values())

    def _has(self, member: Member) -> bool:
        return member.step > 0 or member in self._begun

    # Reading and writing ---------------------------------------------------------------------------------------------

    def version(self, member: Member) -> tuple[int, int]:
        """Another one after every step and every change."""
        return member.step, self._changes.get(member, 0)

    def record(self, member: Member, kind: str) -> Record:
        found = self._records.get((member, kind))
        if found is None:
            found = self._records[member, kind] = Record(self, member, kind, torch.device("cpu"))
        return found

    def copy_record(self, record: Record, device: torch.device) -> Record:
        copy = Record(self, record.member, record.kind, device)
        copy.version = record.version if record.is_copy else copy.version
        self._copies.add(copy)
        return copy

    def read(self, member: Member, kind: str) -> torch.Tensor:
        self._guard()
        if kind == "master":
            self._schedule.settle_weights()  # a change made through a loan is part of it
        return self._read(member, kind)

    def _read(self, member: Member, kind: str) -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.tensor(float(member.step)) if kind == "step" else self._access.read(member, kind)

    def write(self, member: Member, values: Mapping[str, Any]) -> None:
        """Make `values` the state's: tensors of the right shapes, and a step count."""
        self._guard()
        tensors = {kind: value for kind, value in values.items() if kind != "step"}
        step = _count(values["step"], member) if "step" in values else member.step
        if tensors:
            self._schedule.replace_state(member, tensors, self._access)
        member.step = step
        self._begun.add(member)
        self._changes[member] = self._changes.get(member, 0) + 1

    def load(self, given: Iterable[tuple[torch.Tensor, Mapping[str, Any]]]) -> None:
        """Replace the state of parameters; nothing is written where one of them is refused. Empty: as before any step.

        A handle of the very state that it is loaded to is left alone: nothing is read or written.
        """
        self._guard()
        plan = []
        for parameter, values in given:
            if not values and parameter not in self:
                continue
            member = self._member_of(parameter)
            self._check(member, values, whole=True)
            plan.append((member, values))
        for member, values in plan:  # of each other too: a handle keeps the value of before its record is replaced
            if values:
                self.put(member, values, whole=True)
            else:
                self.reset(member)

    def put(self, member: Member, values: Mapping[str, Any], *, whole: bool) -> None:
        """Replace tensors of a parameter's state, of which handles that are held keep the value of before."""
        self._guard()
        self._check(member, values, whole=whole)
        foreign = self._foreign(member, values)
        if foreign:
            self._member_of(member.parameter)
            self._let_go(member, foreign)
            self.write(member, {
                kind: value.plain() if isinstance(value, StateHandle) else value for kind, value in foreign.items()
            })  # fmt: skip

    def begin(self, member: Member) -> None:
        """It has state from now on; what it is at home is what it is."""
        self._begun.add(member)

    def reset(self, member: Member) -> None:
        """No state, as before the first step. A master is the weight, and stays."""
        self._guard()
        if not self._has(member):
            return
        self._let_go(member, kinds_of(member))
        zero = torch.zeros(1).expand(member.entry.count).view(-1)
        self.write(member, {"exp_avg": zero, "exp_avg_sq": zero, "step": 0.0})
        self._begun.discard(member)

    def _foreign(self, member: Member, values: Mapping[str, Any]) -> dict[str, Any]:
        """What is not there already."""
        return {
            kind: value
            for kind, value in values.items()
            if kind in kinds_of(member)
            and not (isinstance(value, StateHandle) and not value.path and value.record.is_state_of(self, member, kind))
        }

    def _check(self, member: Member, values: Mapping[str, Any], *, whole: bool) -> None:
        missing = [kind for kind in ("step", *_MOMENTS) if kind not in values]
        if whole and values and missing:
            raise ConfigError(
                f"The state given for {member.name} has {', '.join(map(str, values)) or 'nothing'} and lacks "
                f"{', '.join(missing)}: it must be AdamW's or Adam's."
            )
        for kind, value in self._foreign(member, values).items() if whole else values.items():
            if kind == "step":
                _count(value, member)
            elif kind in kinds_of(member):
                shape = tuple(getattr(value, "shape", ()))
                if shape != tuple(member.entry.shape):
                    raise ConfigError(
                        f"load_state_dict: {kind} of {member.name} has shape {shape}, not {tuple(member.entry.shape)}."
                    )
            elif not whole:
                raise ConfigError(
                    f"{kind!r} was put into the optimizer's state of {member.name}, which holds {', '.join(kinds_of(member))} "
                    "only: keep it in a dict of your own."
                )

    # The end ---------------------------------------------------------------------------------------------------------

    def leave(self, member: Member) -> dict[str, torch.Tensor]:
        """A parameter's state as ordinary tensors, which handles that are held show from now on."""
        held = {kind: self._records.get((member, kind)) for kind in kinds_of(member)}
        state = {kind: self._read(member, kind) for kind in kinds_of(member) if kind != "master" or held[kind]}
        for kind, record in held.items():
            if record is not None:
                record.own = state[kind]
        return state

    def let_go(self) -> None:
        """All of it is about to be replaced: handles that somebody holds keep the value of before, and what was put there at
        step 0 counts no more."""
        for member in self._members.values():
            self._let_go(member, kinds_of(member))
        self._begun.clear()

    def close(self) -> None:
        """Handles that somebody still holds keep their last value, as far as free memory goes."""
        for record in [*self._records.values(), *self._copies]:
            self._keep(record)

    def _let_go(self, member: Member, kinds: Collection[str]) -> None:
        for kind in kinds:
            record = self._records.pop((member, kind), None)
            if record is not None:
                self._keep(record)
        for copy in list(self._copies):
            if copy.member is member and copy.kind in kinds:
                self._keep(copy)

    def _keep(self, record: Record) -> None:
        if record.own is not None or record.is_copy and record.version != self.version(record.member):
            return
        if record.nbytes > free_host_bytes() * 0.95:
            record.lost = (
                f"{record.kind} of {record.member.name} ({format_bytes(record.nbytes)}) was replaced, or its run closed, and "
                "it did not fit into free memory: clone() what you need of the optimizer's state before."
            )
            return
        value = self._read(record.member, record.kind)
        record.own = value.to(record.device) if record.is_copy else value


class StateAttribute:
    """`optimizer.state`, to which nothing is assigned in vain: `state = defaultdict(dict)` clears it."""

    def __get__(self, optimizer: Any, owner: type | None = None) -> Any:
        return self if optimizer is None else vars(optimizer).get("_state", {})

    def __set__(self, optimizer: Any, value: Mapping) -> None:
        had = vars(optimizer).get("_state")
        if had is None:
            if isinstance(value, StateView):  # else torch's own empty one, while the optimizer is being made
                vars(optimizer)["_state"] = value
        elif value is not had:
            given = {id(parameter): (parameter, values) for parameter, values in value.items()}
            others: list[tuple[torch.Tensor, Mapping]] = [
                (parameter, {}) for parameter in had if id(parameter) not in given
            ]
            had.load([*given.values(), *others])


def _count(value: Any, member: Member) -> int:
    count = float(value)
    if count < 0 or count != int(count):
        raise ConfigError(f"The step of {member.name} was set to {count}: it counts steps, 0 or more.")
    return int(count)
