"""Times as sorted lists of (began, ended) that do not overlap."""

from __future__ import annotations

from collections.abc import Iterable

Interval = tuple[float, float]


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """Their union."""
    found: list[Interval] = []
    for began, ended in sorted(intervals):
        if found and began <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], ended))
        else:
            found.append((began, ended))
    return found


def clipped(intervals: Iterable[Interval], first: float, last: float) -> list[Interval]:
    """What of them lies between `first` and `last`."""
    return [(max(began, first), min(ended, last)) for began, ended in intervals if ended >= first and began <= last]


def without(intervals: list[Interval], taken: list[Interval]) -> list[Interval]:
    """What of `intervals` lies outside of `taken`; both are unions."""
    found: list[Interval] = []
    at = 0
    for began, ended in intervals:
        while at < len(taken) and taken[at][1] <= began:
            at += 1
        here = at
        while here < len(taken) and taken[here][0] < ended:
            if taken[here][0] > began:
                found.append((began, taken[here][0]))
            began = max(began, taken[here][1])
            here += 1
        if began < ended:
            found.append((began, ended))
    return found


def length(intervals: Iterable[Interval]) -> float:
    return sum(ended - began for began, ended in intervals)
