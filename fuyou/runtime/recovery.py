"""Going on from a step: which one, where its bytes are to be, and bringing them there.

[Note: resuming] A store whose layout is the one that this run plans, on the same drives, is gone on with as it lies: its
bytes are read once, for their checksums (and to where they stay in host memory). In every other case (other budgets, other
drives, a checkpoint) the step is read by the names of its parameters, whatever its layout, and written to the new homes. A
store that stands in the new one's place is first copied to a checkpoint beside it (MOVED), which goes when the new store
has committed the step: at every moment one of the three is whole, and `find` takes it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence

import torch
from torch import nn

from fuyou.core.beside import read_beside, read_text, write_beside
from fuyou.core.errors import BudgetError, StateError, StorageIOError, StoreError
from fuyou.plan.planner import Plan
from fuyou.runtime.build import committed_of
from fuyou.runtime.manifest import (
    refuse_other_model,
    refuse_without_homes,
    tied_names,
)
from fuyou.runtime.moving import MOVED, clear_moved, moved_in, remove_moved, sweep
from fuyou.runtime.planned import Planned
from fuyou.runtime.source import Source, read_source
from fuyou.runtime.tiers import Tiers
from fuyou.swap.aside import Aside
from fuyou.tiers.checksum import best_checksum
from fuyou.tiers.drives import remove_store
from fuyou.tiers.folders import FOLDER, HOME, check_folders, refuse_without_room, rooms_of
from fuyou.tiers.lock import FolderLock, refuse_in_use
from fuyou.tiers.records import Record, payload_of_newest
from fuyou.tiers.saved import is_dirty, open_saved, was_left_open
from fuyou.tiers.saving import copy_saved

SAVED = "fuyou-saved.json"  # beside a store: its run's newest checkpoint


def find(resume: bool | str | None, planned: Planned, model: nn.Module) -> Source | None:
    """What the run goes on from, as Config(resume) says; None: it starts anew. Nothing but MOVED has been written when this
    returns or raises.

    StateError where steps would be lost that nobody said may be, or a live store is of no step; StoreError for a step that
    cannot be read and a folder in use, ConfigError for a step of another model, BudgetError without the room to move it.
    """
    for folder in planned.folders:
        refuse_in_use(os.path.join(folder, FOLDER))
    sweep(planned.folders)
    if isinstance(resume, str):
        refuse_in_use(os.path.join(resume, FOLDER))
        source = read_source(check_folders([resume]))
        if source is None:
            raise StoreError(
                f"There is no step to go on from in {resume}: name the folder of a run's store, or of a checkpoint."
            )
    elif resume:
        source = _newest_of(planned.folders)
        if source is None and planned.folders:
            _refuse_of_no_step(planned.folders[0])
    else:
        source = None
        if resume is None:
            _refuse_to_discard(planned.folders)
        clear_moved(planned.folders)
    if source is None:
        return None
    try:
        _refuse_other(source, planned, model)
        return _in_place(source, planned)
    except BaseException:
        source.close()
        raise


def adopted_record(source: Source | None) -> Record | None:
    """What the store goes on from, where it does."""
    return source.saved.record if source is not None and source.adopted is not None else None


def aside_of(source: Source | None, tiers: Tiers, plan: Plan) -> Aside | None:
    """Before the store opens: what commits hold beside weights and state; None where steps are not committed."""
    if tiers.store is None or not plan.aside_bytes:
        return None
    record = adopted_record(source)
    adopted: dict[str, list[int]] = {}
    if source is not None and record is not None:
        for name in source.saved.payload["blobs"]:
            numbers = source.saved.blob_extents(name)
            if all(
                record.parts_of(each, slot)["nbytes"].sum() == plan.aside_bytes for each in numbers for slot in (0, 1)
            ):
                adopted[name] = numbers
    return Aside(tiers.store, tiers.buffers(plan.aside_bytes, 1), plan.aside_bytes, plan.aside_pieces, adopted)


def close(source: Source | None) -> None:
    if source is not None:
        source.close()


def keep(source: Source, folders: Sequence[str]) -> None:
    """The run commits nothing: a step that was moved aside for it is its newest checkpoint."""
    source.close()
    for path in source.leftovers:
        if os.path.basename(path) == MOVED:
            note_saved(folders[0], path, source.saved.step)


def note_saved(folder: str, checkpoint: str, step: int) -> None:
    """Beside the store, for whoever finds it of no single step."""
    write_beside(folder, SAVED, {"folder": checkpoint, "step": step})


def note_none(folders: Sequence[str]) -> None:
    """A run has begun anew: it has no checkpoint yet."""
    for folder in folders[:1]:
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(folder, SAVED))


def forget(source: Source) -> None:
    """The step is committed at home: what it came from, and is nobody's now, goes."""
    source.close()
    for path in source.leftovers:
        if os.path.basename(path) == MOVED:
            remove_moved(path)
        else:
            _remove_abandoned(path, source)


