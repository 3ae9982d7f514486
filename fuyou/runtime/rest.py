"""What a step has beside weights and optimizer state: read back, and trusted in nothing."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fuyou.core.errors import StoreError
from fuyou.core.plain import Decoder
from fuyou.runtime.manifest import Manifest
from fuyou.tiers.saved import Saved


@dataclass(frozen=True)
class Rest:
    """What a step has beside weights and optimizer state; `steps` and `buffers` by name."""

    steps: dict[str, int]
    groups: list[dict[str, Any]]
    buffers: dict[str, torch.Tensor]
    registered: dict[str, Any]
    user_state: dict[str, Any]
    generators: dict[str, Any]


def read_rest(saved: Saved, manifest: Manifest) -> Rest:
    """What a step has beside its extents. StoreError for anything that is not as it is written."""
    payload, blobs = saved.payload, {}

    def decoder(name: str) -> Decoder:
        def beside(offset: int, nbytes: int) -> bytes:
            if name not in blobs:
                blobs[name] = saved.blob(name)
            if not 0 <= offset <= len(blobs[name]) - nbytes:
                raise StoreError(f"The step's {name} have no {nbytes} bytes at {offset}.")
            return blobs[name][offset : offset + nbytes]

        return Decoder(beside)

    try:
        values = decoder("registered")
        names = manifest.names
        counts = [count for count, length in payload["steps"] for _ in range(min(length, len(names) + 1))]
        if len(counts) != len(names) or not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError(f"{len(counts)} step counts for {len(names)} parameters")
        rest = Rest(
            steps=dict(zip(names, counts, strict=True)),
            groups=values.decode(payload["groups"]),
            buffers=decoder("buffers").decode(payload["buffers"]),
            registered=values.decode(payload["registered"]),
            user_state=payload["user_state"],
            generators=values.decode(payload["rng"]),
        )
        _check(rest)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
        raise StoreError(
            f"Step {saved.step} in {saved.folders[0]} lacks part of a run's state ({error!r}): it was not written by fuyou."
        ) from error
    return rest


def _check(rest: Rest) -> None:
    """Raises something for anything of another type than it is written with."""
    tensors = [*rest.buffers.values(), rest.generators["torch"]]
    if not all(isinstance(each, torch.Tensor) for each in tensors):
        raise ValueError("buffers")
    dicts = [rest.user_state, rest.registered, rest.generators, *rest.groups]
    if not all(isinstance(each, dict) for each in dicts):
        raise ValueError("user_state, registered objects or groups")
    random.Random().setstate(rest.generators["python"])  # these say by themselves what they do not take
    np.random.RandomState().set_state(rest.generators["numpy"])
    torch.Generator().set_state(rest.generators["torch"])


def buffers_of(model: nn.Module) -> list[tuple[str, nn.Module, torch.Tensor]]:
    """(name, owner, tensor) of each buffer, once."""
    found: dict[int, tuple[str, nn.Module, torch.Tensor]] = {}
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                found.setdefault(id(buffer), (f"{prefix}.{name}" if prefix else name, module, buffer))
    return list(found.values())


def generators(device: torch.device) -> dict[str, Any]:
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_generators(states: dict[str, Any], device: torch.device) -> None:
    """A step that was trained on another kind of device has no state of this one's, which then goes on as it is."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
