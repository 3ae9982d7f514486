"""A model whose blocks sleep in place of computing, trained by plain PyTorch and, each in a process of its own, by fuyou."""

from __future__ import annotations

import contextlib
import gc
import math
import multiprocessing
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from bench_tools import MIB, Turn, peak_rss_bytes, reset_peak_rss, rss_bytes, timed_turn, weights_hash
from torch import Tensor, nn

STATE_BYTES = 12  # a parameter: weights 4, moments 8; gradients are 4 more
DEVICE_BLOCKS = 8  # of room on the device, beside what fuyou insists on for temporaries
WORKING_BYTES = 96 * MIB
CLIP_EVERY, CLIP_NEVER, CLIP_SHARE = 10, 1e9, 0.5
TENSORS_A_BLOCK = 4
PROBE_STRIDE = 4096


@dataclass
class Pace:
    """What a Sleeper's blocks are told: seconds of one block's forward (its backward takes twice that), and the step."""

    forward_s: float = 0.0
    step: int = 0


class _Sleep(torch.autograd.Function):
    """x + a probe of the weights, after a sleep. It needs the weights in forward and in backward, as a matmul does.

    time.sleep releases the GIL, so what else the process does goes on as it would beside a GPU. A gradient costs one pass
    of writing: a fixed pattern times a number that depends on step, block, tensor and the weights themselves, so weights
    that are a step old, or gradients that are another's, end in other bits.
    """

    @staticmethod
    def forward(ctx, x: Tensor, pace: Pace, index: int, pattern: Tensor, *weights: Tensor) -> Tensor:
        time.sleep(pace.forward_s)
        ctx.save_for_backward(*weights)
        ctx.pace, ctx.index, ctx.pattern = pace, index, pattern
        return x + sum(_probe(weight) for weight in weights)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        weights = ctx.saved_tensors  # where they are fetched
        pace = ctx.pace
        time.sleep(2 * pace.forward_s)
        found = []
        for number, weight in enumerate(weights):
            factor = math.sin(1.7 * pace.step + 0.9 * ctx.index + 2.3 * number) + _probe(weight)
            found.append(ctx.pattern * (1e-2 * factor))
        return gradient, None, None, None, *found


def _probe(weight: Tensor) -> float:
    """A number that a change of the weights changes; the same bits wherever they lie."""
    return math.fsum(weight.view(-1)[::PROBE_STRIDE].tolist())


class SleepingBlock(nn.Module):
    def __init__(self, index: int, pace: Pace, pattern: Tensor) -> None:
        super().__init__()
        self._index, self._pace, self._pattern = index, pace, pattern
        self.weights = nn.ParameterList(
            nn.Parameter(torch.empty_like(pattern).uniform_(-0.02, 0.02)) for _ in range(TENSORS_A_BLOCK)
        )

    def forward(self, x: Tensor) -> Tensor:
        return _Sleep.apply(x, self._pace, self._index, self._pattern, *self.weights)


