"""Blocks whose rows cannot be run apart run their whole batch, with the bits of plain PyTorch, and this is said once."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any

import pytest
import torch
from architectures import TEXTS
from architectures_media import MEDIA
from sliced import sliced
from test_architectures import loss_of as loss_of_batch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import fuyou

B, T, D = 6, 5, 16


@dataclasses.dataclass
class Result:
    hidden: torch.Tensor
    extra: Any = None


class Block(nn.Module):
    """x (B, T, D) → a block that treats rows as `kind` says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.bias = nn.Embedding(T, D)
        self.norm = nn.BatchNorm1d(D) if kind == "batch norm" else None
        if kind == "buffer":
            self.register_buffer("mean", torch.zeros(D))
        self.calls = 0

    def forward(self, x: torch.Tensor, more: Any = None) -> Any:
        kind, y = self.kind, functional.dropout(self.down(torch.tanh(self.up(x))), 0.1, self.training)
        if kind == "batch norm":
            return x + self.norm(y.transpose(1, 2)).transpose(1, 2)
        if kind == "own statistics":
            return x + functional.batch_norm(y.flatten(0, 1), None, None, training=True).view_as(y)
        if kind == "faint":  # less than rounding would be
            return x + y + 1e-7 * x.mean(0)
        if kind == "buffer":
            with torch.no_grad():
                self.mean.lerp_(y.mean((0, 1)), 0.1)
            return x + y
        if kind == "time first":  # x is (T, B, D)
            q = y.transpose(0, 1)
            return x + functional.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(0, 1)
        if kind == "loss inside":
            return y, y.square().mean()
        if kind == "transposed":
            return x + y, y.sum(-1).T
        if kind == "chance":  # more (B, T, T) is one for each of B heads, and adds to scores of (1, B, T, T)
            scores = more[None] + torch.zeros(x.shape[0], 1, 1, 1)
            return x + y * scores.mean((1, 2, 3)).view(-1, 1, 1)
        if kind == "in place":
            x[..., 0] *= 0.5
            return x + self.down(torch.tanh(self.up(x)))
        if kind == "attribute":
            self.calls += 1
            return x + y / self.calls
        if kind == "list":
            more.append(y.mean())
            return x + y
        if kind == "sizes":
            return x + y * x.shape[0]
        return x + y


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layers = nn.ModuleList(Block(kind) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        more: Any = {"chance": torch.arange(B * T * T).view(B, T, T).float() / 99, "list": []}.get(self.kind)
        extra = torch.zeros(())
        for layer in self.layers:
            if self.kind == "flattened":
                x = layer(x.flatten(0, 1)).view_as(x)
            elif self.kind == "time first":
                x = layer(x.transpose(0, 1)).transpose(0, 1)
            elif self.kind in ("loss inside", "transposed"):
                x, other = layer(x)
                extra = extra + other.square().mean()
            else:
                x = layer(x.clone() if self.kind == "in place" else x, more)
        return x.square().mean() + extra


def loss_of(model: nn.Module, index: int, shape: tuple[int, ...] = (B, T, D)) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(index))
    torch.manual_seed(index)
    return model(x)


