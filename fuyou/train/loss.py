"""The loss of a causal language model from its last hidden states: its logits never exist whole.

[Note: deferred logits]
The model's own forward runs, unchanged. But while it runs, its output layer answers with `Logits`: the hidden states
and the promise of a product. The few things that models do with logits before their loss (upcast, scale, cap, shift,
flatten) are noted down, and the cross-entropy at the end computes them in tiles: a linear cross-entropy, whose scaling,
shift, mean, auxiliary losses and ignored labels are whatever the model's own code says. Anything else that is asked of
the logits (a z-loss, an added tensor, a mask) computes them whole, which is right, only larger; it is said once, and
from then on the model is left alone.

The output layer is called once, when the loss asks, and gives losses instead of logits: a block call like any other to
`fuyou.wrap`, which has the layer's weights on the device for it and for its backward, and nothing of the logits to keep.

Why not torch.nn.functional.linear_cross_entropy (torch 2.13): it returns the loss of a bf16 model in bf16, where the
model's own is fp32, holds the weight's gradient from forward to backward, out of sight of whoever counts memory, and
knows no scaled or capped logits. It is the method of Liger's kernel (arXiv 2410.10989) and of CCE (arXiv 2411.09009).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fuyou.checkpoint.adapters import unwrapped
from fuyou.core.blocks import find_blocks
from fuyou.train.token_losses import Step, TokenLosses, applied


class DeferredHead:
    """Calls of one model during which its output layer waits for the loss ([Note: deferred logits])."""

    def __init__(self, model: nn.Module, say: Callable[[str], None]) -> None:
        """`say` gets one sentence, at most once: why the logits are computed whole."""
        self._name = type(unwrapped(model)).__name__
        self._say = say
        self._asked = False  # for losses, in any forward so far
        reason = why_not(model)
        self.waiting = not reason
        if reason:
            self._say(self._in_words(reason))
            return
        self.layer: nn.Linear = model.get_output_embeddings()  # type: ignore[operator]

    @contextlib.contextmanager
    def deferring(self) -> Iterator[None]:
        """For one forward of the model: for its length, and no longer, the output layer's `forward` is replaced."""
        if not self.waiting:
            yield
            return
        layer = self.layer
        replaced = "forward" in vars(layer)  # the wrapped model's
        self.forward = layer.forward
        layer.forward = lambda hidden: Logits(self, hidden)  # type: ignore[method-assign, assignment, return-value]
        try:
            yield
        finally:
            if replaced:
                layer.forward = self.forward  # type: ignore[method-assign]
            else:
                del layer.forward
        if not self._asked:
            self.give_up("does not make its loss of its output layer and a cross-entropy")

    def losses(self, hidden: torch.Tensor, labels: torch.Tensor, ignored: int, steps: tuple[Step, ...]) -> torch.Tensor:
        """(N,) fp32, 0 where the label is `ignored`: of hidden (N, D) and labels (N,), in one call of the layer."""
        self._asked = True
        with _LossesInstead(self.layer.weight, labels, ignored, steps):
            return self.forward(hidden)

    def give_up(self, reason: str) -> None:
        """From the next forward on the model is left alone."""
        if self.waiting:
            self.waiting = False
            self._say(self._in_words(reason))

    def _in_words(self, reason: str) -> str:
        return f"The loss is the model's own, which needs all logits of a batch at once: {self._name} {reason}."


