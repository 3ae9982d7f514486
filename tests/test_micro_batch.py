"""Vertical micro-batches: bits of plain PyTorch on the same slices, the traffic of one batch, the memory of one slice."""

from __future__ import annotations

import copy
import functools
from typing import Any

import models
import pytest
import torch
from sliced import case_of, slice_blocks
from test_equivalence import wrapped
from torch import nn

import fuyou

STEPS = range(2)


def micro_batched(model: nn.Module, optimizer: torch.optim.Optimizer, rows: int | None, **options: Any) -> fuyou.Run:
    config = fuyou.Config(micro_batch=rows, **options)
    return fuyou.wrap(model, optimizer, nvme=None, ram="1GiB", gpu="1GiB", device="cpu", config=config)


# --- the result: plain PyTorch with every block applied to the same slices ------------------------------------------


@functools.cache
def plain(name: str, rows: int, bf16: bool = False) -> tuple[list[float], dict[str, torch.Tensor]]:
    """(losses and norms, parameters) of the oracle; the batch of 8 is not always a multiple of `rows`."""
    case = case_of(name)
    model = case.model()
    if bf16:
        stepper: Any = models.PlainBf16(model)
        scheduler = models.schedule_of(stepper.inner)
    else:
        stepper = models.optimizer_of(models.groups_of(model))
        scheduler = models.schedule_of(stepper)
    seen = models.train(slice_blocks(model, rows), stepper, scheduler, case, clip=True, steps=STEPS)
    return seen, models.values_of(model)


@pytest.mark.parametrize(
    ("name", "rows", "place", "options"),
    [
        ("gpt", 1, "nvme", {}),
        ("gpt", 3, "ram", {"activations": "keep"}),
        ("gpt", 3, "ram", {"precision": "bf16"}),
        ("llama", 2, "nvme", {}),
        ("llama", 3, "ram", {"precision": "bf16", "activations": "keep"}),
        ("t5", 1, "ram", {}),  # a position bias of batch 1 that all rows share
        ("t5", 3, "nvme", {"activations": "keep"}),
        ("vit", 2, "ram", {}),
        ("mixtral", 3, "ram", {}),  # router logits leave by hooks inside of the blocks
    ],
    ids=str,
)
def test_bits_of_plain_pytorch_on_the_same_slices(name, rows, place, options, nvme, recwarn):
    seen, expected = plain(name, rows, options.get("precision") == "bf16")
    case = case_of(name)
    model = case.model()
    optimizer = models.optimizer_of(models.groups_of(model))
    scheduler = models.schedule_of(optimizer)
    with wrapped(model, optimizer, place, nvme, micro_batch=rows, **options) as run:
        found = models.train(model, run.optimizer, scheduler, case, clip=True, steps=STEPS)
        assert models.differing(model, expected) == []
        assert [note for note in run.report().dict()["notes"] if "micro_batch" in note] == []
    assert found == seen
    assert [str(each.message) for each in recwarn if "micro_batch" in str(each.message)] == []


def test_slices_of_the_whole_batch_are_the_whole_batch():
    """The oracle is not the whole batch by chance: its bits are others, and those of one slice are the same."""
    case = case_of("gpt")
    whole = case.model()
    optimizer = models.optimizer_of(models.groups_of(whole))
    seen = models.train(whole, optimizer, models.schedule_of(optimizer), case, clip=True, steps=STEPS)
    assert seen != plain("gpt", 3)[0]
    for rows in (8, 100, None):
        model = case.model()
        optimizer = models.optimizer_of(models.groups_of(model))
        scheduler = models.schedule_of(optimizer)
        with micro_batched(model, optimizer, rows) as run:
            assert models.train(model, run.optimizer, scheduler, case, clip=True, steps=STEPS) == seen
            assert models.differing(model, models.values_of(whole)) == []


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_cache_that_the_forward_fills_is_filled_as_a_whole(name):
    """use_cache=True is the default in training too: each slice fills a cache of its own."""
    case = case_of(name, use_cache=True)
    oracle, model = slice_blocks(case.model(), 3), case.model()
    whole = case.model().eval()(**case.batch(0)).past_key_values
    with micro_batched(model, models.optimizer_of(models.groups_of(model)), 3):
        for index in range(2):
            for each in (oracle, model):
                torch.manual_seed(index)
                each(**case.batch(index)).loss.backward()
            for (path, ours), theirs in zip(model.named_parameters(), oracle.parameters(), strict=True):
                assert torch.equal(ours.grad, theirs.grad), path
        found = model.eval()(**case.batch(0)).past_key_values
        for layer, expected in zip(found.layers, whole.layers, strict=True):
            assert layer.is_initialized
            torch.testing.assert_close(layer.keys, expected.keys)
            torch.testing.assert_close(layer.values, expected.values)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_generating_makes_the_same_tokens(name):
    case = case_of(name)
    model = case.model()
    oracle = copy.deepcopy(model).eval()
    tokens = case.batch(3)["input_ids"][:, :5]
    with micro_batched(model, models.optimizer_of(models.groups_of(model)), 3):
        for how in ({"do_sample": False}, {"do_sample": False, "num_beams": 2}):
            expected = oracle.generate(tokens, max_new_tokens=6, **how)
            assert torch.equal(model.eval().generate(tokens, max_new_tokens=6, **how), expected)