def _remove_abandoned(folder: str, source: Source) -> None:
    """What lies in `folder` of the store that `source` came from; another run's, which may have begun there since, stays."""
    home = os.path.join(folder, FOLDER)
    with contextlib.suppress(
        StoreError, OSError, ValueError
    ):  # in use, gone, or a name that is no text: whose it is is not known
        lock = FolderLock(home)
        try:
            if folder == source.first_folder:
                found = payload_of_newest(home)
                mine = found is not None and found[0] == source.saved.step
            else:
                mine = read_text(os.path.join(home, HOME)) == source.first_folder
            if mine:
                remove_store(folder)
        finally:
            lock.release()


# --- which step -------------------------------------------------------------------------------------------------------


def _newest_of(folders: Sequence[str]) -> Source | None:
    """Of the store in `folders` and a step on its way: the later; the store where they are the same. One that cannot be read
    is passed over for the other, for neither is of a later step then (fuyou/runtime/moving.py): a store is in pieces
    between the moment when its step is on its way and that when it is committed at home."""
    moved = moved_in(folders)
    newest: Source | None = None
    failure: StoreError | StorageIOError | None = None
    for places in (folders, *([path] for path in moved)):
        try:
            source = read_source(places)
        except (StoreError, StorageIOError) as error:
            failure = failure or error
            continue
        if source is not None and (newest is None or source.saved.step > newest.saved.step):
            newest, source = source, newest
        close(source)
    if newest is not None:
        newest.leftovers += moved
    elif failure is not None:
        raise failure
    return newest


def _refuse_to_discard(folders: Sequence[str]) -> None:
    moved = moved_in(folders)
    if not moved and not any(was_left_open(folder) for folder in folders):
        return
    for homes in ([folders] if folders else []) + [[path] for path in moved]:
        saved = open_saved(homes)
        if saved is not None:
            saved.close()
            raise StateError(
                f"The nvme folder {homes[0]} holds step {saved.step} of a run that did not end in order: "
                "Config(resume=True) goes on from it, Config(resume=False) discards it and starts anew, as for a loop that goes "
                "on from checkpoints of its own (the Hugging Face Trainer's)."
            )


def _refuse_of_no_step(folder: str) -> None:
    """StateError where a run without commits was, and somebody may think that it can be gone on with."""
    noted = read_beside(folder, SAVED)
    saved = isinstance(noted, dict) and isinstance(noted.get("folder"), str)
    if is_dirty(folder):
        what = "was being updated in place (durability='checkpoint') when its run ended, and is of no single step"
    elif saved:
        what = "has no step: its run committed none (durability='checkpoint')"
    else:
        return
    if saved:
        cure = f"Config(resume={noted['folder']!r}) goes on from its newest checkpoint, of step {noted.get('step')}"
    else:
        cure = "it saved no checkpoint (run.save)"
    raise StateError(f"The store in {folder} {what}: {cure}, and Config(resume=False) starts anew.")


