"""torch.compile: compiled blocks train as they do in plain PyTorch; compiled code around blocks is refused."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from sides import Side, compare_on, started
from torch import nn

import fuyou

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layers_of(model: nn.Module) -> nn.ModuleList:
    return model.layers if hasattr(model, "layers") else model.model.layers


def in_place(model: nn.Module) -> None:
    for each in layers_of(model):
        each.compile(backend=counting)


def by_wrapping(model: nn.Module) -> None:
    layers = layers_of(model)
    for index, each in enumerate(layers):
        layers[index] = torch.compile(each, backend=counting)


def a_part(model: nn.Module) -> None:
    for each in layers_of(model):
        each.mlp = torch.compile(each.mlp, backend=counting)


_compiled: list[int] = []


def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    """Dynamo's and AOTAutograd's part without inductor's: seconds, not minutes, and the same hooks and saved tensors."""
    from torch._dynamo.backends.debugging import aot_eager

    _compiled.append(1)
    return aot_eager(graph, inputs)


@pytest.mark.parametrize("activations", ["recompute", "keep"])
@pytest.mark.parametrize(
    ("name", "how"),
    [("gpt", in_place), ("gpt", by_wrapping), ("gpt", a_part), ("llama", in_place)],
    ids=lambda each: getattr(each, "__name__", each),
)
def test_compiled_blocks(name, how, activations, nvme):
    def prepare(model: nn.Module) -> None:
        for each in model.modules():  # compiled dropout draws other numbers than eager's, in recomputes too
            if isinstance(each, nn.Dropout):
                each.p = 0.0
        how(model)

    def script(side: Side) -> Any:
        torch._dynamo.reset()
        _compiled.clear()
        return [*side.steps(3), len(_compiled)]  # graphs: as many with fuyou as without

    seen = compare_on({"ram": "640KiB", "activations": activations}, nvme, script, name, prepare)
    assert seen[-1] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["recompute", "keep"])
@pytest.mark.parametrize("how", [in_place, by_wrapping, a_part], ids=lambda each: each.__name__)
def test_blocks_compiled_by_inductor(how, activations, nvme, monkeypatch):
    monkeypatch.setitem(globals(), "counting", "inductor")
    compare_on({"ram": "640KiB", "activations": activations}, nvme, lambda side: side.steps(3), "llama", how)


def test_a_compiled_blocks_own_hooks_run_once(nvme):
    calls: list[str] = []

    def script(side: Side) -> Any:
        calls.clear()
        handle = side.model.layers[0].register_forward_hook(lambda *_: calls.append("hook"))
        seen = side.steps(2, clip=False)
        handle.remove()
        return [*seen, len(calls)]

    compare_on({"ram": "640KiB", "activations": "recompute"}, nvme, script, "gpt", _no_dropout_in_place)


def _no_dropout_in_place(model: nn.Module) -> None:
    for each in model.modules():
        if isinstance(each, nn.Dropout):
            each.p = 0.0
    in_place(model)


def test_close_gives_the_compiled_blocks_back(nvme):
    _, model, optimizer, _ = started("gpt", _no_dropout_in_place)
    before = [each._compiled_call_impl for each in model.layers]
    with fuyou.wrap(model, optimizer, nvme, ram="640KiB", gpu="1GiB", device="cpu"):
        with pytest.raises(fuyou.ConfigError, match="wrapped already"):
            fuyou.wrap(model, optimizer, nvme, ram="640KiB", gpu="1GiB", device="cpu")
    assert [each._compiled_call_impl for each in model.layers] == before
    assert models.loss_of(model, models.CASES["gpt"].batch(0)).isfinite()


@pytest.mark.parametrize("how", ["in place", "around"])
def test_a_model_compiled_as_a_whole_is_refused(how, nvme):
    _, model, optimizer, _ = started("gpt")
    if how == "in place":
        model.compile()
    else:
        model = torch.compile(model)
    with pytest.raises(fuyou.ConfigError, match="compiled as a whole.*for layer in"):
        fuyou.wrap(model, optimizer, nvme, ram="640KiB", gpu="1GiB", device="cpu")
    assert not list(nvme.iterdir())