def run_of(model: nn.Module, rows: int, **options: Any) -> fuyou.Run:
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    config = fuyou.Config(micro_batch=rows, **options)
    return fuyou.wrap(model, optimizer, nvme=None, ram="1GiB", gpu="1GiB", device="cpu", config=config)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("batch norm", "normalises over the batch"),
        ("own statistics", "depends on the other rows"),
        ("faint", "depends on the other rows"),
        ("buffer", "changes its buffers"),
        ("time first", "its first tensor has 5 rows where the model's own inputs have 6"),
        ("flattened", "its first tensor has 30 rows where the model's own inputs have 6"),
        ("loss inside", "depends on the other rows"),
        ("transposed", "has no part for each row"),
        ("chance", "cannot run on some of its rows|depends on the other rows|no part for each row"),
        ("in place", "changes an argument in place"),
        ("attribute", "keeps something in attributes"),
        ("list", "depends on the other rows|another structure"),
    ],
)
def test_run_whole_with_the_bits_of_plain_pytorch(kind, reason):
    torch.manual_seed(0)
    plain = Model(kind)
    model = copy.deepcopy(plain)
    options = {"activations": "keep" if kind == "in place" else "recompute"}
    with pytest.warns(UserWarning, match=rf"micro_batch=2: block layers.0 runs its whole batch.*({reason})") as said:
        run = run_of(model, 2, **options)
        with run:
            for index in range(3):
                expected, found = loss_of(plain, index), loss_of(model, index)
                assert found.item() == expected.item()
                expected.backward()
                found.backward()
            notes = [note for note in run.report().dict()["notes"] if "micro_batch" in note]
            for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
                assert (ours.grad is None) == (theirs.grad is None)
                assert ours.grad is None or torch.equal(ours.grad, theirs.grad), name
    assert len(notes) == len([each for each in said if "micro_batch" in str(each.message)]) == 1
    for (name, ours), theirs in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs), name


def test_wrap_itself_says_it_of_batch_norm():
    model = Model("batch norm")
    with pytest.warns(UserWarning, match="micro_batch=2: block layers.0 .*normalises over the batch"):
        run = run_of(model, 2)
    run.close()


def test_time_first_is_seen_where_time_and_batch_are_equal():
    """Rows of the first tensor are then as many as the model's, and only a trial shows that they are no rows."""
    plain = Model("time first")
    model = copy.deepcopy(plain)
    with pytest.warns(UserWarning, match="depends on the other rows"), run_of(model, 2):
        assert loss_of(model, 0, (T, T, D)).item() == loss_of(plain, 0, (T, T, D)).item()


def test_a_tensor_with_the_size_of_the_batch_by_chance_is_seen_at_two_rows():
    """Two heads and two rows: a bias for each head would be cut to one that is added to both."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(D, D)

        def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            q = x.view(x.shape[0], T, 2, D // 2).transpose(1, 2)
            y = functional.scaled_dot_product_attention(q, q, q, attn_mask=bias)  # (2, T, T)
            return self.out(y.transpose(1, 2).reshape(x.shape))

    class WithBias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Heads() for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            bias = torch.stack([torch.zeros(T, T), torch.eye(T) * 5])
            for layer in self.layers:
                x = layer(x, bias)
            return x.square().mean()

    plain = WithBias()
    model = copy.deepcopy(plain)
    with pytest.warns(UserWarning, match="depends on the other rows"), run_of(model, 1):
        assert loss_of(model, 0, (2, T, D)).item() == loss_of(plain, 0, (2, T, D)).item()


# --- what is around a sliced block ------------------------------------------------------------------------------------


def test_trying_leaves_nothing_behind():
    """Hooks inside see the slices and nothing else; random numbers, buffers and attributes are as without a trial."""
    model = Model("plain")
    model.layers[1].register_buffer("untouched", torch.randn(3))
    before = model.layers[1].untouched.clone()
    seen: list[tuple[int, bool]] = []
    model.layers[0].up.register_forward_hook(lambda module, args, out: seen.append((len(out), bool(out.isnan().any()))))
    outside: list[int] = []
    model.layers[0].register_forward_hook(lambda module, args, out: outside.append(len(out)))
    oracle = copy.deepcopy(model)
    for layer in oracle.layers:
        layer.forward = sliced(layer.forward, 4)
    with run_of(model, 4, activations="keep"):
        found = loss_of(model, 0).item(), torch.rand(3)
    assert seen == [(4, False), (2, False)]
    assert outside == [6]
    expected = loss_of(oracle, 0).item(), torch.rand(3)
    assert found[0] == expected[0]
    assert torch.equal(found[1], expected[1])
    assert torch.equal(model.layers[1].untouched, before)
    assert model.layers[0].calls == 0


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_checkpoints_of_the_user(where, reentrant):
    class Checkpointed(Block):
        def forward(self, x: torch.Tensor, more: Any = None) -> torch.Tensor:
            return checkpoint(super().forward, x, use_reentrant=reentrant) if where == "inside" else super().forward(x)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(D, D)
            self.layers = nn.ModuleList(Checkpointed("plain") for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=reentrant) if where == "outside" else layer(x)
            return x.square().mean()

    compare(Around())


@pytest.mark.filterwarnings("ignore:micro_batch=4")
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_runs_whole_again_what_ran_whole(reentrant):
    """In backward the model's own inputs are no longer at hand, and are remembered."""

    class Flattened(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.requires_grad_()
            for layer in self.layers:
                x = checkpoint(layer, x.flatten(0, 1), use_reentrant=reentrant).view_as(x)
            return x.square().mean()

    plain = Flattened("flattened")
    model = copy.deepcopy(plain)
    with run_of(model, 4, activations="keep"):
        for each in (plain, model):
            loss_of(each, 0).backward()
        for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None)
            assert ours.grad is None or torch.equal(ours.grad, theirs.grad), name


