"""verify_reads: bytes that come back from a drive other than they were written are told before anybody uses them."""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
import zlib

import commit_tools
import pytest
import torch
from commit_tools import PAGE, fill
from commit_tools import job as job
from drive_tools import folders_in
from fault_tools import KINDS, Memory, Training, plain, same
from resuming import Loop, differences, uninterrupted
from test_activations_memory import TOKENS, WIDTH, Stack
from test_faults_drives import close_broken, data, train_until_refused

import fuyou
from fuyou.core.errors import StateError, StorageIOError, StoreError
from fuyou.core.ticket import DONE
from fuyou.tiers.checksum import best_checksum
from fuyou.tiers.extents import Extent, Slot
from fuyou.tiers.scratch import Scratch
from fuyou.tiers.verified import Verified

OTHER = "came back from the drive with other bytes"


def flip(slot: Slot, at: int) -> str:
    """Change byte `at` of a slot in its file, from outside of the engine; the place, as an error is to name it."""
    for part in slot:
        if at < part.nbytes:
            descriptor = os.open(part.drive.path, os.O_RDWR)
            byte = os.pread(descriptor, 1, part.offset + at)
            assert os.pwrite(descriptor, bytes([byte[0] ^ 1 << at % 8]), part.offset + at) == 1
            os.fsync(descriptor)
            os.close(descriptor)
            return f"{part.nbytes} bytes at {part.offset} of {part.drive.path}"
        at -= part.nbytes
    raise AssertionError("beyond the slot")


def current(extent: Extent) -> Slot:
    return extent.slots[extent._current]


def in_file(slot: Slot) -> bytes:
    found = b""
    for part in slot:
        with open(part.drive.path, "rb") as file:
            found += os.pread(file.fileno(), part.nbytes, part.offset)
    return found


# ---- extents


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 60))])
def test_a_read_is_refused_where_the_file_has_other_bytes_than_were_written_and_nowhere_else(nvme, job, seed):
    """Random programs of writes, guesses, commits and bytes changed anywhere; the file itself says what is right."""
    draw = random.Random(seed)
    made = job(*folders_in(nvme, 1 + seed % 2), durable=seed % 3 > 0, kind=KINDS[seed % 3], verify=True)
    extents = made.open(*[(PAGE * draw.randint(1, 5), draw.randint(1, 2)) for _ in range(6)], committed=seed % 3 > 1)
    contents: dict[Extent, bytes] = {}
    refused = right = step = 0
    for _ in range(120):
        extent, action = draw.choice(extents), draw.random()
        if extent not in contents or action < 0.3:
            if extent.index >= 0 and len(extent.slots) == 1 and extent in contents:
                continue  # what a record may name is not written over
            contents[extent] = draw.randbytes(extent.nbytes)
            made.write(extent, contents[extent])
        elif action < 0.5 and extent.can_write_ahead:
            guess = draw.randbytes(extent.nbytes)
            made.start(extent, guess, ahead=True).wait()
            if draw.random() < 0.5:
                extent.accept()
                contents[extent] = guess
            else:
                extent.drop()
        elif action < 0.6:
            flip(draw.choice(extent.slots), draw.randrange(extent.nbytes))
        elif action < 0.65 and seed % 3 > 1:
            step += 1
            made.store.commit(step, {}).wait()
        elif in_file(current(extent)) == contents[extent]:
            assert made.read(extent) == contents[extent]
            right += 1
        else:
            with pytest.raises(StorageIOError, match=OTHER):
                made.read(extent)
            refused += 1
    assert refused and right


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("drives", [1, 2])
def test_the_error_names_what_and_where_and_both_checksums(nvme, job, drives, durable):
    made = job(*folders_in(nvme, drives), durable=durable, verify=True)
    _, extent = made.open((PAGE, 1), (64 * PAGE, 2), committed=durable)
    extent.what = "the weights of layers.Q"
    content = random.Random(0).randbytes(extent.nbytes)
    made.write(extent, content)
    place = flip(current(extent), 50 * PAGE)
    with pytest.raises(StorageIOError, match=OTHER) as caught:
        made.read(extent)
    checksum = {"crc32c": commit_tools.crc32c, "crc32": zlib.crc32}[best_checksum().name]
    text = str(caught.value)
    assert place in text and "The weights of layers.Q (262144 bytes) came back" in text and "\n" not in text
    assert f"is {checksum(in_file(current(extent))):08x}, not {checksum(content):08x}" in text


def test_without_it_nobody_notices_but_whoever_asks(nvme, job):
    """The control of these tests; a copy that gets a checksum anew is made of what is right only."""
    made = job(nvme)
    (extent,) = made.open((PAGE, 2))
    made.write(extent, fill(1, extent))
    flip(current(extent), 7)
    assert made.read(extent) != fill(1, extent)
    memory = Memory(PAGE)
    with pytest.raises(StorageIOError, match=OTHER):
        extent.read(memory.address, memory, check=True).wait()


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_read_under_way_has_the_checksum_of_the_slot_that_it_reads(nvme, job, kind, slots):
    made = job(nvme, durable=False, kind=kind, verify=True)
    (extent,) = made.open((32 * PAGE, slots), committed=False)
    made.write(extent, fill(0, extent))
    for value in range(1, 40):
        memory = Memory(extent.nbytes)
        read = extent.read(memory.address, memory)
        written = made.start(extent, fill(value, extent))
        read.wait()
        assert memory.bytes() == fill(value - 1, extent)
        written.wait()