def _refuse_other(source: Source, planned: Planned, model: nn.Module) -> None:
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    names: dict[int, str] = {}
    frozen = []
    for unit, named in planned.packed:
        for name, parameter in named:
            shapes[name], names[id(parameter)] = (tuple(parameter.shape), unit.dtype), name
            frozen += [] if unit.optimized else [name]
    refuse_other_model(source.manifest, shapes, tied_names(model, names), source.saved.step)
    refuse_without_homes(source.tensors, frozen, source.saved.step)


# --- where to ---------------------------------------------------------------------------------------------------------


def _in_place(source: Source, planned: Planned) -> Source:
    """As it lies, where it may stay; where its store is in the new one's place, moved aside."""
    saved = source.saved
    if os.path.basename(saved.folders[0]) == MOVED or not set(saved.folders) & set(planned.folders):
        return source
    source.adopted = _adopted(source, planned)
    return source if source.adopted is not None else _moved(source, planned)


def _adopted(source: Source, planned: Planned) -> dict[tuple[int, int, str], int] | None:
    """The numbers of the extents that this run plans too; None where some are others."""
    plan, manifest, record = planned.plan, source.manifest, source.saved.record
    if not plan.through or list(source.saved.folders) != planned.folders or record.checksum != best_checksum().name:
        return None
    if manifest.chunk_elements != plan.chunk_elements or len(manifest.units) != len(planned.packed):
        return None
    found: dict[tuple[int, int, str], int] = {}
    for index, ((unit, named), numbers, theirs) in enumerate(
        zip(planned.packed, planned.numbers, manifest.units, strict=True)
    ):
        mine = [(name, tuple(parameter.shape)) for name, parameter in named]
        if mine != [(name, shape) for name, (shape, _) in theirs.members.items()]:
            return None
        if theirs.elements != numbers.elements or str(unit.dtype) != f"torch.{theirs.dtype}":
            return None
        wanted = {(kind, number): nbytes for kind, number, nbytes in committed_of(plan, numbers)}
        if wanted.keys() != {(kind, number) for kind, numbered in theirs.extents.items() for number in numbered}:
            return None
        for (kind, number), nbytes in wanted.items():
            extent = theirs.extents[kind][number]
            if any(record.parts_of(extent, slot)["nbytes"].sum() != nbytes for slot in range(plan.state_slots)):
                return None
            found[index, number, kind] = extent
    return found


def _moved(source: Source, planned: Planned) -> Source:
    """The step as a checkpoint in MOVED, beside the store, which is then free to be cleared."""
    saved = source.saved
    nbytes = int(saved.record.entries["nbytes"].sum())
    rooms = rooms_of(planned.folders, reuse=True)
    try:
        refuse_without_room(planned.plan.nvme_bytes + nbytes, rooms.total_bytes, rooms)
    except BudgetError as error:
        raise BudgetError(
            f"Step {saved.step} has another layout than this run plans, and a copy of it must lie beside the new store for a "
            f"while. {error}",
            tier="nvme", needed_bytes=error.needed_bytes, given_bytes=error.given_bytes,
        ) from None  # fmt: skip
    shared = [folder for folder in planned.folders if folder in saved.folders]
    place = os.path.join(max(shared, key=lambda folder: shutil.disk_usage(folder).free), MOVED)
    clear_moved(planned.folders)
    with contextlib.ExitStack() as locks:
        for folder in saved.folders:
            locks.callback(FolderLock(os.path.join(folder, FOLDER)).release)
        copy_saved(saved, place)
    saved.close()
    moved = read_source([place])
    if moved is None:
        raise StoreError(f"The copy of step {saved.step} in {place} cannot be read back.")
    moved.first_folder = saved.folders[0]
    moved.leftovers = [place, *(folder for folder in saved.folders if folder not in planned.folders)]
    return moved