@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_autocast(activations):
    compare(Model("plain"), activations, autocast=True)


def compare(model: nn.Module, activations: str = "recompute", autocast: bool = False) -> None:
    """Gradients of two accumulated backwards are those of the oracle."""
    oracle = copy.deepcopy(model)
    for each in [*oracle.layers, *([oracle.first] if hasattr(oracle, "first") else [])]:
        each.forward = sliced(each.forward, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with run_of(model, 4, activations=activations):
            for index in range(2):
                for each in (oracle, model):
                    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                        loss = loss_of(each, index)
                    loss.backward()
            for (name, ours), theirs in zip(model.named_parameters(), oracle.parameters(), strict=True):
                assert (ours.grad is None) == (theirs.grad is None)
                assert ours.grad is None or torch.equal(ours.grad, theirs.grad), name


def test_results_of_every_structure():
    """Dicts, lists, dataclasses, None and tensors of several rows each are put together; a table is taken once."""

    class Structured(Block):
        def forward(self, x: torch.Tensor, more: Any = None) -> Any:
            y = super().forward(x)
            flat = y.flatten(0, 1)  # (B·T, D), as router logits are
            return {"all": [y, None, (flat, 3)], "result": Result(y, self.bias.weight * 2)}

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Structured("plain") for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen = []
            for layer in self.layers:
                result = layer(x)
                x, nothing, (flat, number) = result["all"]
                assert nothing is None
                assert number == 3
                seen += [flat.shape, result["result"].extra.shape]
                x = x + flat.view_as(x) + result["result"].hidden + result["result"].extra
            assert seen == [(B * T, D), (T, D)] * 2
            return x.square().mean()

    model = Reads()
    plain = copy.deepcopy(model).eval()
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with run_of(model, 4):
            expected, found = loss_of(plain, 0), loss_of(model, 0)
            torch.testing.assert_close(found, expected)
            expected.backward()
            found.backward()
            for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
                assert ours.grad is not None, name
                torch.testing.assert_close(ours.grad + 0, theirs.grad)


# Plain PyTorch cannot differentiate RWKV in eval: it changes its state in place.
EVALUATED = {name: each for name, each in {**TEXTS, **MEDIA}.items() if name != "Rwkv"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:micro_batch=1")
@pytest.mark.parametrize("name", EVALUATED)
def test_architectures_without_dropout_are_what_they_are_unsliced(name):
    """Loss and gradients but for rounding, row by row: nothing is cut that is not by row."""
    architecture = EVALUATED[name]
    plain, model = architecture.build().eval(), architecture.build().eval()
    with run_of(model, 1):
        losses = []
        for each in (plain, model):
            torch.manual_seed(0)
            loss = loss_of_batch(each, architecture.batch(0))
            loss.backward()
            losses.append(loss.item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
        total = torch.nn.utils.get_total_norm([each.grad for each in plain.parameters() if each.grad is not None])
        for (path, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            if theirs.grad is not None:
                difference = ((ours.grad + 0) - theirs.grad).norm()
                assert difference <= 1e-3 * theirs.grad.norm() + 1e-4 * total + 1e-6, path
