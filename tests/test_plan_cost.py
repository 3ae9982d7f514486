"""The cost model and the choice of activations: against arithmetic written out here, and by what must always hold."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuyou.plan.activations import NoRoom, Room, choose_activations, fixed_activations
from fuyou.plan.cost import FUYOU_BF16, FUYOU_FP32, PAPER, BlockNumbers, Choice, Item, Prediction, predict
from fuyou.plan.explain import explain, remedies
from fuyou.plan.machine import Drive, Machine

GB = 10**9
MACHINE = Machine(
    name="m", flops_per_s=1e14, device_bytes=24 * GB, host_to_device_bytes_per_s=20 * GB, device_to_host_bytes_per_s=10 * GB,
    host_bytes=64 * GB, dram_bytes_per_s=100 * GB, cores=8, drives=(Drive(4 * GB, 2 * GB, 1000 * GB, 600e12),) * 2,
    array_bytes_per_s=9 * GB, tail_s=0.5,
)  # fmt: skip
# 4 blocks of 1 GB of parameters in bf16: 2 GB of weights each.
ITEMS = (Item("mlp", GB, 0.4), Item("qkv", 3 * GB, 0.3), Item("norms", 4 * GB, 0.0))
BLOCK = BlockNumbers("b", GB, 2 * GB, forward_s=1.0, backward_s=2.0, input_bytes=GB // 2, items=ITEMS, working_bytes=GB)
BLOCKS = (BLOCK,) * 4
QUIET = replace(MACHINE, tail_s=0.0)


def alone(**seconds: float) -> float:
    """A pipeline of 4 blocks, from busy seconds of each resource."""
    return max(seconds.values()) + (sum(seconds.values()) - max(seconds.values())) / 4


def test_a_step_is_the_sum_written_out():
    """Everything on NVMe, everything recomputed, the update after backward."""
    found = predict(MACHINE, BLOCKS, Choice(update="step"), FUYOU_BF16)
    forward = alone(compute=4 * 1.0, h2d=8 / 20, d2h=0, nvme=8 / 8, adam=0)
    # Backward: weights again, 8 GB of gradients down the link and out to the drives (2 x 2 GB/s of writes).
    backward = alone(compute=4 * (2.0 + 0.7), h2d=8 / 20, d2h=8 / 10, nvme=max(8 / 8 + 8 / 4, 16 / 9), adam=0)
    # Update: 10 bytes of state and 2 of gradient read, 10 and 2 written, 26 bytes over DRAM.
    update = alone(compute=0, h2d=0, d2h=0, nvme=max(48 / 8 + 48 / 4, 96 / 9), adam=4 * 26 / 100)
    assert found.forward_s == pytest.approx(forward)
    assert found.backward_s == pytest.approx(backward)
    assert found.update_s == pytest.approx(update)
    assert found.seconds_per_step == pytest.approx(forward + backward + update + 0.5)
    assert found.nvme_read_bytes == 16 * 4 * GB  # neither weights nor gradients in memory
    assert found.nvme_write_bytes == 14 * 4 * GB
    assert found.host_to_device_bytes == 4 * 4 * GB and found.device_to_host_bytes == 2 * 4 * GB
    assert found.busy_s["nvme"] == pytest.approx(1 + 3 + 18)


@pytest.mark.parametrize(
    ("traffic", "host", "read", "written"),
    [
        (FUYOU_BF16, {}, 16, 14),
        (FUYOU_BF16, {"host_weights": 1.0, "host_gradients": 1.0}, 10, 10),
        (FUYOU_BF16, {"host_weights": 1.0, "host_gradients": 1.0, "durable": True}, 10, 12),
        (FUYOU_FP32, {}, 20, 16),
        (PAPER, {"host_gradients": 1.0}, 14, 14),
        (FUYOU_BF16, {"host_weights": 1.0, "host_gradients": 1.0, "host_state": 1.0}, 0, 0),
    ],
)
def test_bytes_a_parameter_are_what_each_system_moves(traffic, host, read, written):
    found = predict(MACHINE, [replace(BLOCK, weight_bytes=int(traffic.weight_bytes * GB))], Choice(**host), traffic)
    assert (found.nvme_read_bytes, found.nvme_write_bytes) == (read * GB, written * GB)


def test_accumulation_repeats_all_but_the_update():
    one, three = (predict(QUIET, BLOCKS, Choice(accumulation=n), FUYOU_BF16) for n in (1, 3))
    # Weights three times; gradients written three times and read three times, by two sums and the update.
    assert three.nvme_read_bytes == (3 * 4 + 2 * 2 + 10 + 2) * 4 * GB
    assert three.nvme_write_bytes == (3 * 2 + 10 + 2) * 4 * GB
    assert three.busy_s["compute"] == pytest.approx(3 * one.busy_s["compute"])
    assert three.busy_s["adam"] == pytest.approx(
        (26 + 2 * 3 * 2) * 4 / 100
    )  # two sums of 2-byte gradients: 3 x 2 bytes
    assert three.peak_bytes == one.peak_bytes


def test_the_update_runs_under_one_backward_of_several():
    one, many = (predict(QUIET, BLOCKS, Choice(accumulation=n, update="backward")) for n in (1, 5))
    forward = alone(compute=4.0, h2d=8 / 20, d2h=0, nvme=8 / 8, adam=0)
    # Each backward sums its gradients with those before, but for the first: 4 of 5 read 8 GB and add 3 x 8 GB in memory.
    read, written = 8 + 8 * 4 / 5, 8
    busy = {"compute": 4 * 2.7, "h2d": 8 / 20, "d2h": 8 / 10, "adam": 3 * 8 * 4 / 5 / 100}
    backward = alone(**busy, nvme=max(read / 8 + written / 4, (read + written) / 9))
    last = alone(
        **{**busy, "adam": busy["adam"] + 4 * 26 / 100},
        nvme=max(read / 8 + written / 4, (read + written) / 9) + max(48 / 8 + 48 / 4, 96 / 9),
    )
    assert many.forward_s == pytest.approx(5 * forward)
    assert many.backward_s == pytest.approx(4 * backward + last)
    assert many.seconds_per_step > 4 * forward + 4 * backward + one.seconds_per_step - forward


def test_peak_bytes_written_out():
    actions = (("keep", "host", "recompute"), ("keep", "nvme", "recompute"), ("recompute",) * 3, ("nvme",) * 3)
    choice = Choice(
        actions=actions, inputs=("host", "nvme", "device", "host"), device_slots=2, gradient_slots=2, in_flight=1, slices=2,
        host_weights=0.25, host_gradients=0.5, host_state=0.75, state_slots=2, staging_bytes=7, pinned_bytes=5,
        device_working_bytes=3,
    )  # fmt: skip
    found = predict(MACHINE, BLOCKS, choice, FUYOU_BF16).peak_bytes
    half = GB // 2
    running = (
        max(  # all that is not kept and the temporaries, of one slice; the input and what was swapped, and once more
            (7 + 1) * half + half + (3 * GB + half),
            (7 + 1) * half + half + (3 * GB + half),
            (8 + 1) * half,
            (8 + 1) * half + 8 * GB,  # recomputes nothing: no input
        )
    )
    assert found["device"] == {
        "weights": 5 + 4 * GB, "gradients": 4 * GB, "optimizer": 0, "activations": 2 * GB + half + running, "staging": 3,
    }  # fmt: skip
    assert found["host"] == {
        "weights": 2 * GB, "gradients": 4 * GB, "optimizer": 30 * GB, "activations": 3 * GB + half, "staging": 7,
    }  # fmt: skip
    assert found["nvme"] == {
        "weights": 2 * 6 * GB, "gradients": 4 * GB, "optimizer": 2 * 10 * GB, "activations": 3 * GB + half + 8 * GB,
        "staging": 0,
    }  # fmt: skip


def test_swapped_bytes_go_out_and_come_back():
    choice = Choice(actions=(("host", "nvme", "recompute"),) * 4, inputs=("nvme",) * 4)
    with_, without = predict(MACHINE, BLOCKS, choice), predict(MACHINE, BLOCKS, Choice())
    out = 4 * (1 + 3) * GB + 4 * GB // 2
    to_nvme = 4 * 3 * GB + 4 * GB // 2
    assert with_.device_to_host_bytes - without.device_to_host_bytes == out
    assert with_.host_to_device_bytes - without.host_to_device_bytes == out
    assert with_.nvme_write_bytes - without.nvme_write_bytes == to_nvme
    assert with_.nvme_read_bytes - without.nvme_read_bytes == to_nvme
    assert without.busy_s["compute"] - with_.busy_s["compute"] == pytest.approx(4 * 0.7)


def test_where_the_update_runs_orders_the_times():
    seconds = {
        u: predict(QUIET, BLOCKS, Choice(update=u)).seconds_per_step
        for u in ("step", "backward", "deferred", "speculative")
    }
    assert seconds["speculative"] <= min(seconds["backward"], seconds["deferred"]) + 1e-9
    assert max(seconds["backward"], seconds["deferred"]) <= seconds["step"] + 1e-9


def test_speculative_reaches_the_single_maximum():
    """Many blocks, compute evenly above NVMe: the step takes what compute takes."""
    small = replace(BLOCK, elements=GB // 100, weight_bytes=GB // 50, forward_s=0.02, backward_s=0.04, items=())
    found = predict(QUIET, (small,) * 400, Choice())
    compute = 400 * 0.06
    nvme = 400 * (16 / 8 + 14 / 4) * 0.01
    assert nvme < compute < found.seconds_per_step < compute * 1.01
    assert found.bound_by == "compute"


@pytest.mark.parametrize(
    ("change", "bound"),
    [
        ({"host_to_device_bytes_per_s": 1e6}, "host_to_device"),
        ({"device_to_host_bytes_per_s": 1e6}, "device_to_host"),
        ({"drives": (Drive(1e6, 1e6, GB),)}, "nvme"),
        ({"drives": ()}, "nvme"),
        ({"array_bytes_per_s": 1e6}, "nvme"),
        ({"dram_bytes_per_s": 1e6}, "adam"),
        ({"drives": (Drive(1e14, 1e14, GB),), "array_bytes_per_s": 1e14}, "compute"),
    ],
)
@pytest.mark.parametrize("update", ["step", "backward", "deferred", "speculative"])
def test_what_bounds_is_what_is_slow(change, bound, update):
    found = predict(replace(MACHINE, **change), BLOCKS, Choice(update=update))
    assert found.bound_by == bound
    assert (found.seconds_per_step == math.inf) == (change.get("drives") == ())


def test_gpus_share_all_but_compute_and_links():
    one, four = (predict(replace(QUIET, gpu_count=n), BLOCKS, Choice(inputs=("nvme",) * 4)) for n in (1, 4))
    for name in ("compute", "host_to_device", "device_to_host"):
        assert four.busy_s[name] == pytest.approx(one.busy_s[name])
    assert four.busy_s["adam"] - one.busy_s["adam"] == pytest.approx(3 * 3 * 8 / 100)  # three more gradients added
    inputs = 4 * GB // 2
    assert four.nvme_read_bytes - one.nvme_read_bytes == 3 * inputs
    assert four.peak_bytes["nvme"]["activations"] == 4 * inputs
    assert four.peak_bytes["device"] == one.peak_bytes["device"]
    assert four.seconds_per_step >= one.seconds_per_step


def test_without_a_gpu_cores_are_shared():
    home = Choice(update="speculative", host_weights=1.0, host_gradients=1.0, host_state=1.0)
    found = predict(replace(QUIET, shared_compute=True), (BLOCK,) * 1000, home)
    compute, adam, copies = 1000 * (1 + 2.7), 1000 * 26 / 100, 1000 * (4 / 20 + 2 / 10)
    assert found.seconds_per_step == pytest.approx(compute + adam + copies / 8, rel=0.001)


rates = st.floats(0.1, 100.0)


@settings(max_examples=150, deadline=None)
@given(
    speeds=st.tuples(rates, rates, rates, rates, rates, rates),
    update=st.sampled_from(["step", "backward", "deferred", "speculative"]),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)),
    faster=st.floats(1, 10),
    shared=st.booleans(),
)
def test_nothing_faster_makes_a_step_slower(speeds, update, shares, faster, shared):
    h2d, d2h, dram, read, write, array = (each * GB for each in speeds)
    machine = Machine("m", 1e14, GB, h2d, d2h, GB, dram, 4, (Drive(read, write, GB),), array, shared_compute=shared)
    choice = Choice(update=update, host_weights=shares[0], host_gradients=shares[1], host_state=shares[2])
    before = predict(machine, BLOCKS, choice).seconds_per_step
    better = [
        (replace(machine, host_to_device_bytes_per_s=h2d * faster), choice, BLOCKS),
        (replace(machine, device_to_host_bytes_per_s=d2h * faster), choice, BLOCKS),
        (replace(machine, dram_bytes_per_s=dram * faster), choice, BLOCKS),
        (replace(machine, drives=(Drive(read * faster, write * faster, GB),)), choice, BLOCKS),
        (replace(machine, drives=machine.drives * 2), choice, BLOCKS),
        (replace(machine, array_bytes_per_s=array * faster), choice, BLOCKS),
        (machine, replace(choice, host_state=(1 + shares[2]) / 2), BLOCKS),
        (machine, choice, [replace(each, forward_s=each.forward_s / faster) for each in BLOCKS]),
    ]
    for machine_, choice_, blocks in better:
        assert predict(machine_, blocks, choice_).seconds_per_step <= before * (1 + 1e-6)


def gpt(count: int, scale: float) -> tuple[BlockNumbers, ...]:
    """Blocks of a GPT: seconds a byte 4 times as many for the MLP's output as for the rest, none for norms."""
    items = (Item("mlp", GB // 4, 0.2 * scale), Item("qkv", 3 * GB // 4, 0.15 * scale), Item("norms", GB, 0.0))
    return (BlockNumbers("b", GB // 4, GB // 2, 0.4 * scale, 0.8 * scale, GB // 4, items),) * count


@settings(max_examples=40, deadline=None)
@given(
    scale=st.floats(0.05, 5), device=st.integers(0, 8), host=st.integers(0, 8), nvme=st.integers(2, 20),
    update=st.sampled_from(["step", "backward", "speculative"]), read=rates, write=rates, link=rates,
)  # fmt: skip
def test_chosen_activations_fit_and_beat_every_fixed_mode_that_fits(
    scale, device, host, nvme, update, read, write, link
):
    machine = replace(QUIET, drives=(Drive(read * GB, write * GB, GB),), host_to_device_bytes_per_s=link * GB)
    machine = replace(machine, device_to_host_bytes_per_s=link * GB)
    blocks, choice = gpt(6, scale), Choice(update=update)
    room = Room(device * GB, host * GB, nvme * GB)
    found = choose_activations(machine, blocks, choice, room)
    assert found.device_bytes <= room.device_bytes and found.host_bytes <= room.host_bytes
    assert found.nvme_bytes <= room.nvme_bytes
    best = found.prediction.seconds_per_step
    for action in ("keep", "recompute", "host", "nvme"):
        other = fixed_activations(machine, blocks, choice, action)
        fits = (
            other.device_bytes <= room.device_bytes
            and other.host_bytes <= room.host_bytes
            and other.nvme_bytes <= room.nvme_bytes
        )
        assert not fits or best <= other.prediction.seconds_per_step * 1.001


def test_the_choice_is_the_best_of_all_on_a_small_model():
    """Every assignment of 2 blocks x 2 items, tried."""
    items = (Item("a", GB, 0.5), Item("b", 2 * GB, 0.4))
    blocks = (BlockNumbers("x", GB // 8, GB // 4, 0.5, 1.0, GB // 2, items),) * 2
    room = Room(device_bytes=2 * GB, host_bytes=3 * GB, nvme_bytes=6 * GB)
    for link in (2, 5, 20):
        machine = replace(QUIET, host_to_device_bytes_per_s=link * GB, device_to_host_bytes_per_s=link * GB)
        best = math.inf
        for flat in itertools.product(("keep", "recompute", "host", "nvme"), repeat=4):
            for inputs in itertools.product(("device", "host", "nvme"), repeat=2):
                held = dict.fromkeys(("keep", "recompute", "host", "nvme"), 0)
                for action, item in zip(flat, items * 2, strict=True):
                    held[action] += item.nbytes
                for block, place in enumerate(inputs):
                    if "recompute" in flat[2 * block : 2 * block + 2]:
                        held["keep" if place == "device" else place] += GB // 2
                if held["keep"] <= 2 * GB and held["host"] <= 3 * GB and held["nvme"] <= 6 * GB:
                    choice = Choice(actions=(flat[:2], flat[2:]), inputs=inputs)
                    best = min(best, predict(machine, blocks, choice).seconds_per_step)
        found = choose_activations(machine, blocks, Choice(), room)
        assert found.prediction.seconds_per_step <= best * 1.05  # whole tensors of two blocks: a coarse grid


def test_time_is_convex_in_what_is_swapped():
    blocks = gpt(12, 1.0)
    machine = replace(QUIET, drives=(Drive(4 * GB, 2 * GB, GB),))
    seconds = []
    for count in range(13):
        actions = tuple(("nvme" if i < count else "recompute", "recompute", "recompute") for i in range(12))
        seconds.append(predict(machine, blocks, Choice(actions=actions, update="backward")).seconds_per_step)
    slopes = [later - earlier for earlier, later in itertools.pairwise(seconds)]
    assert all(later >= earlier - 1e-6 for earlier, later in itertools.pairwise(slopes))


def test_the_mlps_output_is_swapped_first_and_the_device_is_filled_first():
    found = choose_activations(QUIET, gpt(8, 4.0), Choice(), Room(GB, 2 * GB, 100 * GB))
    flat = [action for actions in found.actions for action in actions]
    assert all(actions[2] == "recompute" for actions in found.actions)  # worth nothing
    assert flat.count("keep") * GB // 4 <= GB
    worst_mlp = [actions[0] for actions in found.actions]
    assert "recompute" not in worst_mlp or all(actions[1] == "recompute" for actions in found.actions)


def test_swapping_stops_where_it_no_longer_pays():
    slow = replace(QUIET, host_to_device_bytes_per_s=GB / 100, device_to_host_bytes_per_s=GB / 100)
    found = choose_activations(slow, gpt(4, 1.0), Choice(), Room(4 * GB // 4, 100 * GB, 100 * GB))
    assert found.swapped_bytes == 0 and found.inputs == ("device",) * 4


def test_a_limit_of_bytes_in_flight_holds_for_each_block():
    room = Room(0, 100 * GB, 0, swapped_bytes_per_block=GB // 2)
    found = choose_activations(QUIET, gpt(4, 10.0), Choice(), room)
    assert all(actions[:2] == ("host", "recompute") for actions in found.actions)


def test_inputs_without_a_place_are_refused_with_what_is_short():
    with pytest.raises(NoRoom) as caught:
        choose_activations(QUIET, gpt(4, 1.0), Choice(), Room(GB // 2, 0, 0))
    assert caught.value.short_bytes == 2 * GB // 4


def test_words_say_what_bounds_and_what_the_model_predicts():
    found = predict(QUIET, BLOCKS, Choice(update="backward"))
    text = explain(found)
    assert "bound by the drives" in text
    best = remedies(found)[0]
    home = Choice(update="backward", host_weights=1.0, host_gradients=1.0, host_state=1.0)
    twice = replace(QUIET, drives=QUIET.drives * 2, array_bytes_per_s=18 * GB)
    gains = {
        "twice the drives": predict(twice, BLOCKS, Choice(update="backward")),
        "52.15 GiB more ram, to keep all of": predict(QUIET, BLOCKS, home),  # 14 bytes for each of 4e9 parameters
    }
    shown = {each.change: each.gain for each in remedies(found)}
    for start, after in gains.items():
        gain = next(value for change, value in shown.items() if change.startswith(start))
        assert gain == pytest.approx(found.seconds_per_step / after.seconds_per_step)
    assert best.gain == max(shown.values()) and f"{best.gain:.2f} times" in text


def test_how_much_host_memory_would_help_is_the_least_that_is_worth_it_and_the_least_that_is_enough():
    def kept(part: float, blocks: tuple[BlockNumbers, ...]) -> Prediction:
        choice = Choice(update="backward", host_weights=part, host_gradients=part, host_state=part)
        return predict(QUIET, blocks, choice)

    def amounts(blocks: tuple[BlockNumbers, ...]) -> dict[str, float]:
        found = remedies(kept(0, blocks))
        return {each.change: each.gain for each in found if "more ram" in each.change}

    def gain(part: float, blocks: tuple[BlockNumbers, ...]) -> float:
        return kept(0, blocks).seconds_per_step / kept(part, blocks).seconds_per_step

    assert amounts(BLOCKS) == pytest.approx({
        "13.04 GiB more ram, to keep 25% of the model's state in memory": gain(0.25, BLOCKS),
        "52.15 GiB more ram, to keep all of the model's state in memory": gain(1, BLOCKS),
    })  # fmt: skip
    # Where compute takes nearly as long as the drives, a part of it is enough.
    slower = tuple(replace(each, forward_s=2.0, backward_s=2.0) for each in BLOCKS * 10)
    enough = min(part for part in (0.25, 0.5, 0.75, 1) if gain(part, slower) - 1 >= 0.9 * (gain(1, slower) - 1))
    assert enough < 1 and gain(1, slower) > 1.03
    assert f"to keep {enough:.0%} of the model's state" in next(iter(amounts(slower)))


def test_where_two_resources_bind_pairs_are_tried():
    """Compute and the device's link home take the same time in both phases."""
    items = (Item("a", 10 * GB, 5.0),)
    block = replace(BLOCK, elements=0, weight_bytes=20 * GB, forward_s=1.0, backward_s=1.0, items=items)
    choice = Choice(actions=(("keep",),) * 400)
    found = predict(replace(QUIET, drives=QUIET.drives * 50, array_bytes_per_s=math.inf), (block,) * 400, choice)
    assert found.busy_s["compute"] == found.busy_s["host_to_device"]
    alone = {each.change for each in remedies(found)}
    assert "a device twice as fast and twice the link" in alone
