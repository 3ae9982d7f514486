"""Parameters away from their block: never a dangling storage, readable and writable as ever.

[Note: away] While a unit's weights are not in use, each of its parameters shows a NaN placeholder of its shape (an
expanded scalar: no bytes) and wears a subclass of its own class whose `__torch_function__` sees every use. Metadata
(shape, grad, hooks, zeros_like …) passes through. Any other use is given a copy of the bytes at home for the length of
the call, and an in-place change of it is written home. A use that records a graph (a weight read outside of its block, a
penalty on weights) saves that copy, so backward sees the values that forward saw.

A copy that somebody still refers to (`p.data`, `p.detach()`, a view, a graph) is a loan, charged to the device, and is
what every further use of the parameter is given: tied weights share memory in a `state_dict()`, and who holds `p.data`
sees what others do to it. Changes made to it are written home before the next forward, read or step; after a step it is
stale, as the README says, and the next use is given another. Of a model that is larger than the device's budget,
`p.detach()`, and so `state_dict()`, is a loan too, in a file mapped on the host, charged to the drives.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fuyou.core.errors import BudgetError, StateError
from fuyou.core.ledger import Ledger
from fuyou.core.metadata import attribute_of, converts_nothing, is_metadata
from fuyou.core.sizes import format_bytes
from fuyou.swap.activations import HookStack
from fuyou.swap.optimizer_state import StateAccess
from fuyou.swap.unit import Member, Unit
from fuyou.swap.weights import Swapper
from fuyou.tiers.mapped import let_go, mapped_tensor

SMALLEST_MAPPED_BYTES = 64 << 10  # a smaller loan is lent in memory: a file of its own costs more than it holds
_RAW = frozenset({"numpy", "__array__", "data_ptr", "untyped_storage", "storage", "_typed_storage", "__dlpack__"})


@dataclass(eq=False)
class _Loan:
    """A copy that a caller or a graph may still refer to."""

    member: Member
    value: torch.Tensor
    versions: tuple[int, int]
    raw: bool  # handed out in a way that no version counter sees
    tier: str = "device"  # or "nvme", of one that is mapped
    stale: bool = False  # an update has passed it by

    @property
    def referred_to(self) -> bool:
        return torch._C._storage_Use_Count(self.value.untyped_storage()._cdata) > _OWN_REFERENCES

    @property
    def changed(self) -> bool:
        return not self.stale and (self.raw or self.versions != self.now())

    @property
    def nbytes(self) -> int:
        return self.value.numel() * self.value.itemsize

    def now(self) -> tuple[int, int]:
        """Views made of the parameter share its version counter, detached ones share the copy's."""
        return self.value._version, self.member.parameter._version


