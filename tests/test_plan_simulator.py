"""Models on machines: the published RTX 4090 rows, what fits and what does not, hardware files.

The rows are those of the Fuyou paper (arXiv 2403.06504) and its artifact, TFLOPS read as 8N.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuyou.core.errors import ConfigError
from fuyou.plan.machine import FOLDER, Drive, Machine, load_machine, machine_of, shipped
from fuyou.plan.shapes import ModelShape, Work, block_numbers, gpt
from fuyou.plan.simulator import Budgets, Request, Simulation, change_that_fits, default_budgets, simulate
from fuyou.plan.systems import PAPER_SYSTEM, System, fuyou_system

GB, GIB = 10**9, 2**30
FUYOU = fuyou_system()
B13 = gpt(40, 40, 5120, 50257, head=False)
B175 = gpt(96, 96, 12288, 50257, head=False)
# (model, batch, drives, TFLOPS at 8N; None: out of memory)
ROWS = (
    *((B13, batch, 12, tflops) for batch, tflops in ((8, 42.8), (16, 84.3), (32, 143.1), (64, 155.8), (128, 153.8))),
    *((B13, 32, drives, tflops) for drives, tflops in ((1, 37.5), (2, 64.3), (3, 81.1), (6, 121.7), (12, 142.0))),
    (B175, 8, 12, 52.6),
    (B175, 16, 12, 86.9),
    (B175, 32, 12, None),
)


def asked(
    model: ModelShape, machine: Machine, batch: int = 8, system: System = FUYOU, budgets: Budgets | None = None,
    sequence: int = 1024, accumulation: int = 1,
) -> Simulation:  # fmt: skip
    budgets = default_budgets(machine, system) if budgets is None else budgets
    return simulate(Request(model, machine, system, Work(batch, sequence), accumulation, budgets))


def test_the_published_rows_of_the_4090_within_15_percent():
    paper = load_machine("rtx4090-12xp5510")
    worst = 0.0
    for model, batch, drives, published in ROWS:
        found = asked(model, paper.with_drives(drives), batch, PAPER_SYSTEM)
        size = f"{model.elements / 1e9:.0f}B, batch {batch}, {drives} drives"
        if published is None:
            print(f"{size}: published out of memory, predicted {'fits' if found.fits else 'does not fit'}")
            assert not found.fits
            continue
        assert found.fits, size
        error = found.tflops(8) / published - 1
        worst = max(worst, abs(error))
        print(f"{size}: published {published}, predicted {found.tflops(8):.1f} TFLOPS at 8N, {error:+.1%}")
        assert abs(error) < 0.15, size
        # 8N written out: N parameters, tokens, seconds.
        tokens = batch * 1024
        expected = 8 * model.elements * tokens / found.prediction.seconds_per_step / 1e12
        assert found.tflops(8) == pytest.approx(expected) and found.tflops(6) == pytest.approx(expected * 6 / 8)
    print(f"worst {worst:.1%}")


def test_why_175b_at_batch_32_does_not_fit():
    """Two blocks of weights, two of gradients, and 16 tensors of batch x sequence x hidden, in fp16."""
    machine = load_machine("rtx4090-12xp5510")
    memory = 24 * GIB - GIB // 2  # a CUDA context
    for model, hidden, batch in ((B13, 5120, 128), (B175, 12288, 16), (B175, 12288, 32)):
        block = 12 * hidden**2 + 13 * hidden
        needed = 2 * block * 2 + 2 * block * 2 + 16 * batch * 1024 * hidden * 2
        found = asked(model, machine, batch, PAPER_SYSTEM)
        assert found.prediction.tier_bytes("device") == needed
        assert found.fits == (needed <= memory)
    assert [[each.tier for each in way] for way in found.ways] == [["device"]]
    assert needed <= found.ways[0][0].needed_bytes <= needed + 2**20
    assert needed / GB == pytest.approx(27.4, abs=0.1)
    assert asked(B175, machine, found.batch_that_fits, PAPER_SYSTEM).fits
    assert not asked(B175, machine, found.batch_that_fits + 1, PAPER_SYSTEM).fits
    assert f"--batch {found.batch_that_fits} in place of 32" in change_that_fits(found)


def test_the_papers_bytes_a_parameter():
    found = asked(B13, load_machine("rtx4090-12xp5510"), 8, PAPER_SYSTEM)
    swapped = found.activations.swapped_bytes
    assert found.prediction.nvme_write_bytes - swapped == 14 * B13.elements
    assert found.prediction.nvme_read_bytes - swapped == 14 * B13.elements
    assert 14 * B13.elements == pytest.approx(182e9, rel=0.02)  # the artifact's


def test_a_gpt_block_written_out():
    batch, sequence, h = 3, 512, 1024
    tokens = batch * sequence
    (block,) = block_numbers(
        gpt(1, 16, h).blocks, Work(batch, sequence), flops_per_s=1.0, itemsize=2, temporaries=False, tile_bytes=0
    )
    assert block.elements == 12 * h * h + 13 * h and block.weight_bytes == 2 * block.elements
    assert block.forward_s == 24 * tokens * h * h + 4 * tokens * sequence * h
    assert block.backward_s == 2 * block.forward_s
    assert sum(item.recompute_s for item in block.items) == block.forward_s
    read = sum(item.nbytes for item in block.items if item.read_by_backward)
    assert block.input_bytes + read == 16 * tokens * h * 2
    best = max(block.items, key=lambda item: item.recompute_s / item.nbytes)
    rest = [each for each in block.items if each.name in ("qkv", "attention projection", "mlp input")]
    assert best.name == "mlp output"
    assert all(best.recompute_s / best.nbytes == 4 * each.recompute_s / each.nbytes for each in rest)


def test_a_vocabulary_is_an_embedding_and_a_tied_head():
    bare, whole = gpt(2, 4, 64), gpt(2, 4, 64, 1000)
    assert whole.elements - bare.elements == 64 * 1000
    numbers = block_numbers(whole.blocks, Work(1, 8), flops_per_s=1.0, itemsize=2, temporaries=True, tile_bytes=GB)
    assert [each.name for each in numbers] == ["embedding", "layers.0", "layers.0", "head"]
    assert numbers[-1].forward_s == 2 * 8 * 64 * 1000 and numbers[0].forward_s == 0
    assert numbers[-1].tied_bytes == numbers[-1].weight_bytes == 2 * 64 * 1000


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [((2, 3, 64), "no multiple of --heads 3"), ((0, 1, 64), "--layers 0"), ((1, 1, 64, 0), "--vocab 0")],
)
def test_shapes_that_cannot_be(arguments, reason):
    with pytest.raises(ConfigError, match=reason):
        gpt(*arguments)


# --- what fits ------------------------------------------------------------------------------------------------------

DESK = Machine(
    "desk", 1.4e14, 24 * GIB, 2e10, 2e10, 128 * GIB, 6e10, 16, (Drive(6e9, 3.5e9, 2 * 10**12, 1.2e15),) * 2, 2.4e10, 0.5
)
SMALL = gpt(24, 16, 2048, 50257)


def test_more_of_anything_is_never_slower():
    base = asked(B13, DESK, 8)
    assert base.fits
    budgets = default_budgets(DESK, FUYOU)
    for better in (
        asked(B13, DESK.with_drives(4), 8),
        asked(B13, replace(DESK, host_to_device_bytes_per_s=4e10, device_to_host_bytes_per_s=4e10), 8),
        asked(B13, replace(DESK, flops_per_s=2.8e14), 8),
        asked(B13, replace(DESK, dram_bytes_per_s=1.2e11), 8),
        *(asked(B13, DESK, 8, budgets=replace(budgets, host=n * budgets.host)) for n in (2, 3, 8)),
        *(asked(B13, DESK, 8, budgets=replace(budgets, device=n * budgets.device)) for n in (2, 3)),
    ):
        assert better.prediction.seconds_per_step <= base.prediction.seconds_per_step * 1.005


def test_a_plan_that_fits_is_within_every_budget():
    for batch in (1, 16):
        for host in (16, 64):
            for drives in (1, 4):
                machine = DESK.with_drives(drives)
                budgets = Budgets(int(16 * GIB), host * GIB, machine.nvme_bytes)
                found = asked(SMALL, machine, batch, budgets=budgets)
                assert found.fits
                for tier in ("device", "host", "nvme"):
                    assert found.prediction.tier_bytes(tier) <= budgets.of(tier)


def test_host_memory_is_used_to_the_last_byte_where_the_drives_bind():
    for host in (4 * GIB, 4 * GIB + 1, 5 * GIB, 7 * GB):
        found = asked(SMALL, DESK, 1, budgets=Budgets(16 * GIB, host, DESK.nvme_bytes))
        assert found.prediction.bound_by == "nvme"
        assert host - 100 < found.prediction.tier_bytes("host") <= host


def test_without_a_drive_everything_is_in_host_memory():
    machine = DESK.with_drives(0)
    found = asked(SMALL, machine, 4)
    assert found.fits and found.prediction.nvme_read_bytes == found.prediction.nvme_write_bytes == 0
    # 2 bytes of weights, 2 of gradients and 10 of state for every parameter, and something to work with
    assert found.prediction.tier_bytes("host") >= 14 * SMALL.elements
    short = asked(B13, machine, 4)
    assert not short.fits and short.batch_that_fits is None
    ((need,),) = short.ways
    assert need.tier == "host" and need.needed_bytes == pytest.approx(14 * B13.elements, rel=0.02)


@pytest.mark.parametrize(
    ("budgets", "ways"),
    [
        (Budgets(GIB, 64 * GIB, 2000 * GB), [["device"]]),
        (Budgets(16 * GIB, 64 * GIB, 60 * GB), [["host"], ["nvme"]]),
        (Budgets(GIB, 64 * GIB, 60 * GB), [["device", "host"], ["device", "nvme"]]),
    ],
)
def test_the_smallest_change_does_fit(budgets, ways):
    found = asked(B13, DESK, 4, budgets=budgets)
    assert not found.fits and [[each.tier for each in way] for way in found.ways] == ways
    for way in found.ways:
        raised = replace(budgets, **{need.tier: need.needed_bytes for need in way})
        assert asked(B13, DESK, 4, budgets=raised).fits
        for need in way:
            assert need.given_bytes == budgets.of(need.tier) < need.needed_bytes
            assert str(need.needed_bytes) in change_that_fits(found)
            almost = replace(raised, **{need.tier: need.needed_bytes - 2 * 2**20})
            assert not asked(B13, DESK, 4, budgets=almost).fits


@settings(max_examples=15, deadline=None)
@given(
    layers=st.sampled_from([2, 12, 40]), hidden=st.sampled_from([512, 5120]), vocab=st.sampled_from([None, 50257]),
    drives=st.sampled_from([0, 1, 6]), gpus=st.sampled_from([1, 4]), precision=st.sampled_from(["bf16", "fp32"]),
    batch=st.sampled_from([1, 3, 70]), sequence=st.sampled_from([128, 4096]), accumulation=st.sampled_from([1, 3]),
    device=st.sampled_from([1, 4, 40]), host=st.sampled_from([1, 8, 64, 700]), nvme=st.sampled_from([10, 100, 3000]),
)  # fmt: skip
def test_any_plan_is_within_budgets_and_any_change_is_enough(
    layers, hidden, vocab, drives, gpus, precision, batch, sequence, accumulation, device, host, nvme
):
    machine = replace(DESK.with_drives(drives), gpu_count=gpus)
    budgets = Budgets(device * GIB, host * GIB, nvme * GB if drives else 0)
    request = Request(
        gpt(layers, 8, hidden, vocab), machine, fuyou_system(precision), Work(batch, sequence), accumulation, budgets
    )
    found = simulate(request)
    if found.fits:
        assert all(found.prediction.tier_bytes(tier) <= budgets.of(tier) for tier in ("device", "host", "nvme"))
        for tier in ("device", "host"):
            more = simulate(replace(request, budgets=replace(budgets, **{tier: 2 * budgets.of(tier)})))
            assert more.prediction.seconds_per_step <= found.prediction.seconds_per_step * 1.01
        return
    assert found.ways
    for way in found.ways:
        raised = replace(budgets, **{need.tier: need.needed_bytes for need in way})
        assert simulate(replace(request, budgets=raised)).fits
    if found.batch_that_fits is not None:
        assert simulate(replace(request, work=Work(found.batch_that_fits, sequence))).fits
    if found.micro_batch_that_fits is not None:
        assert simulate(replace(request, slices=batch // found.micro_batch_that_fits)).fits


def test_a_smaller_batch_is_named_where_it_fits():
    found = asked(B13, DESK, 512)
    assert not found.fits
    assert found.batch_that_fits and asked(B13, DESK, found.batch_that_fits).fits
    assert not asked(B13, DESK, found.batch_that_fits + 1).fits


def test_gpus_multiply_tokens_and_share_the_rest():
    one, two = (asked(B13, replace(DESK, gpu_count=n), 8) for n in (1, 2))
    assert two.tokens_per_step == 2 * one.tokens_per_step == 2 * 8 * 1024
    assert two.prediction.seconds_per_step >= one.prediction.seconds_per_step * 0.999
    assert one.tokens_per_second < two.tokens_per_second <= 2.001 * one.tokens_per_second


def test_accumulation_takes_longer_and_updates_once():
    one, four = (asked(B13, DESK, 8, accumulation=n) for n in (1, 4))
    assert four.tokens_per_step == 4 * one.tokens_per_step
    assert one.prediction.seconds_per_step < four.prediction.seconds_per_step < 4 * one.prediction.seconds_per_step


def test_drive_life_written_out():
    found = asked(B13, DESK, 8)
    steps = 2 * 1.2e15 / found.prediction.nvme_write_bytes
    assert found.drive_life_steps == pytest.approx(steps)
    assert found.drive_life_days == pytest.approx(steps * found.prediction.seconds_per_step / 86400)
    assert asked(SMALL, DESK.with_drives(0), 4).drive_life_steps == math.inf


# --- hardware files -------------------------------------------------------------------------------------------------


def test_every_shipped_file_is_right_and_has_sources():
    assert {"rtx4090-12xp5510", "rtx4090-1xgen4", "rtx4090-2xgen4", "rtx4090-4xgen4", "h200-4xgen5"} <= set(shipped())
    for name in shipped():
        machine = load_machine(name)
        assert machine.name == name and machine.description and machine.drives
        values = json.loads((FOLDER / f"{name}.json").read_text())
        figures = [values, *values["drives"]]
        for figure in (each for group in figures for key, each in group.items() if key not in ("count", "drives")):
            if not isinstance(figure, str):
                assert len(figure["source"]) > 5, (name, figure)
        assert asked(SMALL, machine, 1).fits, name


GOOD = {
    "name": "mine", "flops_per_s": 1e14, "device_bytes": "24GiB", "host_bytes": 2**36, "cores": 8,
    "host_to_device_bytes_per_s": {"value": 2e10, "source": "measured"}, "device_to_host_bytes_per_s": 2e10,
    "dram_bytes_per_s": 6e10,
    "drives": [{"count": 2, "read_bytes_per_s": 6e9, "write_bytes_per_s": 3e9, "capacity_bytes": "2TB"}],
}  # fmt: skip


def test_a_hardware_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(GOOD))
    machine = load_machine(str(path))
    assert (
        machine.device_bytes == 24 * GIB
        and machine.host_bytes == 2**36
        and machine.drives[1].capacity_bytes == 2 * 10**12
    )
    assert machine.host_to_device_bytes_per_s == 2e10 and machine.tail_s == 0 and machine.endurance_bytes == math.inf
    assert machine.read_bytes_per_s == 12e9 and machine.nvme_s(12e9, 6e9) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"flops": 1e14}, r"'flops', which means nothing: did you mean 'flops_per_s'\?"),
        ({"flops_per_s": None}, "flops_per_s=None is not a number"),
        ({"flops_per_s": True}, "flops_per_s=True is not a number"),
        ({"flops_per_s": "fast"}, "flops_per_s='fast' is not a number"),
        ({"flops_per_s": math.inf}, "flops_per_s=inf is not a number"),
        ({"flops_per_s": -1}, "flops_per_s=-1 must be more than 0"),
        ({"dram_bytes_per_s": 0}, "dram_bytes_per_s=0 must be more than 0"),
        ({"tail_s": -1}, "tail_s=-1 must be at least 0"),
        ({"device_bytes": "24 bananas"}, "device_bytes='24 bananas' is not a size"),
        ({"device_bytes": 1.5}, "device_bytes=1.5 is not a size"),
        ({"cores": 0}, "cores=0 must be a whole number"),
        ({"cores": 1.5}, "cores=1.5 must be a whole number"),
        ({"name": 3}, "name=3 is not text"),
        ({"drives": {}}, "drives is dict, not a list"),
        ({"drives": [3]}, r"drives\[0\] holds int"),
        ({"drives": [{"count": 1}]}, r"drives\[0\] lacks read_bytes_per_s, write_bytes_per_s, capacity_bytes"),
        ({"drives": [{**GOOD["drives"][0], "write_bytes": 1}]}, "did you mean 'write_bytes_per_s'"),
        ({"flops_per_s": {"val": 1}}, 'flops_per_s is an object with val: it takes "value" and "source"'),
    ],
)
def test_a_wrong_hardware_file_is_refused_in_one_sentence(change, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        machine_of({**GOOD, **change}, "mine.json")
    assert "mine.json" in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_missing_or_no_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="mine.json lacks cores: each is a number"):
        machine_of({key: value for key, value in GOOD.items() if key != "cores"}, "mine.json")
    with pytest.raises(ConfigError, match=r"cannot be read .*did you mean 'rtx4090-2xgen4'"):
        load_machine("rtx4090-2gen4")
    for content, reason in ((b"{", "is not JSON"), (b"[]", "holds list"), (b"\xff\xfe", "it is not text")):
        path = tmp_path / "x.json"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=reason):
            load_machine(str(path))
    with pytest.raises(ConfigError, match="has no drive"):
        DESK.with_drives(0).with_drives(2)
