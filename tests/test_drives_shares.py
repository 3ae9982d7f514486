"""How extents are divided among drives, against an interval model that knows nothing of how it is done."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from fuyou.core.errors import StateError
from fuyou.tiers.shares import PART_BYTES, Shares, spread

PAGE = 4096
MIB = 1 << 20


def exact_spread(amount: Fraction, speeds: list[Fraction], pools: list[int], room: list[Fraction]) -> list[Fraction]:
    """The same division found another way: time runs, every drive fills at its speed, a full pool's drives stop.

    Exact fractions, one pool filling up at a time; what is left of `amount` is then spread over those that still run.
    """
    held = [Fraction(0)] * len(speeds)
    running = set(range(len(speeds)))
    scale = Fraction(0)  # bytes a unit of speed that every running drive holds
    while running:
        fill = {p: sum(speeds[d] for d in running if pools[d] == p) for p in {pools[d] for d in running}}
        ends = {p: room[p] / speed for p, speed in fill.items() if speed}
        stopped = sum(held[d] for d in range(len(speeds)) if d not in running)
        done = (amount - stopped) / sum(fill.values())
        first = min(ends.values())
        scale = min(first, done)
        for drive in running:
            held[drive] = speeds[drive] * scale
        if done <= first:
            break
        running = {d for d in running if ends[pools[d]] > first}
    return held


def draw_drives(draw: random.Random) -> tuple[list[float], list[int], list[int]]:
    """(speeds, pools, bytes of room): 1 to 5 drives, some on one file system, speeds up to 100 to 1."""
    count = draw.randint(1, 5)
    pools: list[int] = []
    for _ in range(count):
        pools.append(draw.randint(0, max(pools, default=-1) + 1) if draw.random() < 0.3 else max(pools, default=-1) + 1)
    speeds = [draw.choice([1.0, 0.5e9, 1e9, draw.uniform(3e7, 3e9)]) for _ in range(count)]
    if draw.random() < 0.3:
        speeds = [1.0] * count
    rooms = [draw.choice([0, PAGE, draw.randrange(64 * MIB), draw.randrange(1 << 34)]) for _ in range(max(pools) + 1)]
    return speeds, pools, rooms


def test_shares_are_those_of_drives_that_fill_side_by_side():
    draw = random.Random(1)
    for _ in range(500):
        speeds, pools, rooms = draw_drives(draw)
        amount = draw.randint(0, sum(rooms))
        found = spread(amount, speeds, pools, rooms)
        exact = exact_spread(Fraction(amount), [Fraction(v) for v in speeds], pools, [Fraction(r) for r in rooms])
        assert sum(exact) == amount
        assert found == pytest.approx([float(each) for each in exact], rel=1e-9, abs=1e-3)


def test_no_extent_is_lost_and_no_room_is_passed_whatever_the_sizes_and_rooms():
    draw = random.Random(2)
    whole = cut = full = 0
    for case in range(400):
        speeds, pools, rooms = draw_drives(draw)
        budget = sum(room // PAGE for room in rooms)
        if draw.random() < 0.5:
            budget = draw.randint(0, budget)  # else every last page is used
        wanted: list[tuple[int, int]] = []
        while budget and len(wanted) < 60:
            slots = min(draw.choice([1, 2]), budget)
            most = budget // slots
            units = (
                most
                if len(wanted) == 59 or draw.random() < 0.05
                else draw.randint(1, min(most, draw.choice([3, 500, 9000])))
            )
            wanted.append((units * PAGE, slots))
            budget -= units * slots
        shares = Shares(speeds, pools, rooms, [0] * len(speeds), sum(nbytes * slots for nbytes, slots in wanted))
        weights, held = shares.weights, [0] * len(speeds)
        for nbytes, slots in wanted:
            left = [
                room - sum(n for n, its in zip(held, pools, strict=True) if its == p) for p, room in enumerate(rooms)
            ]
            meant = [
                slots * nbytes * sum(w for w, its in zip(weights, pools, strict=True) if its == p)
                for p in range(len(rooms))
            ]
            in_proportion = all(
                have >= want + 2 * PAGE * len(speeds) for have, want in zip(left, meant, strict=True) if want
            )
            laid = shares.divide(nbytes, slots)
            assert len(laid) == slots
            for pieces in laid:
                assert sum(size for _, size in pieces) == nbytes
                assert all(size > 0 and size % PAGE == 0 for _, size in pieces)
                assert [drive for drive, _ in pieces] == sorted({drive for drive, _ in pieces})  # at most once each
                for drive, size in pieces:
                    held[drive] += size
                parts = dict(pieces)
                if nbytes >= PART_BYTES * len(speeds) and in_proportion:
                    cut += len(speeds) > 1
                    off = [abs(parts.get(drive, 0) - weight * nbytes) for drive, weight in enumerate(weights)]
                    assert max(off) <= PAGE + 1, (case, parts, weights)
                elif len(pieces) == 1:
                    whole += 1
        for pool, room in enumerate(rooms):
            used = sum(nbytes for nbytes, its in zip(held, pools, strict=True) if its == pool)
            assert used <= room
            full += room - used < PAGE
    assert whole > 1000 and cut > 500 and full > 100, (whole, cut, full)  # all three were seen


def test_small_extents_alternate_in_proportion_and_keep_their_slots_together():
    shares = Shares([3.0, 1.0], [0, 1], [1 << 34, 1 << 34], [0, 0], 1 << 30)
    held = [0, 0]
    for _ in range(400):
        first, second = shares.divide(64 * 1024, 2)
        assert first == second and len(first) == 1  # or a step would read from one drive and write to the other
        held[first[0][0]] += 1
        assert abs(held[0] - 0.75 * sum(held)) <= 1
    large, _ = shares.divide(8 * MIB, 2)
    assert large == [(0, 6 * MIB), (1, 2 * MIB)]


def test_what_cannot_be_placed_is_refused():
    with pytest.raises(StateError, match="cannot be divided"):
        Shares([1.0, 1.0], [0, 1], [MIB, MIB], [0, 0], 2 * MIB + PAGE)
    shares = Shares([1.0, 1.0], [0, 0], [MIB], [0, 0], MIB)
    shares.divide(MIB, 1)
    with pytest.raises(StateError, match="0 free"):
        shares.divide(PAGE, 1)
