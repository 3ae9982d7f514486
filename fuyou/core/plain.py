"""Values of programs as JSON and back, without pickle: what `state_dict()` returns, random generators, hyperparameters."""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fuyou.core.errors import ConfigError, StoreError
from fuyou.core.sizes import align_up

INLINE_BYTES = 8192  # a tensor of more goes beside the JSON
ALIGN_BYTES = 64
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool, torch.complex64, torch.complex128,
    )
}  # fmt: skip
_NUMPY = frozenset("float64 float32 float16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool".split())


class Encoder:
    """Turns values into JSON. Tensors of more than 8 KiB go beside it, each at its offset of one range of `nbytes` bytes;
    `beside` lists (offset, flat uint8 CPU tensor) of them.

    What JSON knows stays as it is. The rest is an object with one key: "$tensor", "$numpy", "$tuple", "$dict" (keys that
    are no strings, or begin with "$"), "$counter", "$float" (not finite), "$bytes".
    """

    def __init__(self) -> None:
        self.beside: list[tuple[int, torch.Tensor]] = []
        self.nbytes = 0

    def encode(self, value: Any, what: str) -> Any:
        """ConfigError for anything that is not made of numbers, strings, None, lists, tuples, dicts, bytes, tensors and numpy
        arrays; it names the place in `what`."""
        if value is None or isinstance(value, (bool, str)):
            return value
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
        if isinstance(value, int):
            return int(value)
        if isinstance(value, torch.Tensor):
            return {"$tensor": self._tensor(value, what)}
        if isinstance(value, (np.ndarray, np.generic)):
            array = np.asarray(value)
            if array.dtype.name not in _NUMPY:
                raise ConfigError(
                    f"{what} is an array of {array.dtype}, which cannot be committed: keep numbers in it."
                )
            return {"$numpy": [array.dtype.name, list(array.shape), _text(array.tobytes())]}
        if isinstance(value, (bytes, bytearray)):
            return {"$bytes": _text(bytes(value))}
        if isinstance(value, (list, tuple)):
            items = [self.encode(item, f"{what}[{index}]") for index, item in enumerate(value)]
            return items if isinstance(value, list) else {"$tuple": items}
        if isinstance(value, dict):
            return self._dict(value, what)
        raise ConfigError(
            f"{what} is a {type(value).__qualname__}, which cannot be committed: keep numbers, strings, None, lists, tuples, "
            "dicts, tensors and numpy arrays in it."
        )

    def _dict(self, value: dict, what: str) -> Any:
        if isinstance(value, Counter):
            return {"$counter": [[self.encode(k, what), self.encode(v, what)] for k, v in value.items()]}
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {key: self.encode(item, f"{what}[{key!r}]") for key, item in value.items()}
        return {"$dict": [[self.encode(k, what), self.encode(v, f"{what}[{k!r}]")] for k, v in value.items()]}

    def _tensor(self, value: torch.Tensor, what: str) -> list[Any]:
        dtype = str(value.dtype).removeprefix("torch.")
        if dtype not in _DTYPES or value.layout is not torch.strided or value.is_meta:
            raise ConfigError(f"{what} is a tensor of {value.dtype}, {value.layout}, which cannot be committed.")
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        if flat.numel() <= INLINE_BYTES:
            return [dtype, list(value.shape), _text(flat.numpy().tobytes())]
        offset = self.nbytes
        self.beside.append((offset, flat))
        self.nbytes = align_up(offset + flat.numel(), ALIGN_BYTES)
        return [dtype, list(value.shape), offset]


class Decoder:
    """The way back. `beside(offset, nbytes)` gives what went beside the JSON. Nothing is trusted: StoreError."""

    def __init__(self, beside: Callable[[int, int], bytes]) -> None:
        self._beside = beside

    def decode(self, value: Any) -> Any:
        try:
            return self._decoded(value)
        except RecursionError as error:
            raise StoreError("The step's record is nested too deeply: it was not written by fuyou.") from error

    def _decoded(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._decoded(item) for item in value]
        if not isinstance(value, dict):
            return value
        key = next(iter(value), "")
        if len(value) != 1 or not key.startswith("$"):
            return {name: self._decoded(item) for name, item in value.items()}
        try:
            return self._special(key, value[key])
        except RecursionError:
            raise
        except (TypeError, ValueError, KeyError, OverflowError, RuntimeError) as error:  # torch's own are RuntimeErrors
            raise StoreError(
                f"A {key[1:]} in the step's record is not one ({error}): it was not written by fuyou."
            ) from error

    def _special(self, kind: str, value: Any) -> Any:
        match kind:
            case "$tensor":
                name, shape, where = value
                dtype = _DTYPES[name]
                nbytes = _count(shape) * dtype.itemsize
                data = self._beside(where, nbytes) if type(where) is int else base64.b64decode(where, validate=True)
                if len(data) != nbytes:
                    raise ValueError(f"{len(data)} bytes for shape {shape}")
                return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).view(shape) if nbytes else (
                    torch.empty(shape, dtype=dtype)
                )  # fmt: skip
            case "$numpy":
                name, shape, text = value
                if name not in _NUMPY:
                    raise ValueError(name)
                return np.frombuffer(base64.b64decode(text, validate=True), name).reshape(_checked(shape)).copy()[()]
            case "$float":
                return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[value]
            case "$bytes":
                return base64.b64decode(value, validate=True)
            case "$tuple":
                return tuple(self._decoded(list(value)))
            case "$dict" | "$counter":
                pairs = {self._decoded(key): self._decoded(item) for key, item in value}
                return Counter(pairs) if kind == "$counter" else pairs
        raise ValueError(kind)


def check_json(value: Any, what: str) -> None:
    """ConfigError where JSON would not give the same value back; it names the place in `what`."""
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return
    if type(value) is list:
        for index, item in enumerate(value):
            check_json(item, f"{what}[{index}]")
    elif type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise ConfigError(f"{what} has the key {key!r}, and JSON's are strings: use str({key!r}).")
            check_json(item, f"{what}[{key!r}]")
    else:
        shown = repr(value) if isinstance(value, float) else f"a {type(value).__qualname__}"
        raise ConfigError(
            f"{what} is {shown}, which JSON cannot carry: use dicts with strings as keys, lists, strings, finite numbers, "
            "booleans and None."
        )


def _checked(shape: Any) -> list[int]:
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"shape {shape!r}")
    return shape


def _count(shape: Any) -> int:
    return math.prod(_checked(shape))


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
