"""PEFT: adapters train to plain PyTorch's bits, and the frozen weights under them are only ever read."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import clients
import pytest
import torch
from clients import Side, llama, lora, with_adapters
from torch import nn

import fuyou
from fuyou.swap.unit import chunks_of

peft = pytest.importorskip("peft")

RAM = "240KiB"  # less than the frozen weights: they are streamed from NVMe
STEPS, ACCUMULATION, CLIP = 3, 2, 1e-3

Look = Callable[[nn.Module, int], Any]


def loop(look: Look | None = None) -> clients.Script:
    """The loop that everybody writes; `look(model, step)` runs between backward and step."""

    def script(side: Side) -> Any:
        seen: list[Any] = []
        for step in range(STEPS):
            for micro in range(ACCUMULATION):
                torch.manual_seed(100 * step + micro)
                tokens = clients.batch(10 * step + micro)
                loss = side.model(input_ids=tokens, labels=tokens).loss / ACCUMULATION
                loss.backward()
                seen.append(loss.item())
            seen.append(torch.nn.utils.clip_grad_norm_(side.model.parameters(), CLIP).item())
            assert seen[-1] > CLIP  # it bites
            if look is not None:
                seen.append(look(side.model, step))
            side.optimizer.step()
            side.scheduler.step()
            side.optimizer.zero_grad()
        return seen

    return script


def logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        result = model(input_ids=torch.arange(5, 15)[None]).logits.clone()
    model.train()
    return result


def checkpointed(model: nn.Module, reentrant: bool) -> nn.Module:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


# --- methods --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_gradient_checkpointing(reentrant, dora, tmp_path, nvme):
    def build() -> nn.Module:
        return checkpointed(with_adapters(lora(use_dora=dora)), reentrant)

    clients.compare(loop(), build, tmp_path, nvme, ram=RAM)


@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_trainer_with_gradient_checkpointing(reentrant, tmp_path, nvme):
    """It also writes adapters, and goes on from them."""
    from test_trainer import contents, logs_of, trainer_of

    options = {
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
        "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip

    def script(side: Side) -> Any:
        trainer = trainer_of(side, max_steps=4, **options)
        trainer.train()
        again = trainer_of(side, max_steps=4, **options)
        again.train(resume_from_checkpoint=str(side.folder / "checkpoint-2"))
        assert logs_of(again) == logs_of(trainer)  # back to the second step, and on
        return [logs_of(again), contents(side.folder / "checkpoint-2"), contents(side.folder / "checkpoint-4")]

    def build() -> nn.Module:
        return with_adapters(base=lambda: llama(vocab_size=200))

    _, written, _ = clients.compare(script, build, tmp_path, nvme, ram=RAM)
    assert "adapter_model.safetensors" in written["files"] and "model.safetensors" not in written["files"]


METHODS: dict[str, Callable[[], Any]] = {
    "rank-stabilised": lambda: lora(use_rslora=True, init_lora_weights="gaussian"),
    "embedding and head": lambda: lora(target_modules=["embed_tokens", "lm_head", "q_proj"]),
    "a head trained whole": lambda: lora(modules_to_save=["lm_head"]),
    "an embedding trained whole": lambda: lora(modules_to_save=["embed_tokens"]),
    "some tokens": lambda: lora(trainable_token_indices=[1, 5, 9]),
    "single parameters": lambda: lora(target_modules=["q_proj"], target_parameters=["mlp.up_proj.weight"], lora_dropout=0.0),
    "with biases": lambda: lora(bias="lora_only", lora_bias=True),
    "from the principal values": lambda: lora(init_lora_weights="pissa", lora_dropout=0.0),
    "IA3": lambda: peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "prompts": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefixes": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}  # fmt: skip


@pytest.mark.parametrize(
    "method", clients.slow_but(("embedding and head", "a head trained whole", "IA3", "prompts"), METHODS)
)
def test_methods(method, tmp_path, nvme):
    clients.compare(
        loop(),
        lambda: with_adapters(METHODS[method]()),
        tmp_path,
        nvme,
        ram=RAM,
    )


def test_fp32_adapters_on_a_bf16_base(tmp_path, nvme):
    """peft keeps adapters in fp32 there: each parameter is trained in its own dtype."""

    def build() -> nn.Module:
        model = with_adapters(base=lambda: llama().bfloat16())
        assert {each.dtype for each in model.parameters() if each.requires_grad} == {torch.float32}
        assert {each.dtype for each in model.parameters() if not each.requires_grad} == {torch.bfloat16}
        return model

    clients.compare(loop(), build, tmp_path, nvme, ram=RAM)


# --- what people do to adapters in training -------------------------------------------------------------------------


def test_adapters_switched_off_for_a_while(tmp_path, nvme):
    def look(model: nn.Module, step: int) -> Any:
        with_them = logits(model)
        with model.disable_adapter():
            without = logits(model)
        assert step == 0 or not torch.equal(with_them, without)
        return [with_them, without]

    clients.compare(loop(look), with_adapters, tmp_path, nvme, ram=RAM)


def test_adapters_merged_for_a_while(tmp_path, nvme):
    """Merging writes into frozen weights, and unmerging takes it out again with other roundings: both must arrive."""

    def look(model: nn.Module, step: int) -> Any:
        weight = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
        model.merge_adapter()
        merged = [logits(model), weight.detach().clone()]
        model.unmerge_adapter()
        return [*merged, weight.detach().clone()]

    clients.compare(loop(look), with_adapters, tmp_path, nvme, ram=RAM)


def two_adapters() -> nn.Module:
    """The second one is off, so frozen, when the model is wrapped."""
    model = with_adapters()
    model.add_adapter("second", lora(r=2))
    model.set_adapter("default")
    return model.train()


def test_two_adapters_in_turns(tmp_path, nvme):
    def look(model: nn.Module, step: int) -> Any:
        model.set_adapter(("second", "default")[step % 2])
        return [name for name, each in model.named_parameters() if each.requires_grad]

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        return [{"params": [each for name, each in model.named_parameters() if "lora_" in name]}]

    clients.compare(loop(look), two_adapters, tmp_path, nvme, groups, ram=RAM)


def test_adapters_made_after_wrap_are_refused(tmp_path, nvme):
    """By the optimizer that they would join, and by the first step that would train nothing."""
    model, optimizer, scheduler = clients.started(llama)
    with clients.wrapped(model, optimizer, nvme) as run:
        adapted = with_adapters(base=lambda: model)
        added = [each for each in adapted.parameters() if each.requires_grad]
        with pytest.raises(fuyou.FuyouError, match="before wrapping"):
            run.optimizer.add_param_group({"params": added})
        with pytest.raises(fuyou.StateError, match="added to the model after fuyou.wrap"):
            loop()(Side(adapted, run.optimizer, scheduler, tmp_path, run))


def test_adapters_are_saved_as_plain_peft_saves_them(tmp_path, nvme):
    """In the run and after it: the same bytes in the file."""

    def script(side: Side) -> Any:
        seen = loop()(side)
        side.model.save_pretrained(side.folder)
        weights = (side.folder / "adapter_model.safetensors").read_bytes()
        return [seen, weights, json.loads((side.folder / "adapter_config.json").read_text())]

    clients.compare(script, with_adapters, tmp_path, nvme, ram=RAM)


def test_merge_and_unload_in_a_run(tmp_path, nvme):
    def script(side: Side) -> Any:
        return [loop()(side), logits(side.model.merge_and_unload())]

    clients.compare(script, with_adapters, tmp_path, nvme, ram=RAM)


# --- frozen weights are read-only -----------------------------------------------------------------------------------

PAGE = 4096  # bytes: what every range on the host and on the drive is rounded up to
ALIGNMENT = 256  # bytes: where every tensor starts


def pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


def adapter_ranges(model: nn.Module) -> list[int]:
    """Bytes of the adapters of each layer, packed: what may be held and written beside frozen weights."""
    layers = model.base_model.model.model.layers
    trained = [[each for each in layer.parameters() if each.requires_grad] for layer in layers]
    assert sum(map(len, trained)) == sum(each.requires_grad for each in model.parameters())
    return [sum(-(-each.numel() * 4 // ALIGNMENT) * ALIGNMENT for each in layer) for layer in trained]


def wide() -> nn.Module:
    """A base of 1 MiB with 34 KiB of adapters."""
    return with_adapters(base=lambda: llama(hidden_size=64, intermediate_size=256, num_hidden_layers=4))


@pytest.mark.parametrize("place", ["nvme", "ram"])
def test_frozen_weights_have_no_gradients_and_no_state(place, tmp_path, nvme):
    model, optimizer, scheduler = clients.started(wide)
    frozen = sum(each.numel() * 4 for each in model.parameters() if not each.requires_grad)
    ranges = adapter_ranges(model)
    weights, state = sum(map(pages, ranges)), sum(pages(2 * each) for each in ranges)
    assert weights + 2 * state < frozen / 4
    folder = nvme if place == "nvme" else None
    with clients.wrapped(model, optimizer, folder, **({"ram": "640KiB"} if folder else {})) as run:
        loop()(Side(model, run.optimizer, scheduler, tmp_path, run))
        report = run.report().dict()
        assert all(each.grad is None for each in model.parameters() if not each.requires_grad)
        assert len(run.optimizer.state) == sum(each.requires_grad for each in model.parameters())
    held = {kind: sum(report["tiers"][tier]["by_category"][kind] for tier in ("host", "nvme"))
            for kind in ("gradients", "optimizer")}  # fmt: skip
    slots = 2 if folder else 1  # an update on NVMe never overwrites what it was made from
    assert held == {"gradients": weights, "optimizer": slots * state}
    # A backward writes gradients, a step weights and state, twice where a guess was wrong; of the frozen weights nothing.
    assert report["traffic"]["nvme_write_bytes_per_step"] <= 2 * ((ACCUMULATION + 1) * weights + state)
    assert bool(report["traffic"]["nvme_write_bytes_per_step"]) == bool(folder)


def test_frozen_weights_on_the_drive_are_never_written(tmp_path, nvme):
    """Found in the store by their bytes and marked there: training reads the marks, and never writes over them."""
    model, optimizer, scheduler = clients.started(wide)
    values = {name: parameter.detach().numpy().tobytes() for name, parameter in model.named_parameters()}
    with clients.wrapped(model, optimizer, nvme, ram="400KiB") as run:
        on_drive = (chunk for unit in run._units for chunk in unit.chunks if not chunk.weights.on_host)
        name, frozen = next(
            (member.name, member.parameter)
            for chunk in on_drive
            for member, _, _ in chunk.parts
            if not member.parameter.requires_grad and chunks_of(member) == [chunk] and member.entry.count >= 1024
        )
        written = values[name]
        script = loop()
        script(Side(model, run.optimizer, scheduler, tmp_path, run))
        run.settle()
        store = max(Path(nvme).rglob("*"), key=lambda path: path.stat().st_size)
        with open(store, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
            at = mapped.find(written)
            assert at >= 0 and mapped.find(written, at + 1) < 0, "one copy, unchanged by three steps"
            marked = (frozen.detach() * 0.5).numpy().tobytes()
            mapped[at : at + len(marked)] = marked
            mapped.flush()
            script(Side(model, run.optimizer, scheduler, tmp_path, run))
            run.settle()
        with open(store, "rb") as file:
            file.seek(at)
            assert file.read(len(marked)) == marked
        assert dict(model.named_parameters())[name].detach().numpy().tobytes() == marked
