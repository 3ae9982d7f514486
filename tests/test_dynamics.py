"""Models and loops that do unusual things train as in plain PyTorch, bit for bit: losses, norms, weights, buffers."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fuyou

WIDTH = 64


class OwnNorm(nn.Module):
    """Writes its statistics past torch's version counters, as batch norm does; the mean of zeros leaves one as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("variance", torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.batch_norm(x, self.mean, self.variance, training=True)


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH) if "batch norm" in kind else OwnNorm() if "own norm" in kind else None
        self.experts = (
            nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3)) if kind == "expert without a token" else None
        )
        if kind == "puts another tensor in a buffer's place":
            self.register_buffer("mean", torch.zeros(()))
        self.calls = 0

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.kind == "checkpoint inside":
            return x + checkpoint(self.inner, x, use_reentrant=False)
        if self.kind == "reentrant checkpoint inside":
            return x + checkpoint(self.inner, x, use_reentrant=True)
        if self.kind == "batch norm left out at first" and self.calls == 1:
            return x + self.inner(x)
        if self.kind == "own norm of zeros at first":
            return x + self.norm(self.inner(x) * (self.calls > 1))
        if self.norm is not None:
            return x + self.norm(self.inner(x))
        if self.experts is not None:
            return x + self.inner(x) + self.experts[int(x.detach().sum().item() * 1000) % 3](x)
        if self.kind == "changes what it made in place":
            return x + self.inner(x).mul_(2)
        if self.kind == "puts another tensor in a buffer's place":
            self.mean = self.mean * 0.9 + x.detach().mean() * 0.1
            if "calls_so_far" not in self._buffers:
                self.register_buffer("calls_so_far", torch.zeros(()))
            self.calls_so_far = self.calls_so_far + 1
            return x + self.inner(x) * self.mean * self.calls_so_far
        if self.kind == "counts its calls":
            return x + self.inner(x) * self.calls
        return x + self.inner(x)


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Block(kind) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            if self.kind == "checkpoint outside":
                x = checkpoint(layer, x, use_reentrant=False)
            elif self.kind == "reentrant checkpoint outside":
                x = checkpoint(layer, x, use_reentrant=True)
            elif self.kind == "layer drop" and torch.rand(()) < 0.5:
                continue
            elif self.kind == "block called twice":
                x = layer(layer(x))
            else:
                x = layer(x)
        x = self.last(x)
        if self.kind == "tied by hand":
            x = nn.functional.linear(x, self.first.weight)
        if self.kind == "weights read by others":
            x = x * self.layers[0].up.weight[0, 0] * self.first.bias
        return x


def loss_of(model: Model, kind: str, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    x = torch.randn(8, WIDTH)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        loss = model(x).float().pow(2).mean()
    if kind == "penalty on weights":
        loss = loss + 1e-3 * sum(parameter.pow(2).sum() for parameter in model.parameters())
    return loss


def backward(model: Model, loss: torch.Tensor, kind: str) -> list[float]:
    if kind == "retain_graph":
        loss.backward(retain_graph=True)
    if kind == "autograd.grad":
        gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        loss.backward()
        return [gradient.norm().item() for gradient in gradients]
    if kind == "double backward":
        loss = loss + torch.autograd.grad(loss, [model.first.weight], create_graph=True)[0].pow(2).sum()
    loss.backward()
    return []


def touch_gradients(model: Model, kind: str) -> list[float]:
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    if kind == "gradients changed":
        for parameter in parameters:
            parameter.grad *= 0.3
            parameter.grad.add_(0.01)
            parameter.grad.data.mul_(0.9)
            parameter.grad[0] = 0.5
    if kind == "gradients divided":
        for parameter in parameters:
            parameter.grad.div_(3.0)
    if kind == "gradient set":
        model.first.weight.grad = torch.ones_like(model.first.weight)
    if kind == "clip_grad_value_":
        torch.nn.utils.clip_grad_value_(model.parameters(), 0.01)
    if kind == "gradients read":
        return [parameter.grad.abs().max().item() for parameter in parameters] + [len(repr(parameters[0].grad))]
    return []


def after_step(model: Model, optimizer: torch.optim.Optimizer, kind: str) -> list[float]:
    if kind == "learning rate changed":
        optimizer.param_groups[0]["lr"] *= 0.5
    if kind == "weights written":
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.99)
                parameter.data.add_(0.001)
                parameter.view(-1)[0].zero_()
                parameter.data = parameter.data * 1.01
    if kind == "eval between":
        model.eval()
        with torch.no_grad():
            seen = model(torch.ones(2, WIDTH)).sum().item()
        model.train()
        return [seen]
    return []


def train(model: Model, optimizer: torch.optim.Optimizer, kind: str) -> list[float]:
    seen = []
    for step in range(4):
        for turn in range(2):
            loss = loss_of(model, kind, 10 * step + turn)
            seen += [loss.item(), *backward(model, loss, kind)]
        seen += touch_gradients(model, kind)
        seen.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1).item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=kind != "zeros, not None")
        seen += after_step(model, optimizer, kind)
    return seen


KINDS = [
    "plain", "checkpoint inside", "reentrant checkpoint inside", "checkpoint outside", "reentrant checkpoint outside",
    "batch norm", "expert without a token", "changes what it made in place", "counts its calls", "layer drop",
    "puts another tensor in a buffer's place", "own norm of zeros at first", "batch norm left out at first",
    "block called twice", "tied by hand", "weights read by others", "autocast", "penalty on weights", "retain_graph",
    "autograd.grad", "double backward", "gradients changed", "gradients divided", "gradient set", "clip_grad_value_",
    "gradients read", "learning rate changed", "weights written", "eval between", "zeros, not None",
]  # fmt: skip


@pytest.mark.parametrize("activations", ["recompute", "keep"])
@pytest.mark.parametrize("kind", KINDS)
def test_as_plain_pytorch(tmp_path, kind, activations):
    torch.manual_seed(0)
    plain = Model(kind)
    model = copy.deepcopy(plain)
    expected = train(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True), kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    config = fuyou.Config(activations=activations)
    with fuyou.wrap(model, optimizer, nvme=tmp_path, ram="250KiB", gpu="512MiB", device="cpu", config=config) as run:
        seen = train(model, run.optimizer, kind)
        assert run.report().dict()["traffic"]["nvme_write_bytes_per_step"] > 0
    assert seen == expected
    for (name, a), b in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_block_that_changes_its_input_is_refused_before_it_trains_wrongly(tmp_path):
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x.mul_(2)).tanh()

    model = nn.Sequential(InPlace(), InPlace())
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with (
        fuyou.wrap(model, optimizer, nvme=tmp_path, ram="250KiB", gpu="512MiB", device="cpu"),
        pytest.raises(fuyou.StateError, match="activations='keep'"),
    ):
        model(torch.randn(2, WIDTH))
