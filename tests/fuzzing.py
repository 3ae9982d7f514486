"""What the fuzzers of our parsers share: inputs that are nearly right, inputs that are anything, and a bound on memory."""

from __future__ import annotations

import contextlib
import copy
import resource
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from fuyou.core.errors import FuyouError

COUNTS = [40, pytest.param(8500, marks=pytest.mark.slow)]  # inputs of one parser
ROUND = 500
MOST_MEMORY = 1 << 29  # more than a parser may ask for, whatever it is given

NUMBERS = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**32, 2**47, 2**48, 2**62, 2**63, 2**64, 10**400, -(10**400)]),
    st.floats(),
)
SCALARS = st.one_of(
    st.none(), st.booleans(), NUMBERS, st.text(max_size=8), st.sampled_from(["", "/", "..", "\0", "9" * 5000])
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
DEEP = ["[" * 100_000, '{"a":' * 100_000, "[" * 400 + "]" * 400, "[" * 900 + "]" * 900, '{"a":' * 600 + "1" + "}" * 600]


@st.composite
def changed(draw: st.DrawFn, document: Any, values: st.SearchStrategy[Any] = JSON) -> Any:
    """`document` with one to three places replaced, removed, doubled or swapped for another of its own."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(document))
        if not places:
            return draw(values)
        owner, key = places[draw(st.integers(0, len(places) - 1))]
        match draw(st.integers(0, 5)):
            case 0:
                del owner[key]
            case 1:
                other, its = places[draw(st.integers(0, len(places) - 1))]
                owner[key] = copy.deepcopy(other[its])
            case 2 if isinstance(owner, list):
                owner.insert(key, copy.deepcopy(owner[key]))
            case 3 if type(owner[key]) is int:
                owner[key] += draw(st.sampled_from([-1, 1, 64, 2**32]))
            case _:
                owner[key] = draw(values)
    return document


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


@st.composite
def spoilt(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes changed, cut out, put in; or other ones."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=400))
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.integers(0, 2)):
            case 0 if data:
                data[at] = draw(st.integers(0, 255))
            case 1:
                del data[at : at + draw(st.integers(1, 40))]
            case _:
                data[at:at] = draw(st.binary(max_size=8))
    return bytes(data)


def fuzz(check: Callable[[Any], None], inputs: st.SearchStrategy[Any], count: int) -> None:
    """`check` raises nothing but our own errors on any of `count` inputs, within MOST_MEMORY. In rounds, each of another seed:
    hypothesis keeps all of a round in memory."""
    for number in range(-(-count // ROUND)):

        @seed(number)
        @settings(max_examples=min(count, ROUND), deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(inputs)
        def each(value: Any) -> None:
            with little_memory(), contextlib.suppress(FuyouError):
                check(value)

        each()


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """What asks for more gets a MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
