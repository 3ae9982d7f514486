"""What a commit holds beside weights and optimizer state, and when it is taken.

[Note: what a commit holds] All that a continuation needs to have the same bits:

    at step()                  random generators, `run.user_state`, registered objects that give data: taken before the loop
                               can fetch the next batch
    at the first forward       weights, as they are by then, hyperparameters of the groups, step counts, buffers, the other
    after it that trains,      registered objects: learning rates, loss scales and averages are changed after step(), weights
    or settle()                may be clamped, and a schedule may wait for an evaluation

A step's commit waits for the second half. What the loop changes after settle() and before that forward is committed once
more, as the same step.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from fuyou.core.errors import ConfigError
from fuyou.core.plain import Encoder, check_json
from fuyou.core.ticket import DONE, Ticket
from fuyou.runtime.manifest import Manifest, manifest_of
from fuyou.runtime.rest import Rest, buffers_of, generators, read_rest, restore_generators
from fuyou.runtime.tiers import Tiers
from fuyou.swap.aside import Aside, Part
from fuyou.swap.unit import Chunk, Member, Unit
from fuyou.swap.updates import Updates
from fuyou.tiers.records import MOST_PAYLOAD_BYTES, encode_payload
from fuyou.tiers.saved import Saved
from fuyou.tiers.store import Store

_AFTER_STEP = (LRScheduler, AveragedModel, torch.amp.GradScaler)
MOST_USER_BYTES = MOST_PAYLOAD_BYTES // 4


class Committing:
    """Takes the run's state in the two halves of [Note: what a commit holds], and gives it back.

    `aside` and `store` are None where steps are not committed; `whole` works all the same. `updates` is told when a step's
    second half is there. One thread, the one that trains, calls everything but `commit`.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        members: Sequence[Member],
        groups: Callable[[], list[dict[str, Any]]],
        manifest: Callable[[], Manifest],
        store: Store | None,
        aside: Aside | None,
    ) -> None:
        self.user_state: dict[str, Any] = {}
        self._model = model
        self._device = device
        self._members = members
        self._groups = groups
        self.manifest = manifest
        self._store = store
        self._aside = aside
        self._registered: dict[str, Any] = {}
        self._left: dict[
            str, Any
        ] = {}  # registered state of a step that was loaded, for objects that are still to come
        self._loaded_groups: list[dict[str, Any]] = []  # of that step, until the next one
        self._early: tuple[Encoder, dict[str, Any]] | None = None  # taken at a step whose second half is still to come
        self._rest: tuple[Encoder, dict[str, Any]] | None = None  # the last step's, until a forward trains
        self._payloads: dict[int, bytes] = {}
        self._step = 0
        self._described: list[int] = []  # what the manifest was written for
        self._buffers: tuple[list[Any], dict[str, Any]] = ([], {})  # what they were when they were last written

    def attach(self, updates: Updates) -> None:
        self._updates = updates

    # Taking -----------------------------------------------------------------------------------------------------------

    def register(self, name: str, obj: Any) -> None:
        """`obj` has state_dict and load_state_dict. What a step that was loaded has of it, it gets now.

        ConfigError for a name that is taken, or state that cannot be committed; nothing is registered then.
        """
        if not isinstance(name, str) or not name:
            raise ConfigError(f"run.register({name!r}, …): the name is a string that is not empty.")
        if name in self._registered:
            raise ConfigError(f"run.register({name!r}, …): another object has that name; give each one its own.")
        lacking = [each for each in ("state_dict", "load_state_dict") if not callable(getattr(obj, each, None))]
        if lacking:
            raise ConfigError(f"run.register({name!r}, {type(obj).__name__}): it has no {' and no '.join(lacking)}.")
        encoder = Encoder()
        encode_payload({name: encoder.encode(obj.state_dict(), f"The state of {name!r}")})
        if self._aside is not None:
            self._aside.reserve("registered", 2 * encoder.nbytes)
        if name in self._left:
            obj.load_state_dict(self._left.pop(name))
            self._restore_groups()  # a schedule that is made anew sets the rates of its first step
        self._registered[name] = obj

    def stepped(self, step: int) -> None:
        """The first half, before the updates of `step` are asked for. ConfigError for a `user_state` that JSON cannot carry."""
        self._loaded_groups = []
        if self._aside is None:
            return
        self.complete()
        if self._left:
            names, self._left = ", ".join(map(repr, self._left)), {}
            warnings.warn(
                f"The step that this run goes on from has the state of {names}, which was not registered before the first "
                "step and is dropped: run.register(name, object) restores it.",
                stacklevel=4,
            )
        encoder = Encoder()
        early = self._first_half(encoder)
        encoder.beside[:] = [(offset, flat.clone()) for offset, flat in encoder.beside]  # it may go on changing
        self._early, self._rest, self._step = (encoder, early), None, step

    def complete(self) -> None:
        """The second half of the last step, where it is still to come."""
        if self._early is None:
            return
        self._take(self._early)
        self._rest, self._early = self._early, None
        self._updates.captured()

    def before_forward(self) -> None:
        """Of one that trains: `complete`, or where that was done already the step again, with what was changed since. What
        comes before it (an evaluation, a schedule that waits for its result) belongs to the step."""
        if torch.is_grad_enabled() and (self._early is not None or self._rest is not None):
            self.complete_again()
            self.complete()
            self._rest = None

    def complete_again(self) -> None:
        """Weights are home: the last step with what the loop has changed after it, where that is anything."""
        if self._rest is None:
            return
        before = self._payloads.get(self._step)
        self._take(self._rest)
        if before != self._payloads[self._step] or (self._store is not None and self._store.changed):
            self._updates.commit_again()

    def at_commit(self, told: Callable[[Ticket], None]) -> bool:
        """See Updates.at_commit: the last step's as it is now, its second half taken where it was still to come. Changed
        copies are home."""
        if self._early is not None:
            self.complete()
        else:
            self.complete_again()
        store = self._store
        return store is not None and self._updates.at_commit(told, lambda: store.changed)

    def commit(self, step: int) -> Ticket:
        """Called under the lock of the updates, by any thread, when all of the step is written or on its way."""
        if self._store is None:
            return DONE
        for older in [each for each in list(self._payloads) if each < step]:  # another thread puts some there
            del self._payloads[older]
        return self._store.commit(step, self._payloads[step])

    def now(self, step: int) -> None:
        """Both halves as of this moment, for a commit of `step` that no step() asks for."""
        encoder = Encoder()
        self._step, self._early, self._rest = step, None, None
        self._take((encoder, self._first_half(encoder)))

    def whole(self) -> tuple[dict[str, Any], dict[str, tuple[int, list[Part]]]]:
        """Both halves as of this moment, for a checkpoint: the payload, and the blobs that it refers to."""
        encoder, buffers = Encoder(), Encoder()
        payload = {**self._first_half(encoder), **self._second_half(encoder)}
        payload["registered"] |= payload.pop("sources")
        payload["buffers"] = self._encoded_buffers(buffers)
        return payload, {
            "registered": (encoder.nbytes, list(encoder.beside)),
            "buffers": (buffers.nbytes, list(buffers.beside)),
        }

    def close(self) -> None:
        if self._aside is not None:
            self._aside.close()

    def _await_begun(self) -> None:
        self._updates.await_begun()

    def _take(self, early: tuple[Encoder, dict[str, Any]]) -> None:
        """The step's payload, from its first half and what the second is now."""
        if self._aside is None:
            return
        encoder = Encoder()
        encoder.beside, encoder.nbytes = list(early[0].beside), early[0].nbytes
        payload = {**early[1], **self._second_half(encoder)}
        payload["registered"] = {**payload["registered"], **payload.pop("sources")}
        payload["buffers"] = self._put_buffers()
        if encoder.nbytes:
            self._aside.put("registered", encoder.nbytes, encoder.beside, self._await_begun)
        self._put_manifest(self._aside)
        payload["blobs"] = self._aside.table()
        payload["folders"] = [drive.folder for drive in self._store.drives] if self._store is not None else []
        self._payloads[self._step] = encode_payload(payload)

    def _put_manifest(self, aside: Aside) -> None:
        """Again where extents have come, or the optimizer has other groups."""
        key = [self._store.extent_count if self._store is not None else 0]
        key += [len(group["params"]) for group in self._groups()]
        if key != self._described:
            text = self.manifest().encode()
            whole = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            aside.put("manifest", len(text), [(0, whole)], self._await_begun)
            self._described = key

    def _first_half(self, encoder: Encoder) -> dict[str, Any]:
        check_json(self.user_state, "run.user_state")
        nbytes = len(encode_payload({"user_state": self.user_state}))
        if nbytes > MOST_USER_BYTES:
            raise ConfigError(
                f"run.user_state takes {nbytes} bytes as JSON, and a commit holds {MOST_USER_BYTES} of it: keep large things "
                "in files of their own, and their names here."
            )
        sources = {name: obj for name, obj in self._registered.items() if not _changes_after_step(obj)}
        return {
            "rng": encoder.encode(generators(self._device), "The state of the random generators"),
            "user_state": copy.deepcopy(self.user_state),
            "sources": self._encoded(sources, encoder),
        }

    def _second_half(self, encoder: Encoder) -> dict[str, Any]:
        groups = [{key: value for key, value in group.items() if key not in _OF_GROUPS} for group in self._groups()]
        rest = {name: obj for name, obj in self._registered.items() if _changes_after_step(obj)}
        return {
            "steps": [[count, len(list(them))] for count, them in groupby(each.step for each in self._members)],
            "groups": encoder.encode(groups, "The optimizer's groups"),
            "registered": {
                # What nobody has asked for yet is still the step's: it may be committed again, in another layout.
                **{name: encoder.encode(state, f"The state of {name!r}") for name, state in self._left.items()},
                **self._encoded(rest, encoder),
            },
        }

    def _encoded(self, objects: dict[str, Any], encoder: Encoder) -> dict[str, Any]:
        return {name: encoder.encode(obj.state_dict(), f"The state of {name!r}") for name, obj in objects.items()}

    def _put_buffers(self) -> dict[str, Any]:
        """The buffers' JSON; their bytes are looked at only where something may have been written to one."""
        key: list[Any] = [
            None if isinstance(owner, _NormBase) else (name, id(tensor), tensor._version)  # past the version counter
            for name, owner, tensor in buffers_of(self._model)
        ]
        before, encoded = self._buffers
        if key != before or None in key:
            encoder = Encoder()
            encoded = self._encoded_buffers(encoder)
            if encoder.nbytes and self._aside is not None:
                self._aside.put("buffers", encoder.nbytes, encoder.beside, self._await_begun)
            self._buffers = (key, encoded)
        return encoded

    def _encoded_buffers(self, encoder: Encoder) -> dict[str, Any]:
        return {name: encoder.encode(each, f"Buffer {name}") for name, _, each in buffers_of(self._model)}

    # Giving back ------------------------------------------------------------------------------------------------------

    def read(self, saved: Saved, manifest: Manifest) -> Rest:
        """What `saved` has beside weights and optimizer state; nothing is changed. StoreError where it has no such thing,
        ConfigError for groups or buffers of another model."""
        rest = read_rest(saved, manifest)
        self._refuse_other_groups(rest, manifest)
        for name, _, _ in buffers_of(self._model):
            if name not in rest.buffers:
                raise ConfigError(
                    f"The step that is loaded has no buffer {name}: wrap the model that it was saved from."
                )
        return rest

    def restore(self, rest: Rest) -> None:
        """Make everything what it is in `rest`. Objects that are not registered yet get theirs when they are."""
        for member in self._members:
            member.step = rest.steps[member.name]
        self._loaded_groups = rest.groups
        self._restore_groups()
        for name, owner, tensor in buffers_of(self._model):
            value = rest.buffers[name]
            if value.shape == tensor.shape and value.dtype == tensor.dtype:
                with torch.no_grad():
                    tensor.copy_(value)
            else:  # one that grows (a cache of rotary tables)
                owner._buffers[name.rpartition(".")[2]] = value.to(tensor.device)
        self.user_state.clear()
        self.user_state.update(rest.user_state)
        self._left = {name: state for name, state in rest.registered.items() if name not in self._registered}
        self._early = self._rest = None
        for name, state in rest.registered.items():
            if name in self._registered:
                self._registered[name].load_state_dict(state)
        restore_generators(rest.generators, self._device)

    def _restore_groups(self) -> None:
        for group, values in zip(self._groups(), self._loaded_groups, strict=bool(self._loaded_groups)):
            for key, value in values.items():
                if isinstance(group.get(key), torch.Tensor) and isinstance(value, torch.Tensor):
                    group[key].copy_(value)
                else:
                    group[key] = value

    def _refuse_other_groups(self, rest: Rest, manifest: Manifest) -> None:
        names = {id(member.parameter): member.name for member in self._members}
        mine = [tuple(names[id(each)] for each in group["params"] if id(each) in names) for group in self._groups()]
        if mine != list(manifest.groups) or len(rest.groups) != len(mine):
            raise ConfigError(
                f"The step that is loaded has optimizer groups of {[len(each) for each in manifest.groups]} parameters, and "
                f"this optimizer has {[len(each) for each in mine]}, or others in them: build the optimizer as it was built "
                "then."
            )


def committing_of(
    model: nn.Module,
    units: Sequence[Unit],
    optimizer: torch.optim.Optimizer,
    tiers: Tiers,
    aside: Aside | None,
    chunk_elements: int,
) -> Committing:
    """Of a run; its units are packed. `optimizer`'s groups are the run's."""

    def number_of(chunk: Chunk, kind: str) -> int:
        its = chunk.weights if kind == "weights" else chunk.state
        return -1 if its is None or its.extent is None else its.extent.index

    return Committing(
        model, tiers.link.device, [member for unit in units for member in unit.members], lambda: optimizer.param_groups,
        lambda: manifest_of(units, chunk_elements, model, optimizer.param_groups, number_of), tiers.store, aside,
    )  # fmt: skip


_OF_GROUPS = ("params", "param_names")


def _changes_after_step(obj: Any) -> bool:
    """The loop changes it between step() and the next forward; all others, it changes before or when it fetches data."""
    return isinstance(obj, _AFTER_STEP) or hasattr(obj, "get_last_lr")