def test_room_of_one_step_is_verified_too(nvme, job):
    made = job(nvme, durable=False, verify=True)
    made.open()
    scratch = Scratch(made.store, "activations", region_bytes=8 * PAGE)
    places = [scratch.take(3 * PAGE, f"what layers.{each} saves") for each in range(4)]
    memories = [Memory(3 * PAGE, bytes([each]) * 3 * PAGE) for each in range(4)]
    for place, memory in zip(places, memories, strict=True):
        place.write(memory.address, memory).wait()
    where = flip(places[2]._slot, 2 * PAGE)
    for number, place in enumerate(places):
        target = Memory(3 * PAGE)
        if number == 2:
            with pytest.raises(StorageIOError, match=rf"What layers.2 saves \(12288 bytes\) {OTHER}") as caught:
                place.read(target.address, target).wait()
            assert where in str(caught.value)
        else:
            place.read(target.address, target).wait()
            assert target.bytes() == memories[number].bytes()


# ---- the ticket


@pytest.mark.parametrize("wrong", [False, True])
def test_every_wait_says_the_same_whatever_becomes_of_the_memory(wrong):
    """Once somebody has been told that the read has ended, the memory is its holder's again."""
    memory = Memory(1 << 20, bytes(1 << 20))
    expected = best_checksum().of(memory.address, 1 << 20)
    if wrong:
        memory.map[77] = 1
    (part,) = [type("Part", (), {"nbytes": 1 << 20, "offset": 0, "drive": type("Drive", (), {"path": "/file"})})]
    ticket = Verified(DONE, memory.address, expected, (part,), "the bytes", memory)  # type: ignore[arg-type]
    assert ticket.done()
    memory.map[77] = 0 if wrong else 1
    said: list[bool] = []

    def wait() -> None:
        try:
            ticket.wait()
            said.append(False)
        except StorageIOError as error:
            assert OTHER in str(error)
            said.append(True)

    threads = [threading.Thread(target=wait) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert said == [wrong] * 8


# ---- runs


@pytest.mark.parametrize("durability", ["step", "checkpoint"])
@pytest.mark.parametrize("update", ["speculative", pytest.param("step", marks=pytest.mark.slow)])
def test_training_has_the_bits_of_plain_pytorch(nvme, durability, update):
    losses, state = uninterrupted(6)
    loop = Loop()
    with loop.wrapped(nvme, ram="600KiB", verify_reads=True, durability=durability, update=update) as run:
        found = loop.steps(4)
        checkpoint = nvme / "saved"
        run.save(checkpoint)
    loop = Loop()
    with loop.wrapped(
        nvme, ram="600KiB", verify_reads=True, durability=durability, update=update,
        resume=True if durability == "step" else str(checkpoint),
    ) as run:  # fmt: skip
        assert found + loop.steps(2) == losses and differences(loop.state(), state) == []
        assert run.report().dict()["traffic"]["nvme_read_bytes_per_step"] > 0


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 12))])
def test_late_operations_and_poisoned_memory_change_nothing(nvme, seed):
    """Whoever checked a read after its memory was somebody else's would meet NaN here."""
    expected, weights = plain(3)
    training = Training()
    config = fuyou.Config(debug_races=seed, verify_reads=True)
    with fuyou.wrap(
        training.model, training.optimizer, nvme=nvme, ram="600KiB", gpu="256MiB", device="cpu", config=config
    ) as run:
        training.optimizer = run.optimizer
        assert [training.step() for _ in range(3)] == expected and same(training.weights(), weights)


def weights_and_state(run: fuyou.Run) -> dict[str, Extent]:
    chunk = max((chunk for unit in run._units for chunk in unit.chunks if chunk.state), key=lambda each: each.count)
    found = {"the weights": chunk.weights.home, "the optimizer state": chunk.state.home}
    assert all(isinstance(each, Extent) for each in found.values())
    return found