def why_not(model: nn.Module) -> str:
    """Why the output layer of `model` cannot wait for the loss, as the end of a sentence; empty where it can.

    It must be a plain linear layer (no adapter on it) and a block of its own, whose call brings its weights.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        return "has no output layer that it names"
    if type(head) is not nn.Linear:
        return f"has a {type(head).__name__} as output layer, which is not a plain linear one"
    if not any(block.module is head for block in find_blocks(model)):
        return "has its output layer inside of a larger block"
    return ""


# --- what the model sees ------------------------------------------------------------------------------------------


class Logits:
    """What the output layer would have returned: (..., V), of which nothing is computed until it must be."""

    def __init__(self, owner: DeferredHead, hidden: torch.Tensor, steps: tuple[Step, ...] = ()) -> None:
        self._owner = owner
        self._hidden = hidden  # (..., D), device
        self._steps = steps
        self._values: torch.Tensor | None = None  # all of them, once something has asked for them

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self._hidden.shape[:-1], self._owner.layer.out_features))

    @property
    def dtype(self) -> torch.dtype:
        cast = [each for _, arguments in self._steps for each in arguments if isinstance(each, torch.dtype)]
        return cast[-1] if cast else self._hidden.dtype

    @property
    def device(self) -> torch.device:
        return self._hidden.device

    @property
    def ndim(self) -> int:
        return self._hidden.ndim

    def size(self, dimension: int | None = None) -> Any:
        return self.shape if dimension is None else self.shape[dimension]

    def dim(self) -> int:
        return self.ndim

    # Noted down, one element at a time --------------------------------------------------------------------------------

    def _then(self, function: Callable[..., torch.Tensor], *arguments: Any) -> Any:
        if self._values is None:
            return Logits(self._owner, self._hidden, (*self._steps, (function, arguments)))
        return function(self._values, *arguments)

    def float(self) -> Any:
        return self.to(torch.float32)

    def to(self, *arguments: Any, **options: Any) -> Any:
        if len(arguments) != 1 or options:
            return self.whole("to").to(*arguments, **options)
        if isinstance(arguments[0], torch.dtype):
            return self if arguments[0] == self.dtype else self._then(torch.Tensor.to, arguments[0])
        if isinstance(arguments[0], (str, torch.device)) and torch.device(arguments[0]) == self.device:
            return self
        return self.whole("to").to(*arguments)

    def tanh(self) -> Any:
        return self._then(torch.tanh)

    def __mul__(self, other: Any) -> Any:
        return self._then(torch.mul, other) if _is_number(other) else self.whole("*") * other

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return self._then(torch.div, other) if _is_number(other) else self.whole("/") / other

    # Done to the hidden states: whatever leaves the last dimension alone -----------------------------------------------

    def _of(self, hidden: torch.Tensor) -> Logits:
        return Logits(self._owner, hidden, self._steps)

    def contiguous(self) -> Any:
        return self if self._values is None else self._values.contiguous()

    def view(self, *shape: Any) -> Any:
        given = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        if self._values is None and given and given[-1] == self.shape[-1]:
            return self._of(self._hidden.reshape(*given[:-1], self._hidden.shape[-1]))
        return self.whole("view").reshape(*shape)

    reshape = view

    def __getitem__(self, key: Any) -> Any:
        if self._values is None and _leaves_last(key, self.ndim):
            return self._of(self._hidden[key])
        return self.whole("indices")[key]

    # The end of it ----------------------------------------------------------------------------------------------------

    def cross_entropy(self, target: torch.Tensor, ignore_index: int, reduction: str) -> torch.Tensor:
        """functional.cross_entropy of (N, V) with (N,) labels, in tiles."""
        losses = self._owner.losses(self._hidden, target, ignore_index, self._steps)
        if reduction == "sum":
            losses = losses.sum()
        elif reduction == "mean":
            losses = losses.sum() / (target != ignore_index).sum()
        return losses.to(self.dtype)

    def whole(self, use: str) -> torch.Tensor:
        """All logits, for a `use` that is not known here."""
        if self._values is None:
            self._owner.give_up(f"asks more of its logits than a cross-entropy ({use})")
            self._values = applied(self._owner.forward(self._hidden), self._steps)
        return self._values

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(torch.Tensor, name):
            raise AttributeError(f"logits have no {name}")
        return getattr(self.whole(name), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "input" in kwargs:
            args = (kwargs.pop("input"), *args)
        if args and isinstance(args[0], Logits) and args[0]._values is None:
            if function in (torch.tanh, functional.tanh) and len(args) == 1 and not kwargs:
                return args[0].tanh()
            if function in (torch.mul, torch.div) and len(args) == 2 and _is_number(args[1]) and not kwargs:
                return args[0]._then(function, args[1])
            if function is functional.cross_entropy and _is_plain(*args, **kwargs):
                given = {"ignore_index": -100, "reduction": "mean", **kwargs}
                return args[0].cross_entropy(args[1], given["ignore_index"], given["reduction"])

        def computed(each: Any) -> Any:
            return each.whole(getattr(function, "__name__", "")) if isinstance(each, Logits) else each

        return function(*pytree.tree_map(computed, args), **pytree.tree_map(computed, kwargs))


def _on_whole(name: str) -> Callable[..., Any]:
    return lambda self, *others: getattr(self.whole(name.strip("_")), name)(*others)


for _name in (
    "add radd sub rsub rtruediv floordiv mod pow rpow matmul neg abs eq ne lt le gt ge and or xor invert setitem len iter "
    "bool int float"
).split():
    setattr(Logits, f"__{_name}__", _on_whole(f"__{_name}__"))
Logits.__hash__ = object.__hash__  # type: ignore[method-assign]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _leaves_last(key: Any, dimensions: int) -> bool:
    """Whether an index chooses among all but the last dimension."""
    if isinstance(key, torch.Tensor):
        return key.ndim < dimensions
    key = key if isinstance(key, tuple) else (key,)
    if not all(each is Ellipsis or isinstance(each, (int, slice)) for each in key):
        return False
    addressed = len(key) - key.count(Ellipsis)
    reaches_last = addressed == dimensions or (Ellipsis in key and key[-1] is not Ellipsis)
    return addressed <= dimensions and (not reaches_last or key[-1] == slice(None))


def _is_plain(logits: Logits, target: Any, weight: Any = None, **options: Any) -> bool:
    """A cross-entropy of rows with one label each, every class counted alike."""
    known = {"ignore_index", "reduction", "label_smoothing", "size_average", "reduce"}
    others = [options.get(name) for name in ("size_average", "reduce")] + [weight]
    return (
        options.keys() <= known
        and all(each is None for each in others)
        and not options.get("label_smoothing")
        and options.get("reduction", "mean") in ("mean", "sum", "none")
        and isinstance(target, torch.Tensor)
        and target.dtype == torch.int64
        and logits.ndim == 2
        and target.shape == logits.shape[:1]
    )


# --- the product --------------------------------------------------------------------------------------------------


class _LossesInstead(TorchFunctionMode):
    """Around one call of the output layer: its product gives losses, while its weights are on the device."""

    def __init__(self, weight: torch.Tensor, labels: torch.Tensor, ignored: int, steps: tuple[Step, ...]) -> None:
        super().__init__()
        self._weight = weight
        self._rest = (labels, ignored, steps)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not functional.linear or args[1] is not self._weight:
            return function(*args, **(kwargs or {}))
        hidden, weight, bias = args
        if hidden.shape[:-1] != self._rest[0].shape:
            raise RuntimeError(
                f"the output layer was given hidden states {tuple(hidden.shape)} for labels {tuple(self._rest[0].shape)}"
            )
        return TokenLosses.apply(hidden, weight, bias, *self._rest)
