"""fuyou.Config: everything about a run beside its model, optimizer, folders and budgets."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Sequence
from typing import Any

from fuyou.core.errors import ConfigError
from fuyou.core.ticket import DEADLINE_S

_CHOICES: dict[str, tuple[Any, ...]] = {
    "precision": (None, "fp32", "bf16"),
    "activations": ("auto", "keep", "recompute", "host", "nvme"),
    "update": ("auto", "speculative", "deferred", "step"),
    "durability": (None, "step", "checkpoint"),
    "io": ("auto", "io_uring", "threads", "aiofiles"),
    "verify_reads": (False, True),
}
_DEFAULTS: dict[str, Any] = {
    "precision": None,
    "blocks": None,
    "activations": "auto",
    "update": "auto",
    "durability": None,
    "micro_batch": None,
    "io": "auto",
    "verify_reads": False,
    "resume": None,
    "deadline_s": DEADLINE_S,
    "adam_threads": None,
    "debug_races": None,
}


class Config:
    """Frozen options, each with a default.

    precision: "fp32" | "bf16"; None follows the parameters' dtype.
    blocks: module names that move as one unit each; None finds them.
    activations: what becomes of what a block's forward saves for its backward. "keep": it stays on the device.
        "recompute": the block's forward is run again in backward, from its inputs, which stay. "host": it goes to host
        memory, and what has no room there to the drives. "nvme": it goes to the drives. "auto": "recompute", until the
        planner decides.
    update: when a chunk of the model is updated; the results are the same bits. "step": within `step()`, which waits for
        all. "deferred": after it, under the next forward, ahead of each block's use. "speculative": also during backward,
        where it can be taken back if `step()` wants something else. "auto": as "speculative" where that pays, and not for
        a while after guesses were wrong.
    durability: "step" commits every step to the drives, and a run that is killed goes on from the newest. "checkpoint"
        commits nothing between run.save()s, and writes less. None: "step" where there are drives.
    micro_batch: rows that a block runs at a time, at least 1: weights and gradients move once a step whatever the batch, and
        the device holds the activations of so many rows; None runs the whole batch. Blocks that cannot be cut run whole
        and say so.
    io: "auto" takes io_uring, then threads, then aiofiles, whichever this machine allows first.
    verify_reads: every read of a drive in training (weights, gradients, optimizer state, activations) is compared with the
        checksum of what was written, and a StorageIOError names what came back wrong, before it is used. Costs about 1 ms
        of a thread for each 10 MB read.
    resume: what becomes of a step that the nvme folders hold. True: the run goes on from the newest, where there is one.
        False: it is discarded. None: the same, but that of a run that did not end in order is refused. A folder: the run
        goes on from the newest step of the store, or the checkpoint, that is there.
    deadline_s: seconds, more than 0, after which any wait for a drive, a copy, host memory or a worker is a DeadlineError that
    names the operations in flight.
    adam_threads: threads of the AdamW update, at least 1; None takes one for each physical core but those left for I/O
        and Python (one from 4 cores on, two from 16 on).
    debug_races: None, or a seed, at least 0, to find operations that nobody waits for: released device slots and host memory
        are filled with NaN, what is written there afterwards is a StateError, and every asynchronous operation is up to
        some milliseconds late at random. Results stay the same bits; a step is slower, and on a CPU device released
        weights keep their memory beyond the gpu budget. The seed varies the order of events, it does not replay one.

    ConfigError names an unknown option's nearest match, or an impossible value.
    """

    __slots__ = tuple(_DEFAULTS)

    precision: str | None
    blocks: tuple[str, ...] | None
    activations: str
    update: str
    durability: str | None
    micro_batch: int | None
    io: str
    verify_reads: bool
    resume: bool | str | None
    deadline_s: float
    adam_threads: int | None
    debug_races: int | None

    def __init__(self, **options: Any) -> None:
        for name in options:
            if name not in _DEFAULTS:
                raise ConfigError(f"Config has no option {name!r}{nearest(name, _DEFAULTS)}")
        for name, default in _DEFAULTS.items():
            object.__setattr__(self, name, _checked(name, options.get(name, default)))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"Config is frozen: make a new one with {name}={value!r}")

    def __repr__(self) -> str:
        return f"Config({', '.join(f'{name}={getattr(self, name)!r}' for name in _DEFAULTS)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and all(getattr(self, n) == getattr(other, n) for n in _DEFAULTS)

    def __hash__(self) -> int:
        return hash(tuple(getattr(self, name) for name in _DEFAULTS))


def nearest(name: str, known: Sequence[str] | dict[str, Any]) -> str:
    """': did you mean X?' or the list of what is known: the end of a sentence that says what is not there."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f": did you mean {match[0]!r}?" if match else f"; it has {', '.join(known)}."


def _checked(name: str, value: Any) -> Any:
    if name == "blocks":
        if value is None:
            return None
        if isinstance(value, str) or not all(isinstance(item, str) for item in value):
            raise ConfigError(f"blocks={value!r} must be a list of module names, or None to find them.")
        return tuple(value)
    if name == "micro_batch":
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(
                f"micro_batch={value!r} must be a whole number of rows, at least 1, or None to run a block's whole batch."
            )
        return value
    if name == "adam_threads":
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ConfigError(
                f"adam_threads={value!r} must be a whole number of threads, at least 1, or None to choose."
            )
        return value
    if name == "debug_races":
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise ConfigError(f"debug_races={value!r} must be a seed, a whole number from 0 on, or None for off.")
        return value
    if name == "resume":
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if not (value is None or isinstance(value, bool) or (isinstance(value, str) and value)):
            raise ConfigError(f"resume={value!r} must be True, False, None or the folder of a store or a checkpoint.")
        return value
    if name == "deadline_s":
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (value > 0 and math.isfinite(value)):
            raise ConfigError(
                f"deadline_s={value!r} must be a number of seconds, more than 0; the default is {DEADLINE_S:g}."
            )
        return float(value)
    if value not in _CHOICES[name]:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(map(repr, _CHOICES[name]))}.")
    return value
