"""From a model and budgets to units with homes: what `wrap` decides before it touches anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from fuyou.core.blocks import Block, owners
from fuyou.core.errors import ConfigError
from fuyou.core.layout import Layout
from fuyou.core.sizes import align_up
from fuyou.plan.planner import KINDS, PAGE_BYTES, Plan, UnitNumbers, chunk_spans
from fuyou.swap.ranges import Range
from fuyou.swap.unit import Chunk, Unit, text_of
from fuyou.tiers.host import Arena
from fuyou.tiers.store import Extent, Store

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def name_optimizer_strangers(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """ConfigError for a parameter of the optimizer that the model does not have."""
    known = {id(parameter) for parameter in model.parameters()}
    for number, group in enumerate(optimizer.param_groups):
        names = group.get("param_names", [])
        for index, parameter in enumerate(group["params"]):
            if id(parameter) not in known:
                name = f" ({names[index]})" if index < len(names) else ""
                raise ConfigError(
                    f"Parameter {index}{name} of the optimizer's group {number}, of shape {tuple(parameter.shape)}, is not in "
                    "the model: build the optimizer from model.parameters()."
                )


def refuse_compiled_around(model: nn.Module, blocks: Sequence[Block]) -> None:
    """ConfigError for compiled code around blocks, whose weights come and go inside of it. Compiled blocks are fine."""
    within = {id(module) for block in blocks for module in block.module.modules()}
    for name, module in model.named_modules():
        if id(module) in within:
            continue
        if module._compiled_call_impl is not None or isinstance(module, torch._dynamo.OptimizedModule):
            first = next((block.name for block in blocks if block.name), "")
            raise ConfigError(
                f"{name or 'The model'} is compiled as a whole, and the weights of its blocks ({first}, …) come and go inside: "
                "wrap the model uncompiled and compile its blocks, as in `for layer in model.layers: layer.compile()`."
            )


def make_units(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    blocks: Sequence[Block],
    precision: str | None,
    device: torch.device,
) -> list[tuple[Unit, list[tuple[str, nn.Parameter]]]]:
    """The units, in the order in which their first parameters are registered, each with its named parameters.

    Parameters move together that are needed by the same blocks, have one dtype, and are all trained or all frozen now.
    """
    owned = owners(model, blocks)
    optimized = {
        id(parameter)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad or "exp_avg" in optimizer.state.get(parameter, {})  # frozen since: its state is kept
    }
    found: dict[tuple, tuple[Unit, list[tuple[str, nn.Parameter]]]] = {}
    for name, parameter in model.named_parameters():
        dtype = _dtype(name, parameter, precision)
        trained = id(parameter) in optimized
        key = (owned[id(parameter)], dtype, parameter.requires_grad, trained)
        if key not in found:
            title = " + ".join(blocks[index].name or "the model" for index in key[0]) or "the model's own parameters"
            unit = Unit(title, key[0], dtype, device)
            unit.trainable, unit.optimized = parameter.requires_grad, trained
            found[key] = (unit, [])
        found[key][1].append((name, parameter))
    return list(found.values())


def numbers_of(unit: Unit, named: Sequence[tuple[str, nn.Parameter]]) -> UnitNumbers:
    layout = Layout(unit.dtype, [(name, parameter.shape) for name, parameter in named])
    return UnitNumbers(
        name=unit.name,
        elements=layout.count,
        itemsize=unit.dtype.itemsize,
        owners=unit.owners,
        trainable=unit.trainable,
        optimized=unit.optimized,
        largest_tensor_elements=max(entry.count for entry in layout.entries),
    )


def committed_of(plan: Plan, numbers: UnitNumbers) -> Iterator[tuple[str, int, int]]:
    """(kind, chunk number, bytes) of the extents of a unit that records name, where steps are committed."""
    for kind in ("weights", "optimizer"):
        for number, (_, count) in enumerate(chunk_spans(numbers.elements, plan.chunk_elements)):
            nbytes = numbers.bytes_of(kind, count)
            if nbytes:
                yield kind, number, align_up(nbytes, PAGE_BYTES)


class Homes:
    """Gives every chunk's ranges their home, as the plan says: leases of the arena, extents of the store."""

    def __init__(
        self,
        plan: Plan,
        numbers: Sequence[UnitNumbers],
        store: Store | None,
        adopted: Mapping[tuple[int, int, str], int] | None = None,
    ) -> None:
        """`adopted`: by (unit, chunk, kind) the numbers of extents that the store goes on with."""
        self._plan = plan
        self._numbers = numbers
        self._extents: dict[tuple[int, int, str], Extent] = {}
        for index, unit in enumerate(numbers):  # unit by unit, so that what is read together lies together
            for kind in ("weights", "optimizer", "gradients"):
                for number, (_, count) in enumerate(chunk_spans(unit.elements, plan.chunk_elements)):
                    nbytes = unit.bytes_of(kind, count)
                    rewritten = kind == "optimizer" or (kind == "weights" and (unit.optimized or plan.through))
                    on_drives = (index, number) not in plan.on_host or (plan.through and rewritten)
                    if store is not None and nbytes and on_drives:
                        slots = plan.state_slots if rewritten else 1
                        self._extents[index, number, kind] = store.place(
                            nbytes, kind, slots, committed=rewritten,
                            adopt=adopted[index, number, kind] if adopted is not None and rewritten else None,
                        )  # fmt: skip

    def give(self, index: int, unit: Unit, arena: Arena) -> None:
        """Make the unit's chunks."""
        for number, (start, count) in enumerate(chunk_spans(unit.layout.count, self._plan.chunk_elements)):
            weights, gradient, state = (self._home(index, number, kind, count, arena) for kind in KINDS)
            if weights is None:
                raise ConfigError(f"Unit {unit.name} has no weights.")
            if state is not None and (index, number) in self._plan.spare:
                for each in (weights, state):
                    each.spare = arena.lease(each.nbytes, "optimizer", unit.name)
            chunk = Chunk(unit, start, count, weights, state, gradient)
            chunk.parts = [
                (unit.members[member], first, last) for member, first, last in unit.layout.within(start, start + count)
            ]
            names = [member.name for member, _, _ in chunk.parts]
            for kind, home in zip(KINDS, (weights, gradient, state), strict=True):
                if home is not None and home.extent is not None:
                    home.extent.what = text_of(names, kind)
            unit.chunks.append(chunk)

    def _home(self, index: int, number: int, kind: str, count: int, arena: Arena) -> Range | None:
        nbytes = self._numbers[index].bytes_of(kind, count)
        extent = self._extents.get((index, number, kind))
        if nbytes == 0:
            return None
        if (index, number) in self._plan.on_host:
            home = Range(nbytes, arena.lease(nbytes, kind, self._numbers[index].name))
            home.through = extent
            return home  # what its extent has of an earlier run comes when it is verified
        if extent is None:
            raise ConfigError(f"The {kind} of {self._numbers[index].name} were given no home.")
        home = Range(nbytes, extent)
        home.written = extent.written
        return home


def _dtype(name: str, parameter: nn.Parameter, precision: str | None) -> torch.dtype:
    if parameter.is_meta:
        raise ConfigError(
            f"Parameter {name} is on the meta device: name the folder that holds its weights, fuyou.wrap(..., weights=folder)."
        )
    if parameter.dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(
            f"Parameter {name} is {str(parameter.dtype).removeprefix('torch.')}: fuyou trains float32 and bfloat16 "
            "(model.float() or model.bfloat16() before wrapping)."
        )
    if parameter.layout is not torch.strided:
        raise ConfigError(f"Parameter {name} is sparse: fuyou trains dense parameters.")
    return DTYPES[precision] if precision is not None else parameter.dtype