class Sleeper(nn.Module):
    """`blocks` blocks of 4 square weights of `width`; the same seed gives the same weights."""

    def __init__(self, blocks: int, width: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.pace = Pace()
        pattern = torch.randn(width, width)  # shared by all: it stays in the caches
        self.blocks = nn.ModuleList(SleepingBlock(index, self.pace, pattern) for index in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.sum()

    def sleep(self, compute_s: float) -> None:
        """From now on a step's forward and backward sleep `compute_s` seconds in all."""
        self.pace.forward_s = compute_s / (3 * len(self.blocks))


# --- who trains it ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """A Sleeper and how fuyou trains it. `settled`: all updates are done at the end of step(). `prefetch`: see
    `fetch_only_when_needed`. `ram`: bytes."""

    folder: str
    ram: int
    blocks: int
    width: int
    update: str = "auto"
    durability: str | None = None
    settled: bool = False
    prefetch: bool = True
    clipping: bool = False

    @property
    def parameters(self) -> int:
        return self.blocks * TENSORS_A_BLOCK * self.width**2

    @property
    def gpu(self) -> int:
        """Bytes of the device budget."""
        return DEVICE_BLOCKS * 4 * self.parameters // self.blocks + WORKING_BYTES


def clip(model: nn.Module, step: int) -> None:
    """In one step of ten the gradients are scaled, in the others only measured. Their global norm is about that of normal
    numbers times 1e-2 times a sine."""
    firing = step % CLIP_EVERY == CLIP_EVERY - 1
    typical = 1e-2 * 0.7 * sum(parameter.numel() for parameter in model.parameters()) ** 0.5
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_SHARE * typical if firing else CLIP_NEVER)


class Plain:
    """The oracle in RAM: what compute alone takes, and what the weights are after so many steps."""

    def __init__(self, blocks: int, width: int, clipping: bool) -> None:
        self.model = Sleeper(blocks, width)
        self._clipping = clipping

    def _backward(self, step: int) -> float:
        self.model.pace.step = step
        loss = self.model(torch.zeros(8))
        loss.backward()
        if self._clipping:
            clip(self.model, step)
        return loss.item()

    def compute(self) -> float:
        """A step without its update: the weights stay as they are."""
        loss = self._backward(0)
        self.model.zero_grad()
        return loss

    def hashes(self, counts: set[int]) -> dict[int, str]:
        """The weights' hash after each of these numbers of steps of AdamW(fused=True)."""
        self.model.sleep(0.0)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        found = {}
        for step in range(max(counts)):
            self._backward(step)
            optimizer.step()
            optimizer.zero_grad()
            if step + 1 in counts:
                found[step + 1] = weights_hash(self.model)
        return found


class Contestant:
    """A Sleeper wrapped by fuyou, and what it did. `memory`: bytes, of the process too."""

    def __init__(self, setup: Setup) -> None:
        import fuyou

        self._setup = setup
        self._steps = 0
        torch.optim.AdamW(
            [nn.Parameter(torch.zeros(8))], fused=True
        )  # what torch loads for its first one is not the run's
        before = rss_bytes()
        model = Sleeper(setup.blocks, setup.width)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        config = fuyou.Config(activations="keep", update=setup.update, durability=setup.durability)
        self.run = fuyou.wrap(
            model, optimizer, nvme=setup.folder, ram=setup.ram, gpu=setup.gpu, device="cpu", config=config
        )
        if not setup.prefetch:
            fetch_only_when_needed(self.run)
        self._base_bytes = before
        del model, optimizer
        gc.collect()
        reset_peak_rss()  # the model in RAM, as it was before wrap, is no longer part of it

    def step(self) -> float:
        model, optimizer = self.run.model, self.run.optimizer
        model.pace.step = self._steps
        loss = model(torch.zeros(8))
        loss.backward()
        if self._setup.clipping:
            clip(model, self._steps)
        optimizer.step()
        optimizer.zero_grad()
        if self._setup.settled:
            self.run.settle()
        self._steps += 1
        return loss.item()

    def turn(self, steps: int, compute_s: float, warmup: int) -> Turn:
        self.run.model.sleep(compute_s)
        return timed_turn(self.step, steps, self.run, warmup)

    def summary(self) -> dict[str, Any]:
        """Steps made, memory in bytes, and the hash of the weights."""
        memory = {"rss_grown_bytes": peak_rss_bytes() - self._base_bytes}  # before the weights are read, block by block
        for tier, name in (("host", "ram"), ("device", "gpu")):
            found = self.run.report().dict()["tiers"][tier]
            memory |= {f"{name}_bytes": found["budget_bytes"], f"{tier}_peak_bytes": found["peak_bytes"]}
        return {"steps": self._steps, "memory": memory, "hash": weights_hash(self.run.model)}

    def close(self) -> None:
        self.run.close()


def fetch_only_when_needed(run: Any) -> None:
    """The serial schedule's weights: hints to fetch ahead are not taken. There is no option for this, so it is done to
    the run's inside: `fetch` is what starts a block's weights on their way, `needed` where a block waits for them."""
    swapper = run._movers.swapper
    fetch = swapper.fetch
    swapper.fetch = lambda unit, *, needed=False: fetch(unit, needed=True) if needed else False


class Remote:
    """A Contestant in a process of its own, so that its memory is its own and nothing of it runs in others' turns.
    `make(setup)` makes it there: another class of this kind, in another bench."""

    def __init__(self, setup: Any, make: Callable[[Any], Any] = Contestant) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(setup, make, theirs), daemon=True)
        self._process.start()
        self._failed = False
        theirs.close()

    def ready(self) -> None:
        """Its run is open. To be called first, and once; several may start meanwhile."""
        self._receive()

    def turn(self, *arguments: Any) -> Turn:
        return self._ask("turn", *arguments)

    def summary(self) -> dict[str, Any]:
        return self._ask("summary")

    def close(self) -> None:
        """The run is closed and the process gone, also where it had failed."""
        with contextlib.suppress(OSError):  # it is gone already
            self._connection.send(("close",))
        self._process.join()
        if self._process.exitcode and not self._failed:
            raise SystemExit(f"A run's process ended with status {self._process.exitcode} when it closed.")

    def _ask(self, *request: Any) -> Any:
        self._connection.send(request)
        return self._receive()

    def _receive(self) -> Any:
        try:
            done, answer = self._connection.recv()
        except (EOFError, ConnectionError):
            self._failed = True
            self._process.join()
            raise SystemExit(f"A run's process ended with status {self._process.exitcode}.") from None
        if not done:
            self._failed = True
            raise SystemExit(f"A run failed in its process:\n{answer}")
        return answer


def _serve(setup: Any, make: Callable[[Any], Any], connection: Connection) -> None:
    """What the process of a Remote does until it is told to close."""
    torch.set_num_threads(1)  # a GPU's host thread: what the CPU does here beside Adam is little
    try:
        contestant = make(setup)
        connection.send((True, None))
        method = ""
        while method != "close":
            method, *arguments = connection.recv()
            connection.send((True, getattr(contestant, method)(*arguments)))
    except EOFError:  # the parent is gone, and its folder with it
        pass
    except BaseException:
        connection.send((False, traceback.format_exc()))
        raise SystemExit(1) from None
