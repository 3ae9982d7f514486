"""wrap and Run: the whole public surface of the library."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fuyou.checkpoint import checkpoints
from fuyou.checkpoint.export import SHARD_BYTES, MemoryTensor, TensorSource
from fuyou.checkpoint.meta_model import give_weights
from fuyou.checkpoint.pretrained import copy_tokenizer, export_pretrained
from fuyou.checkpoint.saves import saves_of
from fuyou.checkpoint.source import MemberSource
from fuyou.checkpoint.stored import converted_bytes, let_go, parts_of
from fuyou.core.config import Config
from fuyou.core.environment import LEFT_OUT, LeftOut, places
from fuyou.core.errors import ConfigError, DeadlineError, StateError
from fuyou.core.forked import refuse_forked
from fuyou.core.sizes import format_bytes, parse_bytes
from fuyou.report import Report
from fuyou.report.gather import gather
from fuyou.report.post_mortem import PostMortem
from fuyou.report.steps import busiest, timed_resources
from fuyou.runtime import recovery
from fuyou.runtime.build import Homes
from fuyou.runtime.committing import committing_of
from fuyou.runtime.enlist import Enlisting
from fuyou.runtime.handing_back import HandingBack
from fuyou.runtime.handle import GradientHandle
from fuyou.runtime.install import Installation, is_wrapped
from fuyou.runtime.measure import free_host_bytes, heap_free_bytes, rss_bytes
from fuyou.runtime.movers import Movers
from fuyou.runtime.optimizer import Optimizer
from fuyou.runtime.planned import Planned, plan_run
from fuyou.runtime.rest import Rest
from fuyou.runtime.source import Source, fill_from
from fuyou.runtime.tiers import Tiers
from fuyou.swap.gradients import Gradient
from fuyou.swap.optimizer_state import fill


def wrap(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    nvme: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | LeftOut | None = LEFT_OUT,
    nvme_limit: int | str | None = None,
    ram: int | str | None = None,
    gpu: int | str | None = None,
    device: str | torch.device | None = None,
    config: Config | None = None,
    *,
    weights: str | os.PathLike[str] | None = None,
) -> Run:
    """Train `model` with `optimizer` (torch.optim.AdamW or Adam) within these budgets; the training loop does not change.

    nvme: folder, or one per drive; None keeps everything in host memory. nvme_limit: bytes on the drives (None: what is
    free, less 5 %). ram, gpu: bytes of host and device memory, ints or strings such as "48GiB" (None: 80 % of what is
    free; on a CPU device that is split between the two, and `gpu` covers what a GPU would hold). device: None takes
    cuda where there is one. What is left out is first looked for in the environment, where `fuyou launch` puts it
    (FUYOU_NVME, FUYOU_NVME_LIMIT, FUYOU_RAM, FUYOU_GPU, FUYOU_DEVICE); nvme left out and not there is None.
    weights: of a model on the meta device, in whole or in part, the folder whose safetensors files are streamed to where
    the budgets have room: nothing else of it is ever in memory.

    The model is instrumented in place: its classes, names and state_dict keys stay. Use the result as a context manager,
    and `run.optimizer` in place of `optimizer`.

    Raises ConfigError for an argument, model or optimizer that cannot be trained; StoreError for a folder that is
    missing, not writable or in use; BudgetError, with what is short and by how much, for a budget that cannot work.
    Nothing has been changed when it raises.
    """
    config = config if config is not None else Config()
    if not isinstance(config, Config):
        raise ConfigError(f"config={config!r} must be a fuyou.Config.")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module and is a {type(model).__name__}.")
    if is_wrapped(model):
        raise ConfigError("This model is wrapped already: close that run first (run.close()), then wrap again.")
    nvme, nvme_limit, ram, gpu, device = places(nvme, nvme_limit, ram, gpu, device)
    with contextlib.ExitStack() as undo:
        if weights is not None:
            undo.callback(give_weights(model, weights))
        planned = plan_run(
            model, optimizer, nvme, nvme_limit, ram, gpu, device, config, import_bytes=converted_bytes(model)
        )
        run = Run(model, optimizer, planned, config)
        undo.pop_all()
    run.origin = weights
    return run


class Run:
    """One wrapped model: owns its budgets, tiers and what is installed on it, until `close`."""

    model: nn.Module
    optimizer: Optimizer
    device: torch.device
    origin: str | os.PathLike[str] | None = None  # the folder that the weights came from, where they came from one
    post_mortem: PostMortem  # its `folder`, the first nvme folder or the working directory, may be changed

    def __init__(
        self,
        model: nn.Module,
        passed: torch.optim.Optimizer,
        planned: Planned,
        config: Config,
    ) -> None:
        """Use `fuyou.wrap`, which checks the arguments."""
        self.model = model
        self.device = planned.device
        self.config = config
        self._passed = passed
        self._folders = planned.folders
        self._pid = os.getpid()
        self._open = False
        self._in_order = True  # the run ends as it was meant to
        self._units = [unit for unit, _ in planned.packed]
        self._buffer_bytes = planned.buffer_bytes
        with contextlib.ExitStack() as undo:  # whatever fails below: the model is as it was, nothing stays open
            found = recovery.find(config.resume, planned, model)
            undo.callback(recovery.close, found)
            self._tiers = Tiers(
                planned.plan, planned.folders, planned.nvme_limit_bytes, planned.ram_bytes, planned.gpu_bytes,
                planned.device, config, recovery.adopted_record(found),
            )  # fmt: skip
            undo.callback(self._tiers.close)
            self._ledger = self._tiers.ledger
            homes = Homes(
                planned.plan, planned.numbers, self._tiers.store, found.adopted if found is not None else None
            )
            aside = recovery.aside_of(found, self._tiers, planned.plan)
            self._tiers.open_store()
            for index, (unit, named) in enumerate(planned.packed):
                unit.pack(named, self._tiers.races)
                homes.give(index, unit, self._tiers.resident)
            self._committing = committing_of(
                model, self._units, passed, self._tiers, aside, planned.plan.chunk_elements
            )
            self._movers = Movers(model, self._units, planned, self._tiers, self._committing, config)
            self._schedule, self._updates = self._movers.schedule, self._movers.updates
            self._saves = saves_of(self._tiers, planned.plan, self._saved)
            if found is None:
                self._ledger.charge("host", "staging", planned.import_bytes, "weights that are converted whole")
                self._fill(passed)
                self._ledger.discharge("host", "staging", planned.import_bytes)
            else:
                rest = self._committing.read(found.saved, found.manifest)
                fill_from(found, self._units, self._tiers.writes, self._tiers.store)
            undo.pop_all()
        try:
            self._install()
            if found is None:
                recovery.note_none(self._folders)
            else:
                self._go_on(found, rest)
        except BaseException:
            if self._open:  # all is on, and what failed is beside it (no descriptor left to measure with): take it off
                self.close()
            raise

    # The loop's own ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        self._in_order = kind is None
        if error is not None and self._open:
            self.post_mortem.notice(error, "training")
        self.close()

    def settle(self) -> None:
        """Every update that was asked for is made, every write under way is done, every change made to a parameter's copy
        is home, with durability "step" the last step is committed, and a checkpoint that was asked for is there. Raises their
        errors."""
        self._guard()
        self._settle()
        self._saves.wait()

    def _send_home(self) -> None:
        """What is on the device and was changed is on its way."""
        self._schedule.end_backward()
        self._movers.away.settle()
        self._movers.gradients.end_backward()

    def _settle(self) -> None:
        self._send_home()
        self._updates.drain()
        self._tiers.writes.drain()
        self._committing.complete_again()
        self._updates.drain()

    def report(self) -> Report:
        """What the run holds, held at its peak, moves and waits for: see `fuyou.Report`."""
        return Report(self._told())

    def status(self) -> dict[str, Any]:
        """{busiest: the resource that was busy for most of the last step ("" before the first), busy: its share, full: {tier:
        share of its budget that is held now}}. Cheaper than a report: for a progress bar."""
        resource, share = busiest(self._tiers.recorder, timed_resources(self.device.type))
        memory = self._ledger.summary()
        full = {
            tier: (sum(each["held_by_category"].values()) + each["reserve_bytes"]) / each["budget_bytes"]
            for tier, each in memory.items()
            if each["budget_bytes"]
        }
        return {"busiest": resource, "busy": share, "full": full}

    def _told(self) -> dict[str, Any]:
        return gather(self._tiers, self._movers, self._units, self._baseline, self.device)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        merge_adapters: bool = False,
        max_shard_size: int | str = SHARD_BYTES,
    ) -> None:
        """Write the weights (the compute copy, in the parameters' dtype) and the model's configs to `folder` in Hugging
        Face's layout, in files of at most `max_shard_size` and an index where there are several; the tokenizer too where
        the run was made from a folder (`load_pretrained`, `wrap(weights=)`). Of a model with PEFT adapters these alone, in
        PEFT's layout, or with `merge_adapters` the whole model with them added (LoRA). Streams: host memory is that of a
        few chunks. Raises StoreError where the disk has no room, ConfigError for adapters that cannot be merged."""
        self._guard()
        self._settle()
        self._export(folder, merge_adapters, parse_bytes(max_shard_size, "max_shard_size"))
        if self.origin is not None:
            copy_tokenizer(self.origin, folder)

    def _export(
        self, folder: str | os.PathLike[str], merge_adapters: bool = False, shard_bytes: int = SHARD_BYTES
    ) -> None:
        export_pretrained(folder, self.model, self._source, shard_bytes=shard_bytes, merge_adapters=merge_adapters)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write all that the run is to `folder`, which must not exist yet and is there whole or not at all: weights,
        optimizer state, and what [Note: what a commit holds] lists, as it is now; not the gradients. `run.load`, and `wrap`
        with Config(resume=folder), go on from it with the same bits, under any budgets.

        With durability "step" it is copied beside training, through 1 MiB of host memory, and is there when the next `save`,
        `settle()` or `close()` returns; what fails on the way is raised by that, and training goes on. Where steps are not
        committed it is there when this returns. ConfigError for a folder that exists, StoreError without room,
        StorageIOError."""
        self._guard()
        self._saves.wait()
        self._send_home()
        draft = checkpoints.Draft(os.fspath(folder), self._updates.step, self._units, self._committing)
        try:
            if self._saves.begin(draft, self._committing.at_commit):
                return
            self._settle()
            checkpoints.save(draft, self._tiers.writes)
        except BaseException:
            draft.discard()
            raise
        self._saved(draft.writer.folder, draft.step)

    def _saved(self, folder: str, step: int) -> None:
        """A checkpoint is there. By any thread."""
        if self._folders:
            recovery.note_saved(self._folders[0], folder, step)
            if not self._tiers.durable:  # a step that was moved aside for this run was its newest checkpoint until now
                recovery.clear_moved(self._folders)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Make the run what it was when `folder`, a checkpoint or the store of a closed run, was written; gradients go.
        ConfigError for another model or precision, StoreError for bytes that are damaged: nothing has changed then. After any
        other error, or Ctrl-C in the middle, the run trains and commits no more: the newest step on the drives is as it was."""
        self.settle()
        found = checkpoints.open_for(os.fspath(folder), self._units, self.model)
        with contextlib.ExitStack() as undo:
            undo.callback(found.close)
            rest = self._committing.read(found.saved, found.manifest)
            undo.pop_all()
        try:
            self.optimizer.zero_grad()
            self.optimizer.state.let_go()
            checkpoints.load(found, self._units, self._movers.swapper, self._updates, self._tiers.writes)
            self._go_on(found, rest)
        except BaseException as error:
            self._updates.fail(error)  # a part of each: it may not be committed, and the newest step stays what it was
            found.close()
            raise

    def register(self, name: str, obj: Any) -> None:
        """Have each commit, and each checkpoint, hold `obj.state_dict()`; where the run goes on from a step that has it,
        `obj.load_state_dict` is called now. For schedulers, loss scalers, data loaders that know their place, averages of
        weights. ConfigError for a name that is taken, and for state that is more than numbers, strings and tensors."""
        self._guard()
        self._committing.register(name, obj)

    @property
    def committed_step(self) -> int:
        """The newest step that is complete on the drives; 0 while none is, and where steps are not committed."""
        store = self._tiers.store
        return store.committed_step if store is not None and self._tiers.durable else 0

    @property
    def user_state(self) -> dict[str, Any]:
        """A dict of your own, of what JSON can carry and at most 256 KiB, committed with each step as it is when `step()`
        is called: what of the data has been consumed. Where the run goes on from a step, it is that step's."""
        return self._committing.user_state

    def close(self) -> None:
        """Drain, make the model and the passed optimizer ordinary again, give every byte and thread back. Where steps are
        committed the store stays in the nvme folders, and the next run may go on from it (Config(resume=True)).

        Weights, gradients and optimizer state that do not fit into free memory are not given back: the weights are
        written to the nvme folder as Hugging Face's layout, and a warning says where. Idempotent; a forked child's call
        does nothing. DeadlineError where a drive does not answer: the run is still open then, and close() may be called
        again when it does.
        """
        if os.getpid() != self._pid:
            return
        if not self._open:
            self._tiers.close()  # what was past its deadline then; else there is nothing left
            return
        unsaved: Exception | None = None
        try:
            if not self._schedule.torn:
                self._settle()
                if self._in_order and self._tiers.store is not None:
                    self._tiers.store.seal()
            if self._schedule.torn:
                warnings.warn(self._schedule.torn, stacklevel=2)
                self._updates.give_up()
            unsaved = self._saves.problem()
            self._tiers.link.lift()  # weights that came from a GPU go back there
            given_back = self._handing_back.give()
            if not given_back:
                self._leave_on_disk(self._handing_back.weight_bytes)
            self.optimizer.state.close()
        except DeadlineError:
            raise
        except BaseException as error:
            self._movers.away.refuse_from_now(f"The run could not give the weights back when it closed: {error}")
            self._take_down()
            raise
        self._take_down()
        if unsaved is not None:
            raise unsaved

    def _take_down(self) -> None:
        self._open = False
        self._installation.remove()
        self._ledger.discharge("device", "weights", self._buffer_bytes)
        with contextlib.ExitStack() as closing:  # each, whatever the one before it raises; the last one first
            closing.callback(self._tiers.close)
            closing.callback(self._movers.close)
            closing.callback(self._saves.close)  # it looks at the units, which the movers empty

    # Building ---------------------------------------------------------------------------------------------------------

    def _go_on(self, found: Source, rest: Rest) -> None:
        """The rest of a step whose weights and optimizer state are home; where it came from elsewhere, it is committed."""
        self._tiers.note(found.told)
        self._committing.restore(rest)
        self._updates.go_on(found.saved.step)
        if found.adopted is None and self._tiers.durable and self._tiers.store is not None:
            self._tiers.store.rewind(found.saved.step)
            self._committing.now(found.saved.step)
            self._updates.commit_again()
            self._updates.drain()
        if self._tiers.durable:
            recovery.forget(found)
        else:
            recovery.keep(found, self._folders)

    def _fill(self, passed: torch.optim.Optimizer) -> None:
        """Parameters, and state that the passed optimizer has, to their homes. The model keeps its own memory so far."""
        for unit in self._units:
            states = {}
            for member in unit.members:
                state = passed.state.get(member.parameter, {})
                if member.optimized and "exp_avg" in state:
                    states[member] = state
                    member.step = int(state["step"])
            fill(unit, self._tiers.kernels, self._tiers.writes, states, parts_of)
        self._tiers.writes.drain()

    def _install(self) -> None:
        """The point of no return: parameters go away, their memory is freed, hooks are on."""
        movers = self._movers
        self._members = {id(member.parameter): member for unit in self._units for member in unit.members}
        for unit in self._units:
            movers.swapper.adopt(unit)
            let_go(unit.members)
            had = {member: member.parameter.grad for member in unit.members}
            for member in unit.members:
                member.parameter.grad = None
            movers.away.adopt(unit)
            for member, grad in had.items():
                if grad is not None and unit.trainable:
                    gradient = Gradient(member)
                    movers.gradients.adopt(gradient, grad.to(unit.device, unit.dtype))
                    member.parameter.grad = GradientHandle(gradient, movers.gradients)
        movers.gradients.end_backward()
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))
        self._installation = Installation(self._schedule, movers.model_calls, self._units, self._guard)
        enlisting = Enlisting(self._tiers, self._updates, self._installation.watch)
        self._schedule.enlist = enlisting.gradient
        self.optimizer = Optimizer(
            self.model, self._passed, self._members, self._schedule, movers.gradients, movers.access, enlisting, self._guard
        )  # fmt: skip
        self._schedule.planned = self.optimizer.planned
        self._schedule.stepped, self._schedule.before_forward = (
            self._committing.stepped,
            self._committing.before_forward,
        )
        self._handing_back = HandingBack(self._members.values(), movers, self.optimizer, self._passed)
        self._passed.state.clear()
        self._tiers.link.limit(self._buffer_bytes + self._ledger.held("device"))
        self._installation.replace_step(self._passed)
        self._ledger.charge("device", "weights", self._buffer_bytes, "the model's buffers")
        self._open = True
        self.post_mortem = PostMortem(Path(self._folders[0] if self._folders else os.curdir), self._told)
        self._tiers.link.failed = self.post_mortem.notice
        movers.gauge.looked = self.post_mortem.look
        movers.gauge.start()
        held, committed = self._ledger.held("device"), self._tiers.committed_bytes
        self._baseline = {"rss": rss_bytes(), "device": held, "committed": committed, "heap_free": heap_free_bytes()}

    # Closing ----------------------------------------------------------------------------------------------------------

    def _leave_on_disk(self, weights: int) -> None:
        where = "call run.save_pretrained(folder) before run.close()"
        if self._folders:
            folder = os.path.join(self._folders[0], "weights-at-close")
            self._export(folder)
            where = f"they were written to {folder}"
        reason = (
            f"The weights ({format_bytes(weights)}) do not fit into the {format_bytes(free_host_bytes())} of free memory, so "
            f"the closed run did not give them back to the model: {where}."
        )
        warnings.warn(reason, stacklevel=4)
        self._movers.away.refuse_from_now(reason)

    # Small ------------------------------------------------------------------------------------------------------------

    def _guard(self) -> None:
        refuse_forked(self._pid, "This run")
        if not self._open:
            raise StateError("This run is closed: wrap the model again to train on.")
        if self._schedule.torn:
            raise StateError(self._schedule.torn) from self._updates.failure

    def _source(self, name: str, tensor: torch.Tensor) -> TensorSource:
        member = self._members.get(id(tensor))
        return MemoryTensor(name, tensor) if member is None else MemberSource(name, member, self._tiers.writes)


__all__ = ["Run", "wrap"]