class Away:
    """Binds parameters to their unit's storage and away from it, and answers for them while they are away."""

    def __init__(self, ledger: Ledger, hooks: HookStack, folders: Sequence[str]) -> None:
        self._ledger = ledger
        self._folders = folders  # the user's, for what is mapped
        self._hooks = hooks
        self._whole_bytes = 0  # of all weights
        self._members: dict[int, Member] = {}  # by id of the parameter, which the member keeps alive
        self._classes: dict[type, type] = {}
        self._loans: list[_Loan] = []  # of a parameter at most one that is not stale
        self._closed = ""
        ledger.relievers.append(self._relieve)

    def start(self, swapper: Swapper, access: StateAccess) -> None:
        self._swapper = swapper
        self._access = access

    def adopt(self, unit: Unit) -> None:
        """The unit's parameters go away; their own memory is freed."""
        for member in unit.members:
            self._members[id(member.parameter)] = member
            self._whole_bytes += member.entry.count * unit.dtype.itemsize
            self._send(member)

    def member_of(self, parameter: torch.Tensor) -> Member | None:
        return self._members.get(id(parameter))

    def bind(self, unit: Unit) -> None:
        """Parameters become views of their unit's storage, with their own class."""
        for member, view in zip(unit.members, unit.views, strict=True):
            member.parameter.__class__ = member.original_class
            member.parameter.data = view

    def unbind(self, unit: Unit) -> None:
        for member in unit.members:
            self._send(member)

    def settle(self, *, stale: bool = False, stale_of: Member | None = None) -> None:
        """Write home what was changed through loans; those that nobody refers to end.

        stale: an update follows. stale_of: other weights are about to be given to this member.
        """
        loans, self._loans = self._loans, []
        for loan in loans:
            self._write_home(loan)
            loan.stale = loan.stale or stale or loan.member is stale_of
            if loan.referred_to:
                self._loans.append(loan)
            else:
                self._discharge(loan)

    def give_back(self, member: Member, value: torch.Tensor) -> None:
        """The parameter is an ordinary one again (closing)."""
        member.parameter.__class__ = member.original_class
        member.parameter.data = value
        self._members.pop(id(member.parameter), None)

    def refuse_from_now(self, reason: str) -> None:
        """Parameters that could not be given back: every use says `reason`."""
        self._closed = reason

    # Uses while away -------------------------------------------------------------------------------------------------

    def use(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """One call of a torch function with parameters that are away among its arguments."""
        attribute = attribute_of(function)
        if is_metadata(function):
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        if self._closed:
            raise StateError(self._closed)
        if function.__name__.startswith("_fused_"):
            raise StateError(
                "torch.optim's fused update was called on parameters of a wrapped model, which run.optimizer updates: give "
                "the loop or the client that optimizer (Trainer(optimizers=(run.optimizer, scheduler)), "
                "accelerator.prepare(model, run.optimizer), configure_optimizers returning run.optimizer)."
            )
        members = list({id(each): each for each in self._away_in((args, kwargs))}.values())
        if len(members) == 1 and args and args[0] is members[0].parameter:
            if converts_nothing(function, members[0].unit.placeholder, args, kwargs):
                return args[0]
        writes_data = attribute == "data" and function.__name__ == "__set__"
        if writes_data:
            return self._replace(members[0], args[1])
        return self._on_copies(members, function, args, kwargs, shows_data=attribute == "data")

    def copy_of(self, parameter: nn.Parameter) -> nn.Parameter:
        """An ordinary parameter with the same value (deepcopy, pickling)."""
        if self._closed:
            raise StateError(self._closed)
        member = self._members[id(parameter)]
        self.settle()
        return member.original_class(self._read(member), requires_grad=parameter.requires_grad)

    def _on_copies(
        self, members: list[Member], function: Callable, args: tuple, kwargs: dict, *, shows_data: bool
    ) -> Any:
        self.settle()
        loans: list[_Loan] = []
        if getattr(function, "__name__", "") == "detach" and len(members) == 1:
            loan = self._lend(members[0], may_map=True)
            if loan.tier == "nvme":  # never the parameter's own data: it may be on another device
                return loan.value.detach()
        try:
            for member in members:
                loan = self._lend(member)
                loans.append(loan)
                loan.raw = loan.raw or function.__name__ in _RAW
                member.parameter.__class__ = member.original_class
                member.parameter.data = loan.value
                loan.versions = loan.now()
            if shows_data:  # hides changes from the parameter's version counter, not from ours
                result = loans[0].value.detach()
            else:
                with self._hooks.at_least_keeping():
                    result = function(*args, **kwargs)
        finally:
            for loan in loans:
                if loan.member.parameter.data.data_ptr() != loan.value.data_ptr():
                    loan.value.copy_(loan.member.parameter.data)  # the call itself rebound `.data`
                self._send(loan.member)
        self.settle()
        return result

    def _replace(self, member: Member, value: torch.Tensor) -> None:
        """`p.data = value`."""
        if value is member.parameter:
            return  # what Module.to does where nothing is to be moved
        if value.shape != member.entry.shape or value.dtype != member.unit.dtype:
            raise StateError(
                f"Parameter {member.name} is {tuple(member.entry.shape)} {member.unit.dtype} in a wrapped model and was "
                f"given {tuple(value.shape)} {value.dtype}: shapes and dtypes are fixed until run.close()."
            )
        self.settle()
        if any(_is_all_of(loan.value, value) for loan in self._loans if loan.member is member and not loan.stale):
            return  # `p.data = p.data`: home already
        self.settle(stale_of=member)  # what was read before is the parameter's no more
        self._write(member, value.detach().contiguous().view(-1))

    def _read(self, member: Member) -> torch.Tensor:
        # The tensor itself, no view of one: a view keeps its base alive, which would count as somebody's reference.
        with torch.inference_mode(False):  # whoever reads first, others may write
            value = torch.empty(member.entry.shape, dtype=member.unit.dtype, device=member.unit.device)
        self._swapper.read_member(member, value.view(-1))
        return value

    def _lend(self, member: Member, *, may_map: bool = False) -> _Loan:
        """The loan that there is, else one of a copy that is read now. `may_map`: in a file, on the host, where the model is
        larger than the device's budget."""
        nbytes = member.entry.count * member.unit.dtype.itemsize
        for loan in self._loans:
            if loan.member is member and not loan.stale:
                if loan.value.device == member.unit.device or may_map:
                    return loan
                self._write_home(loan)
                loan.stale = True  # whoever has it keeps what it shows now
        if may_map and self._folders and nbytes >= SMALLEST_MAPPED_BYTES and self._exceeds_the_device:
            return self._lend_mapped(member, nbytes)
        while not self._ledger.try_charge("device", "weights", nbytes):
            if self._swapper.drop_idle():
                continue
            try:
                self._ledger.charge("device", "weights", nbytes)
                break
            except BudgetError as error:
                raise self._refusal(member, nbytes, error) from None
        try:
            value = self._read(member)
        except BaseException:
            self._ledger.discharge("device", "weights", nbytes)
            raise
        self._loans.append(_Loan(member, value, (0, 0), raw=False))
        return self._loans[-1]

    def _lend_mapped(self, member: Member, nbytes: int) -> _Loan:
        self._ledger.charge("nvme", "weights", nbytes, f"a copy of {member.name}")
        with self._ledger.discharged_on_error("nvme", "weights", nbytes):
            with torch.inference_mode(False):
                value = mapped_tensor(self._folders, member.entry.shape, member.unit.dtype)
            self._swapper.read_member(member, value.view(-1))
            let_go(value)
        loan = _Loan(member, value, (0, 0), raw=False, tier="nvme")
        loan.versions = loan.now()
        self._loans.append(loan)
        return loan

    @property
    def _exceeds_the_device(self) -> bool:
        """All weights at once can never be there."""
        return self._whole_bytes > self._ledger.most("device")

    def _relieve(self) -> bool:
        """The device is short: weights that nobody uses go, then loans that only wait for Python's garbage collector, as the
        half of a `state_dict()` that was refused does where a frame of the caller refers to itself."""
        if self._swapper.drop_idle():
            return True
        if not self._loans:
            return False
        gc.collect()
        kept = [loan for loan in self._loans if loan.referred_to or loan.changed]
        ended = [loan for loan in self._loans if loan not in kept]
        self._loans = kept
        for loan in ended:
            self._discharge(loan)
        return bool(ended)

    def _refusal(self, member: Member, nbytes: int, error: BudgetError) -> BudgetError:
        lent = sum(loan.nbytes for loan in self._loans if loan.tier == "device")
        beside = f" while {format_bytes(lent)} of weights that were read before are still referred to" if lent else ""
        return BudgetError(
            f"Reading {member.name} ({format_bytes(nbytes)}){beside} passes gpu={format_bytes(error.given_bytes)} by "
            f"{format_bytes(error.shortfall_bytes)} ({error.shortfall_bytes} bytes): model.state_dict() and the like need all "
            f"weights at once ({format_bytes(self._whole_bytes)}). run.save_pretrained(folder) streams them; else let go of "
            f"what was read before, or give gpu at least {error.needed_bytes} bytes.",
            tier=error.tier, needed_bytes=error.needed_bytes, given_bytes=error.given_bytes,
        )  # fmt: skip

    def _write_home(self, loan: _Loan) -> None:
        if loan.changed:
            self._write(loan.member, loan.value.detach().view(-1))
            loan.versions = loan.now()

    def _write(self, member: Member, value: torch.Tensor) -> None:
        """Make `value` ((numel,), the parameter's dtype) the parameter's, and its master's where that is split."""
        member.unit.writes += 1
        if member.unit.split and member.optimized:
            self._swapper.invalidate(member.unit)
            self._access.write_copy(member, value)
        else:
            self._swapper.write_member(member, value)

    def _discharge(self, loan: _Loan) -> None:
        self._ledger.discharge(loan.tier, "weights", loan.nbytes)

    def _send(self, member: Member) -> None:
        parameter, unit = member.parameter, member.unit
        parameter.__class__ = member.original_class  # so that `.data` is the plain one
        parameter.data = unit.placeholder.expand(member.entry.shape)
        parameter.__class__ = self._class_for(member.original_class)

    def _away_in(self, structure: Any) -> Iterator[Member]:
        if isinstance(structure, torch.Tensor):
            member = self._members.get(id(structure))
            if member is not None and type(structure) is not member.original_class:
                yield member
        elif isinstance(structure, (list, tuple)):
            for item in structure:
                yield from self._away_in(item)
        elif isinstance(structure, dict):
            for item in structure.values():
                yield from self._away_in(item)

    def _class_for(self, original: type) -> type:
        if original not in self._classes:
            self._classes[original] = _make_class(original, self)
        return self._classes[original]


def _make_class(original: type, away: Away) -> type:
    """A subclass of a parameter's class, with nothing but this run's answers."""

    def torch_function(cls: type, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return away.use(function, args, kwargs or {})

    def deepcopy(self: nn.Parameter, memo: dict) -> nn.Parameter:
        if id(self) not in memo:
            memo[id(self)] = away.copy_of(self)
        return memo[id(self)]

    def reduce(self: nn.Parameter, protocol: int) -> Any:
        return away.copy_of(self).__reduce_ex__(protocol)

    return type(
        f"Away{original.__name__}",
        (original,),
        {
            "__doc__": "A parameter whose weights are not on the device: see [Note: away] in fuyou/runtime/away.py.",
            "__torch_function__": classmethod(torch_function),
            "__deepcopy__": deepcopy,
            "__reduce_ex__": reduce,
        },
    )


def _is_all_of(value: torch.Tensor, other: torch.Tensor) -> bool:
    """`other` is the very same memory."""
    same_place = value.device == other.device and value.data_ptr() == other.data_ptr()
    return same_place and value.stride() == other.stride()


@functools.cache
def _count_own_references() -> int:
    """What the use count of a storage reads while only a loan's own tensor refers to it."""
    value = torch.empty(1)
    return torch._C._storage_Use_Count(value.untyped_storage()._cdata)


_OWN_REFERENCES = _count_own_references()