@pytest.mark.parametrize("durability", ["step", "checkpoint"])
@pytest.mark.parametrize("what", ["the weights", "the optimizer state"])
@pytest.mark.parametrize("update", [pytest.param("speculative", marks=pytest.mark.slow), "step"])
def test_a_wrong_byte_under_a_run_is_told_and_never_trained_with(nvme, tmp_path, what, durability, update):
    expected, _ = plain(2)
    training = Training()
    config = fuyou.Config(verify_reads=True, durability=durability, update=update)
    run = fuyou.wrap(
        training.model, training.optimizer, nvme=nvme, ram="600KiB", gpu="256MiB", device="cpu", config=config
    )
    training.optimizer = run.optimizer
    losses = [training.step(), training.step()]
    run.settle()
    if durability == "step":
        shutil.copytree(nvme, tmp_path / "whole")
    extent = weights_and_state(run)[what]
    place = flip(current(extent), random.Random(str((what, durability, update))).randrange(extent.nbytes))
    error = train_until_refused(training, 2)
    assert isinstance(error, (StorageIOError, StateError)) and place in str(error) and OTHER in str(error)
    name = next(name for name, each in training.model.named_parameters() if name in str(error))
    assert f"{what} of {name}".lower() in str(error).lower() and losses == expected
    close_broken(run)
    if durability == "step":  # the newest step named these very bytes, and says so; its copy of before is whole
        again = Training()
        with pytest.raises(StoreError, match=f"{what} of .*{name}.* not those that were committed"):
            again.wrap(nvme, resume=True)
        again = Training()
        with again.wrap(tmp_path / "whole", resume=True) as run:
            again.steps, again.optimizer = 2, run.optimizer
            assert [again.step()] == plain(3)[0][2:]


def test_a_hole_in_the_data_file_is_told(nvme):
    """Cut short by somebody, and made longer again by a later write: what is between reads as zeros."""
    training = Training()
    run = training.wrap(nvme, ram="600KiB", update="step", verify_reads=True)
    training.step()
    run.settle()
    size = data(nvme).stat().st_size
    os.truncate(data(nvme), size // 2 // PAGE * PAGE)
    os.truncate(data(nvme), size)
    error = train_until_refused(training, 3)
    assert isinstance(error, StorageIOError) and OTHER in str(error) and str(data(nvme)) in str(error)
    close_broken(run)


def quiet(run: fuyou.Run) -> None:
    """Nothing is on its way to the drives."""
    until = time.monotonic() + 60
    while run._tiers.in_flight() or run._movers.gradients._closing:
        assert time.monotonic() < until
        run._tiers.writes.reap()
        for chunk, (stored, _, _) in [*run._movers.gradients._closing.items()]:
            stored.wait()
            del run._movers.gradients._closing[chunk]
        time.sleep(0.01)


def test_a_wrong_byte_in_a_gradient_is_told(nvme):
    training = Training()
    run = training.wrap(nvme, ram="600KiB", update="step", verify_reads=True)
    training.backward()
    quiet(run)
    chunk = next(chunk for unit in run._units for chunk in unit.chunks if isinstance(chunk.gradients.home, Extent))
    place = flip(current(chunk.gradients.home), 1)
    error = train_until_refused(training, 1)
    assert isinstance(error, StorageIOError) and place in str(error)
    assert f"The gradients of {chunk.parts[0][0].name}" in str(error)
    close_broken(run)


def test_a_wrong_byte_in_an_activation_is_told_and_a_forward_repeated(nvme):
    def batch() -> torch.Tensor:
        return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))

    model = Stack()
    expected = model(batch()).square().mean()
    expected.backward()
    gradients = [each.grad.clone() for each in model.parameters()]
    model.zero_grad()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    config = fuyou.Config(activations="nvme", verify_reads=True)
    with fuyou.wrap(model, optimizer, nvme, ram="24MiB", gpu="1GiB", device="cpu", config=config) as run:

        def swapped() -> torch.Tensor:
            loss = model(batch()).square().mean()
            for worker in run._movers.stash._workers.values():
                worker.submit(lambda: None, "nothing, behind all the rest").wait()
            return loss

        loss = swapped()
        places = [piece.home for each in run._movers.stash._stashed.values() for piece in each.pieces]
        where = flip(places[0]._slot, 5)
        with pytest.raises(StorageIOError, match=r"What layers\.\d saves \(\d+ bytes\) " + OTHER) as caught:
            loss.backward()
        assert where in str(caught.value)
        del loss, places, caught
        run.optimizer.zero_grad()
        loss = swapped()
        loss.backward()
        assert torch.equal(loss, expected)
        assert all(
            torch.equal(a, b)
            for a, b in zip([each.grad.clone() for each in model.parameters()], gradients, strict=True)
        )


def test_a_checkpoint_and_an_export_are_made_of_right_bytes_only(nvme, tmp_path):
    """Without verify_reads too: their own checksums would be those of wrong bytes, and hold for ever."""
    training = Training()
    with training.wrap(nvme, ram="600KiB") as run:
        training.step()
        run.settle()
        extent = weights_and_state(run)["the weights"]
        flip(current(extent), 3)
        with pytest.raises(StorageIOError, match=OTHER):
            run.save(tmp_path / "saved")
            run.settle()
        assert not (tmp_path / "saved").exists()
        with pytest.raises(StorageIOError, match=OTHER):
            run.save_pretrained(tmp_path / "exported")
        flip(current(extent), 3)  # the same bit: it is right again
        run.save(tmp_path / "saved")
        run.settle()