def test_packed_rows_with_positions_and_masks_of_their_own():
    case = case_of("llama")

    def packed(index: int) -> dict[str, Any]:
        positions = torch.stack([torch.cat([torch.arange(n), torch.arange(16 - n)]) for n in range(3, 11)])
        return {**case.batch(index), "position_ids": positions}

    def masked(index: int) -> dict[str, Any]:
        mask = torch.ones(8, 16, dtype=torch.long)
        mask[1, 5:] = mask[6, 9:] = 0
        return {**case.batch(index), "attention_mask": mask}

    oracle, model = slice_blocks(case.model(), 3), case.model()
    with micro_batched(model, models.optimizer_of(models.groups_of(model)), 3) as run:
        for batch in (packed(0), masked(1)):
            losses = []
            for each in (oracle, model):
                torch.manual_seed(5)
                loss = each(**batch).loss
                loss.backward()
                losses.append(loss.item())
            assert losses[0] == losses[1]
        for ours, theirs in zip(model.parameters(), oracle.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad)
        assert not any("micro_batch" in note for note in run.report().dict()["notes"])


# --- traffic and memory -----------------------------------------------------------------------------------------------


def test_traffic_does_not_depend_on_the_slices_and_activations_fall(nvme):
    """One batch of 8 rows: weights and gradients cross once a step; the device holds one slice's saved tensors.

    In backward a block's recomputed tensors are held beside what all blocks hold, so its peak is a line in the rows. When forward
    ends the inputs and logits are held, whatever the rows.
    """

    def batch(index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(64, (8, 32), generator=torch.Generator().manual_seed(index))
        return {"tokens": tokens, "labels": tokens}

    case = models.Case(functools.partial(models.Gpt, width=64, layers=3, vocabulary=64, dropout=0.0), batch)
    bytes_moved, peaks, forward = {}, {}, {}
    for rows in (None, 8, 4, 2, 1):
        model = case.model()
        optimizer = models.optimizer_of(models.groups_of(model))
        folder = nvme / str(rows)
        folder.mkdir()
        config = fuyou.Config(micro_batch=rows, activations="recompute")
        # Half of the state is on the drive, and staging holds all gradients that go there: none has to be read again.
        with fuyou.wrap(model, optimizer, nvme=folder, ram=2_400_000, gpu="1GiB", device="cpu", config=config) as run:
            peaks[rows] = forward[rows] = 0
            book = run._ledger._book

            def note(tier: str, category: str, nbytes: int, rows=rows, book=book, held=run._ledger.held) -> None:
                book(tier, category, nbytes)
                most = forward if torch._C._current_graph_task_id() == -1 else peaks
                most[rows] = max(most[rows], held("device", "activations"))

            run._ledger._book = note
            before: dict[str, int] = {}
            for steps in (range(3), range(3, 8)):  # the first find out how often gradients come, and are updated late
                models.train(model, run.optimizer, None, case, clip=False, steps=steps, accumulation=lambda step: 1)
                run.settle()
                for unit in run._units:
                    unit.arrival.wait()  # the next forward's first blocks
                now = run._tiers.traffic()
                bytes_moved[rows] = {name: now[name] - before.get(name, 0) for name in now}
                before = now
            assert run.report().dict()["updates"]["dropped"] == 0
    assert bytes_moved[None]["nvme_read_bytes"] > 0
    for rows, traffic in bytes_moved.items():
        for name, value in traffic.items():
            assert abs(value - bytes_moved[None][name]) <= 0.02 * bytes_moved[None][name], (rows, name)
    assert peaks[8] == peaks[None]
    assert peaks[8] - peaks[4] == 2 * (peaks[4] - peaks[2]) == 4 * (peaks[2] - peaks[1]) > 0
    assert len(set(forward.values())) == 1, (forward, peaks)
    assert max(peaks[1], forward[1]) < 0.5 * peaks[8]
