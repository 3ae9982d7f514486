"""How bytes are divided among drives: arithmetic on numbers, nothing is opened here."""

from __future__ import annotations

from collections.abc import Sequence

from fuyou.core.errors import StateError

UNIT_BYTES = 4096  # what is divided: a file system's block, and what direct I/O needs
# A drive reaches its speed with pieces of about 1 MiB (256 KiB lose a fifth, see io/native.py). An extent that could not
# give every drive that much goes whole to one of them: cutting it would cost operations and win nothing.
PART_BYTES = 1 << 20

Piece = tuple[int, int]  # index of a drive, bytes


class Shares:
    """Divides extents among drives, one after another, in proportion to what each drive is to hold in the end.

    `speeds`: of each drive, in any one unit; where one is 0, not known, all count alike. `pools[i]` is the pool that drive
    i takes its room from, `room_bytes` what each pool still has: folders on one file system are one pool. `placed_bytes`:
    what each drive holds already. `total_bytes`: what is going to be divided; it decides which drives will be full, and
    their share is spread over the others from the first extent on.
    """

    def __init__(
        self,
        speeds: Sequence[float],
        pools: Sequence[int],
        room_bytes: Sequence[int],
        placed_bytes: Sequence[int],
        total_bytes: int,
    ) -> None:
        self._pools = tuple(pools)
        self._room = [nbytes // UNIT_BYTES for nbytes in room_bytes]
        self._placed = [nbytes // UNIT_BYTES for nbytes in placed_bytes]
        if sum(self._room) * UNIT_BYTES < total_bytes:
            raise StateError(f"{total_bytes} bytes cannot be divided over drives with room for {sum(room_bytes)}.")
        if not all(speeds):
            speeds = [1.0] * len(speeds)
        portions = spread(max(total_bytes // UNIT_BYTES, 1), speeds, self._pools, self._room)
        self._weights = [portion / sum(portions) for portion in portions] if any(portions) else [0.0] * len(speeds)

    @property
    def weights(self) -> list[float]:
        """The share of each drive: they sum to 1, where there is any room."""
        return list(self._weights)

    def divide(self, nbytes: int, slots: int) -> list[list[Piece]]:
        """Pieces of an extent of `nbytes` (a multiple of 4096) for each of `slots` slots, in the order of its bytes.

        Cut over all drives, each part within 4096 bytes a drive of its share; or whole, all slots on one drive, so that
        small extents alternate between the drives and not their slots (else a step would read from one drive only and
        write to the other).
        """
        units = nbytes // UNIT_BYTES
        if slots * units > sum(self._room):
            raise StateError(
                f"{slots} x {nbytes} bytes were to be placed on drives with {sum(self._room)} free units left."
            )
        if nbytes < PART_BYTES * sum(weight > 0 for weight in self._weights):
            for drive in self._most_behind():
                if self._room[self._pools[drive]] >= slots * units:
                    self._take(drive, slots * units)
                    return [[(drive, nbytes)]] * slots
        return [self._cut(units) for _ in range(slots)]

    def _cut(self, units: int) -> list[Piece]:
        parts = [int(portion) for portion in spread(units, self._weights, self._pools, self._room)]
        for drive, part in enumerate(parts):
            parts[drive] = min(part, self._room[self._pools[drive]])  # a sum of rounded floats may be one too many
            self._take(drive, parts[drive])
        missing = units - sum(parts)  # less than one unit a drive
        while missing:
            for drive in self._most_behind():
                if missing and self._room[self._pools[drive]]:
                    self._take(drive, 1)
                    parts[drive] += 1
                    missing -= 1
        return [(drive, part * UNIT_BYTES) for drive, part in enumerate(parts) if part]

    def _most_behind(self) -> list[int]:
        """The drives, that which lacks most of its share of all placed so far first."""
        total = sum(self._placed)
        return sorted(range(len(self._weights)), key=lambda i: self._placed[i] - self._weights[i] * total)

    def _take(self, drive: int, units: int) -> None:
        self._room[self._pools[drive]] -= units
        self._placed[drive] += units


def spread(amount: float, speeds: Sequence[float], pools: Sequence[int], room: Sequence[float]) -> list[float]:
    """`amount` in proportion to `speeds`; what a full pool cannot take goes to the others, again in proportion.

    Returns less than `amount` in all where the pools have less room.
    """
    portions = [0.0] * len(speeds)
    unfilled = set(pools)
    while unfilled:
        speed_of = {pool: sum(v for v, its in zip(speeds, pools, strict=True) if its == pool) for pool in unfilled}
        speed = sum(speed_of.values())
        if speed <= 0:
            break
        full = {pool for pool in unfilled if amount * speed_of[pool] / speed > room[pool]}
        for drive, pool in enumerate(pools):
            if pool in (full or unfilled) and speed_of[pool] > 0:
                portions[drive] = (
                    (room[pool] if full else amount * speed_of[pool] / speed) * speeds[drive] / speed_of[pool]
                )
        if not full:
            break
        amount -= sum(room[pool] for pool in full)
        unfilled -= full
    return portions
